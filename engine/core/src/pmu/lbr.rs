//! The stack of last branch records, and what LBR_SELECT keeps off it (SDM vol. 3, 18.9 and 18.12; format 5, "EIP_FLAGS_INFO").
//!
//! The privilege filter looks at the level after the transfer. FROM is the first byte of the branch, or of the instruction that an
//! exception or interrupt came before.

use super::branch::Kind;
use crate::memory::PAGE_OFFSET;

/// Records of the stack.
pub const ENTRIES: usize = 32;

/// Bits of LBR_SELECT; those up to `FAR` keep records away.
pub mod select {
    pub const CPL_0: u64 = 1 << 0;
    pub const CPL_OTHER: u64 = 1 << 1;
    pub const CONDITIONAL: u64 = 1 << 2;
    pub const RELATIVE_CALL: u64 = 1 << 3;
    pub const INDIRECT_CALL: u64 = 1 << 4;
    pub const RETURN: u64 = 1 << 5;
    pub const INDIRECT_JUMP: u64 = 1 << 6;
    pub const RELATIVE_JUMP: u64 = 1 << 7;
    pub const FAR: u64 = 1 << 8;
    /// Calls push a record and returns take it away.
    pub const CALL_STACK: u64 = 1 << 9;
    pub const ALL: u64 = (1 << 10) - 1;
}

/// INFO: the branch was mispredicted.
pub const MISPREDICTED: u64 = 1 << 63;
/// INFO: bits of the saturating cycle count.
pub const CYCLES: u64 = 0xffff;

/// One transfer of control that took place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    pub kind: Kind,
    pub from: u64,
    pub to: u64,
    pub mispredicted: bool,
    /// Privilege level that the transfer came from, and that it led to.
    pub before: u8,
    pub after: u8,
    /// Vector of an interrupt or exception.
    pub vector: u8,
}

/// Records of host code, more than the stack holds.
pub const RECENT: usize = 2 * ENTRIES;

/// Parts of a record of host code.
pub mod recent {
    /// Low bits of [`Recent::page`](super::Recent::page). The target is not a part of the branch, and in the row for it.
    pub const MISPREDICTED: u64 = 1 << 0;
    pub const COMPUTED: u64 = 1 << 1;
    /// Bits of a note that are the budget's.
    pub const BUDGET_BITS: u32 = 14;
}

/// What host code keeps of branches that are not on the stack yet: what cannot be found out later. `count` goes on beyond the end of the
/// rows, in which record number 1 has place 1.
#[derive(Clone, Copy, Debug)]
pub struct Recent {
    pub count: usize,
    /// Linear page of the branch, and below it bits of [`recent`].
    pub page: [u64; RECENT],
    /// The sum of the budget behind the branch and, above the budget's bits, the number of its block.
    pub note: [u32; RECENT],
    pub to: [u64; RECENT],
}

impl Default for Recent {
    fn default() -> Self {
        Recent { count: 0, page: [0; RECENT], note: [0; RECENT], to: [0; RECENT] }
    }
}

impl Recent {
    /// How far the budget has gone down since record `n`, in core cycles, to `budget`; and the number of the record's block.
    fn when_and_where(&self, n: usize, budget: i64) -> (u64, u32) {
        let (note, now) = (self.note[n % RECENT], budget as u32);
        let age = note.wrapping_sub(now) & ((1 << recent::BUDGET_BITS) - 1);
        (age.into(), note.wrapping_sub(now.wrapping_add(age)) >> recent::BUDGET_BITS)
    }
}

/// Where a block's branch is, and where it goes unless that is computed; distances from the start of its page.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    pub from: u64,
    pub to: u64,
}

/// The stack's registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lbr {
    pub select: u64,
    pub tos: usize,
    pub from: [u64; ENTRIES],
    pub to: [u64; ENTRIES],
    pub info: [u64; ENTRIES],
    /// Core cycles at the last update.
    pub updated: u64,
    pub recent: Recent,
    /// Kinds of near branches that the filters keep off the stack at the privilege level that runs.
    pub suppressed: u32,
}

impl Lbr {
    /// Takes note of a transfer that happened `now`, in core cycles.
    #[inline(always)]
    pub fn record(&mut self, transfer: &Transfer, now: u64) {
        if self.select != 0 && self.keeps_off(transfer) {
            return;
        }
        self.tos = (self.tos + 1) % ENTRIES;
        self.from[self.tos] = transfer.from;
        self.to[self.tos] = transfer.to;
        let cycles = now.wrapping_sub(self.updated).min(CYCLES);
        self.info[self.tos] = cycles | if transfer.mispredicted { MISPREDICTED } else { 0 };
        self.updated = now;
    }

    /// Code at privilege level `cpl` runs from now on.
    pub fn enter_level(&mut self, cpl: u8) {
        let ring = if cpl == 0 { select::CPL_0 } else { select::CPL_OTHER };
        self.suppressed = match self.select {
            0 => 0,
            chosen if chosen & ring != 0 => u32::MAX,
            chosen => Kind::ALL.iter().filter(|kind| chosen & class(**kind) != 0).fold(0, |bits, kind| bits | kind.bit()),
        };
    }

    /// Puts what host code has noted on the stack; it is `now`, in core cycles, and the budget is `budget`. `site` knows blocks by their
    /// numbers.
    pub fn settle(&mut self, now: u64, budget: i64, site: impl Fn(u32) -> Site) {
        let recent = &self.recent;
        let first = recent.count.saturating_sub(ENTRIES);
        if first > 0 {
            self.updated = now.wrapping_sub(recent.when_and_where(first, budget).0);
        }
        for n in first + 1..=recent.count {
            let (slot, bits, (age, block)) = ((self.tos + n) % ENTRIES, recent.page[n % RECENT], recent.when_and_where(n, budget));
            let (site, page, time) = (site(block), bits & !PAGE_OFFSET, now.wrapping_sub(age));
            let cycles = time.wrapping_sub(self.updated).min(CYCLES);
            self.from[slot] = page.wrapping_add(site.from);
            self.to[slot] = if bits & recent::COMPUTED != 0 { recent.to[n % RECENT] } else { page.wrapping_add(site.to) };
            self.info[slot] = cycles | if bits & recent::MISPREDICTED != 0 { MISPREDICTED } else { 0 };
            self.updated = time;
        }
        self.tos = (self.tos + recent.count) % ENTRIES;
        self.recent.count = 0;
    }

    /// Whether the filters keep a transfer off the stack; in call-stack mode returns take records away instead.
    fn keeps_off(&mut self, transfer: &Transfer) -> bool {
        let ring = if transfer.after == 0 { select::CPL_0 } else { select::CPL_OTHER };
        if self.select & (ring | class(transfer.kind)) != 0 {
            return true;
        }
        let calls_only = self.select & select::CALL_STACK != 0;
        if calls_only && transfer.kind == Kind::Return {
            self.pop();
        }
        calls_only && matches!(transfer.kind, Kind::Return | Kind::ZeroCall)
    }

    /// A return takes the newest record away; on an empty stack it does nothing.
    fn pop(&mut self) {
        if self.from[self.tos] == 0 {
            return;
        }
        (self.from[self.tos], self.to[self.tos], self.info[self.tos]) = (0, 0, 0);
        self.tos = (self.tos + ENTRIES - 1) % ENTRIES;
    }
}

/// The bit of LBR_SELECT that a kind belongs to.
#[inline(always)]
fn class(kind: Kind) -> u64 {
    match kind {
        Kind::Conditional | Kind::Loop => select::CONDITIONAL,
        Kind::Jump => select::RELATIVE_JUMP,
        Kind::IndirectJump => select::INDIRECT_JUMP,
        Kind::Call | Kind::ZeroCall => select::RELATIVE_CALL,
        Kind::IndirectCall => select::INDIRECT_CALL,
        Kind::Return => select::RETURN,
        _ => select::FAR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(kind: Kind, from: u64, after: u8) -> Transfer {
        Transfer { kind, from, to: from + 0x100, mispredicted: false, before: 3, after, vector: 0 }
    }

    /// How many records a transfer of `kind` to privilege level `after` makes under `select`.
    fn records(select: u64, kind: Kind, after: u8) -> usize {
        let mut lbr = Lbr { select, ..Lbr::default() };
        lbr.record(&transfer(kind, 0x1000, after), 1);
        lbr.from.iter().filter(|from| **from != 0).count()
    }

    #[test]
    fn each_bit_keeps_its_class_away_and_no_other() {
        let classes: [(u64, &[Kind]); 7] = [
            (select::CONDITIONAL, &[Kind::Conditional, Kind::Loop]),
            (select::RELATIVE_CALL, &[Kind::Call, Kind::ZeroCall]),
            (select::INDIRECT_CALL, &[Kind::IndirectCall]),
            (select::RETURN, &[Kind::Return]),
            (select::INDIRECT_JUMP, &[Kind::IndirectJump]),
            (select::RELATIVE_JUMP, &[Kind::Jump]),
            (
                select::FAR,
                &[
                    Kind::FarJump,
                    Kind::FarCall,
                    Kind::FarReturn,
                    Kind::Syscall,
                    Kind::Sysret,
                    Kind::Iret,
                    Kind::SoftwareInterrupt,
                    Kind::Exception,
                    Kind::Interrupt,
                ],
            ),
        ];
        for (bit, _) in classes {
            for (own, kinds) in classes {
                for kind in kinds {
                    assert_eq!(records(bit, *kind, 0), usize::from(own != bit), "{kind:?} under {bit:#x}");
                }
            }
        }
    }

    #[test]
    fn privilege_is_that_of_the_target() {
        for (select, kernel, user) in [(0, 1, 1), (select::CPL_0, 0, 1), (select::CPL_OTHER, 1, 0), (3, 0, 0)] {
            assert_eq!((records(select, Kind::Sysret, 0), records(select, Kind::Sysret, 3)), (kernel, user), "{select:#x}");
        }
    }

    #[test]
    fn the_stack_wraps_and_cycles_saturate() {
        let mut lbr = Lbr { tos: 30, ..Lbr::default() };
        for (n, now) in [(1, 5), (2, 70_000), (3, 70_010)] {
            lbr.record(&transfer(Kind::Jump, n, 0), now);
        }
        assert_eq!((lbr.tos, lbr.from[31], lbr.from[0], lbr.from[1]), (1, 1, 2, 3));
        assert_eq!([31, 0, 1].map(|n: usize| lbr.info[n]), [5, 0xffff, 10]);
        lbr.record(&Transfer { mispredicted: true, ..transfer(Kind::Jump, 4, 0) }, 70_012);
        assert_eq!(lbr.info[2], 1 << 63 | 2);
    }

    #[test]
    fn call_stack_mode_keeps_open_calls_only() {
        const USER_CALLS: u64 = 0x3c5;
        let mut lbr = Lbr { select: USER_CALLS, ..Lbr::default() };
        let mut step = |kind, from, after| lbr.record(&transfer(kind, from, after), 0);
        step(Kind::Call, 0x10, 3);
        step(Kind::ZeroCall, 0x20, 3);
        step(Kind::IndirectCall, 0x30, 3);
        step(Kind::Conditional, 0x40, 3);
        step(Kind::Call, 0x50, 0);
        step(Kind::Return, 0x60, 0);
        step(Kind::Return, 0x70, 3);
        assert_eq!((lbr.tos, lbr.from[1], lbr.from[2]), (1, 0x10, 0));
        let mut step = |kind, from, after| lbr.record(&transfer(kind, from, after), 0);
        step(Kind::Return, 0x80, 3);
        step(Kind::Return, 0x90, 3);
        assert_eq!((lbr.tos, lbr.from), (0, [0; ENTRIES]));
    }
}
