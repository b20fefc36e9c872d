//! Breakpoints in the debug registers, and DR6 (SDM vol. 3, 17.2 and 17.3; APM vol. 2, 13.1).
//!
//! While DR7 turns one on, the dispatcher runs one instruction at a time, and the pages of data breakpoints have no tags in the TLB, so
//! that every access to them takes the long way, which looks here. While none is on, nothing looks.

use super::{pending, Cpu};
use crate::memory::PAGE_OFFSET;
use crate::paging::AccessKind;
use crate::state::{cr4, interruptibility, rflags, seg, State};

/// Bits of DR6, and of the pending debug exceptions (SDM vol. 3, 25.4.2).
pub mod dr6 {
    /// B0 to B3: the breakpoints that were hit.
    pub const BREAKPOINTS: u64 = 0xf;
    /// BD: the debug registers were touched while DR7.GD was set.
    pub const BD: u64 = 1 << 13;
    /// BS: single step.
    pub const BS: u64 = 1 << 14;
    /// BT: a switch to a task with the debug trap flag.
    pub const BT: u64 = 1 << 15;
    /// Bits that read as one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// Bits of DR7.
pub mod dr7 {
    /// L0 to G3.
    pub const ENABLES: u64 = 0xff;
    /// General detect enable.
    pub const GD: u64 = 1 << 13;
}

/// What a breakpoint waits for, by its R/W field.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Condition {
    #[default]
    Off,
    Execute,
    Write,
    /// IN or OUT, if CR4.DE is set.
    Port,
    Access,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Breakpoint {
    condition: Condition,
    first: u64,
    last: u64,
}

impl Breakpoint {
    fn new(state: &State, number: usize) -> Self {
        if state.dr7 >> (2 * number) & 3 == 0 {
            return Breakpoint::default();
        }
        let field = state.dr7 >> (16 + 4 * number) & 0xf;
        let condition = match field & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 => Condition::Port,
            _ => Condition::Access,
        };
        let bytes = [1, 2, 8, 4][(field >> 2) as usize];
        let first = state.dr[number] & !(bytes - 1);
        Breakpoint { condition, first, last: first | (bytes - 1) }
    }

    fn is_data(&self) -> bool {
        matches!(self.condition, Condition::Write | Condition::Access)
    }

    fn touches(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}

/// The four breakpoints as DR0 to DR3 and DR7 have them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakpoints([Breakpoint; 4]);

impl Breakpoints {
    fn new(state: &State) -> Self {
        if state.dr7 & dr7::ENABLES == 0 {
            return Breakpoints::default();
        }
        Breakpoints(core::array::from_fn(|number| Breakpoint::new(state, number)))
    }

    fn any(&self, test: impl Fn(&Breakpoint) -> bool) -> bool {
        self.0.iter().any(test)
    }

    /// Bits B0 to B3 of the breakpoints that `test` finds hit.
    fn hits(&self, test: impl Fn(&Breakpoint) -> bool) -> u64 {
        self.0.iter().enumerate().fold(0, |bits, (number, breakpoint)| bits | u64::from(test(breakpoint)) << number)
    }

    /// Whether there is a data breakpoint in the page of `la`.
    #[inline]
    pub fn watch_page(&self, la: u64) -> bool {
        self.any(|breakpoint| breakpoint.is_data() && breakpoint.first & !PAGE_OFFSET == la & !PAGE_OFFSET)
    }
}

impl Cpu {
    /// Follows the debug registers; whoever changes DR0 to DR3 or DR7 calls this.
    pub fn refresh_breakpoints(&mut self) {
        let new = Breakpoints::new(&self.state);
        let old = std::mem::replace(&mut self.breakpoints, new);
        if old == new {
            return;
        }
        let data = |breakpoints: &Breakpoints| breakpoints.0.map(|one| one.is_data().then_some(one.first));
        if data(&old) != data(&new) {
            self.tlb.flush();
            self.refresh_table();
        }
        let on = new.any(|breakpoint| breakpoint.condition != Condition::Off);
        self.pending = self.pending & !pending::BREAKPOINTS | if on { pending::BREAKPOINTS } else { 0 };
    }

    /// Bits B0 to B3 of the instruction breakpoints at RIP. RF keeps them from hitting, and so does a MOV SS shadow on Intel's silicon
    /// (SDM vol. 3, 6.8.3).
    pub(super) fn instruction_breakpoints(&self) -> u64 {
        let shadow = self.state.interruptibility & interruptibility::MOV_SS != 0 && !self.model.is_amd();
        if self.rflags & rflags::RF != 0 || shadow {
            return 0;
        }
        let la = self.table_address(self.segment_base(seg::CS).wrapping_add(self.rip()));
        self.breakpoints.hits(|breakpoint| breakpoint.condition == Condition::Execute && breakpoint.touches(la, la))
    }

    /// Notes the data breakpoints that an access hits; they trap at the end of the instruction.
    #[inline]
    pub fn watch(&mut self, la: u64, bytes: u64, kind: AccessKind) {
        if self.pending & pending::BREAKPOINTS != 0 {
            self.watch_data(la, la.wrapping_add(bytes - 1), kind);
        }
    }

    #[cold]
    fn watch_data(&mut self, first: u64, last: u64, kind: AccessKind) {
        let write = kind == AccessKind::Write;
        let hits = self.breakpoints.hits(|breakpoint| {
            let waits = breakpoint.condition == Condition::Access || write && breakpoint.condition == Condition::Write;
            waits && breakpoint.touches(first, last)
        });
        self.trap(hits);
    }

    /// Notes the I/O breakpoints that an access to a port hits.
    pub fn watch_port(&mut self, port: u16, bytes: u8) {
        if self.pending & pending::BREAKPOINTS == 0 || self.state.cr4 & cr4::DE == 0 {
            return;
        }
        let (first, last) = (u64::from(port), u64::from(port) + u64::from(bytes) - 1);
        let hits = self.breakpoints.hits(|breakpoint| breakpoint.condition == Condition::Port && breakpoint.touches(first, last));
        self.trap(hits);
    }

    /// Lets `bits` of DR6 trap before the next instruction.
    pub(crate) fn trap(&mut self, bits: u64) {
        if bits != 0 {
            self.state.pending_debug |= bits;
            self.pending |= pending::DEBUG;
        }
    }

    /// Sets what waits to trap: an instruction that did not complete, or a #DB that comes first, drops the rest.
    pub(crate) fn set_traps(&mut self, bits: u64) {
        self.state.pending_debug = bits;
        self.pending = self.pending & !pending::DEBUG | if bits != 0 { pending::DEBUG } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(number: usize, address: u64, field: u64) -> State {
        let mut state = State { dr7: 1 << (2 * number) | field << (16 + 4 * number), ..State::default() };
        state.dr[number] = address;
        state
    }

    #[test]
    fn lengths_align_addresses() {
        for (length, bytes) in [(0, 1), (1, 2), (2, 8), (3, 4)] {
            let found = Breakpoint::new(&state(2, 0x1007, length << 2 | 1), 2);
            let first = 0x1007 & !(bytes - 1);
            assert_eq!(found, Breakpoint { condition: Condition::Write, first, last: first + bytes - 1 });
        }
    }

    #[test]
    fn only_data_breakpoints_watch_pages() {
        assert!(Breakpoints::new(&state(0, 0x1007, 3)).watch_page(0x1fff));
        assert!(!Breakpoints::new(&state(0, 0x1007, 3)).watch_page(0x2000));
        assert!(!Breakpoints::new(&state(3, 0x1007, 0)).watch_page(0x1000));
        assert!(!Breakpoints::default().watch_page(0));
    }
}
