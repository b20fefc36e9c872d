//! The dispatcher: runs blocks one after another, and between them everything that happens at instruction boundaries.

use core::ptr;

use super::breakpoint::dr6;
use super::signal::attention;
use super::{pending, Cpu};
use crate::decode::block::{self, Block};
use crate::fault::{vector, Fault};
use crate::paging::walk::probe;
use crate::paging::{AccessKind, Privilege};
use crate::state::{interruptibility, rflags};
use crate::uop::{slot, Exec, Stop, Uop};
use crate::virt::control::{emulate, intercept};
use crate::virt::exits::code;

/// Instructions between two looks at the clock: some tens of microseconds.
const SLICE: i64 = 10_000;

/// Interrupt shadows.
const SHADOWS: u32 = interruptibility::STI | interruptibility::MOV_SS;

impl Cpu {
    /// Runs the guest until something must leave it; the reason is in `exit`. The budget goes on from the last run, so that clocks are
    /// looked at however often the guest exits.
    pub fn run(&mut self) {
        loop {
            let outcome = if self.pmu.watched != 0 { self.run_watched() } else { self.run_unwatched() };
            if outcome.is_err() {
                return;
            }
        }
    }

    /// Runs the guest as long as there is nothing to watch.
    fn run_unwatched(&mut self) -> Exec {
        let mut previous = ptr::null_mut();
        loop {
            previous = match self.step(previous) {
                Ok(block) => block,
                Err(Stop::Leave) => return Ok(()),
                Err(stop) => return Err(stop),
            };
        }
    }

    /// Runs one block, or what comes before it. `previous` is the block that led to RIP; null stands for anything else. Returns what is
    /// `previous` for the next step. `Err` means that `exit` holds a VM exit, or with `Stop::Leave` that somebody watches from now on.
    #[inline(always)]
    fn step(&mut self, previous: *mut Block) -> Exec<*mut Block> {
        if (self.signal.pending() | self.pending != 0 || self.budget <= 0) && self.boundary_unwatched()? {
            self.single()?;
            return Ok(ptr::null_mut());
        }
        match self.successor(previous) {
            Ok(block) => self.execute(block),
            Err(stop) => {
                self.stopped(stop)?;
                Ok(ptr::null_mut())
            }
        }
    }

    /// [`Cpu::boundary`], unless the other dispatcher must take over.
    #[cold]
    #[inline(never)]
    fn boundary_unwatched(&mut self) -> Exec<bool> {
        self.pending &= !pending::WATCHED;
        if self.pmu.watched != 0 {
            return Err(Stop::Leave);
        }
        self.boundary()
    }

    /// Work between blocks that is rare. Returns true when exactly one instruction may run before the next look.
    #[cold]
    #[inline(never)]
    pub(super) fn boundary(&mut self) -> Exec<bool> {
        let signals = self.signal.pending();
        if signals & attention::SHOOT_DOWN != 0 {
            self.shoot_down();
        }
        if self.pending & pending::APIC_EXIT != 0 {
            return Err(self.exit_apic());
        }
        if signals & attention::POSTED != 0 {
            self.signal.take(attention::POSTED);
            self.receive_posted();
        }
        if self.pending & pending::DEBUG != 0 {
            self.take_debug_trap()?; // before interrupts, which leave the guest (SDM vol. 3, table 6-2)
        }
        if self.budget <= 0 {
            self.renew_budget();
            self.check_clocks()?;
        }
        if self.pending & pending::EMULATE == 0 && signals & attention::KICK != 0 {
            self.signal.take(attention::KICK);
            return Err(self.exit_external_interrupt());
        }
        if self.pending & (pending::WINDOW | pending::EMULATE) == pending::WINDOW {
            self.check_windows()?;
        }
        if self.pending & (pending::VIRTUAL | pending::EMULATE) == pending::VIRTUAL {
            self.take_virtual_interrupt()?;
        }
        if self.pending & pending::HALTED != 0 {
            self.wait_halted()?;
        }
        let alone = self.pending & (pending::SHADOW | pending::STEP | pending::EMULATE | pending::BREAKPOINTS) != 0;
        Ok(self.check_instruction_budget()? || alone)
    }

    /// Exits when the hypervisor's instruction budget is used up; tells whether the end is near.
    fn check_instruction_budget(&mut self) -> Exec<bool> {
        if self.pending & pending::BUDGET == 0 {
            return Ok(false);
        }
        if self.control.instruction_budget <= self.instructions() {
            return Err(self.exit(code::BUDGET, 0));
        }
        Ok(true)
    }

    fn renew_budget(&mut self) {
        self.retired = self.instructions();
        self.budget = SLICE;
        self.budget_start = SLICE;
        self.shorten_budget();
    }

    /// Lets the budget end before the hypervisor's does, whose last instructions run one by one, in virtual time with the first timer, and
    /// before a counter overflows.
    pub fn shorten_budget(&mut self) {
        let mut limit = self.budget.min(self.until_overflow());
        let wanted = self.control.instruction_budget;
        if wanted != 0 {
            let left = wanted.saturating_sub(self.instructions()).saturating_sub(block::MAX_INSTRUCTIONS as u64);
            limit = limit.min(left as i64);
            self.pending |= if left == 0 { pending::BUDGET } else { 0 };
        }
        if let (true, Some(next)) = (self.clock.is_virtual(), self.clock.next_timer()) {
            limit = limit.min(next.saturating_sub(self.host_tsc()).div_ceil(self.clock.rate) as i64);
        }
        self.budget_start -= self.budget - limit;
        self.budget = limit;
    }

    /// The host's TSC now: exact for the last instruction of a block and between blocks.
    #[inline]
    pub fn host_tsc(&self) -> u64 {
        self.clock.host_tsc(self.instructions())
    }

    /// The guest's TSC now, as exact as [`Cpu::host_tsc`].
    #[inline]
    pub fn guest_tsc(&self) -> u64 {
        self.clock.guest_tsc(self.host_tsc())
    }

    fn check_clocks(&mut self) -> Exec {
        if self.pending & pending::EMULATE != 0 {
            return Ok(());
        }
        let now = self.host_tsc();
        if now >= self.clock.tick {
            return Err(self.exit_external_interrupt());
        }
        if self.clock.timer != 0 && now >= self.clock.timer {
            self.clock.timer = 0;
            return Err(self.exit_external_interrupt());
        }
        if self.clock.preemption != 0 && now >= self.clock.preemption {
            self.clock.preemption = 0;
            return Err(self.exit(code::PREEMPTION_TIMER, 0));
        }
        Ok(())
    }

    fn check_windows(&mut self) -> Exec {
        let blocked = self.state.interruptibility;
        let shadow = blocked & SHADOWS != 0;
        if self.control.intercepts(intercept::NMI_WINDOW) && !shadow && blocked & interruptibility::NMI == 0 {
            return Err(self.exit(code::NMI_WINDOW, 0));
        }
        if self.control.intercepts(intercept::INTERRUPT_WINDOW) && !shadow && self.rflags & rflags::IF != 0 {
            return Err(self.exit(code::INTERRUPT_WINDOW, 0));
        }
        Ok(())
    }

    /// A halted CPU whose hypervisor does not intercept HLT sleeps until an interrupt of the host.
    fn wait_halted(&mut self) -> Exec {
        loop {
            self.shoot_down();
            if self.signal.take(attention::KICK) != 0 {
                return Err(self.exit_external_interrupt());
            }
            if self.clock.is_virtual() {
                self.skip_to_timer();
                self.check_clocks()?;
                return Err(self.exit_external_interrupt());
            }
            self.check_clocks()?;
            if self.signal.take(attention::POSTED) != 0 {
                self.receive_posted();
            }
            if self.pending & pending::VIRTUAL != 0 {
                self.take_virtual_interrupt()?;
                if self.pending & pending::HALTED == 0 {
                    return Ok(());
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }

    /// Virtual time passes although nothing retires; without a timer it is the hypervisor's.
    fn skip_to_timer(&mut self) {
        let now = self.host_tsc();
        self.clock.base += self.clock.next_timer().unwrap_or(now).saturating_sub(now);
    }

    /// Delivers the debug exceptions that the last instruction left behind. A MOV SS shadow holds them back (SDM vol. 3, 6.8.3).
    fn take_debug_trap(&mut self) -> Exec {
        if self.state.interruptibility & interruptibility::MOV_SS != 0 {
            return Ok(());
        }
        let payload = self.state.pending_debug & (dr6::BREAKPOINTS | dr6::BS | dr6::BT);
        self.set_traps(0);
        self.fault = Fault { vector: vector::DB, error: None, payload };
        self.deliver_fault()
    }

    /// Runs a block, and as host code those that follow it. Returns the last one if it ended with a branch or fell through, and null if
    /// anything else happened.
    #[inline(always)]
    pub(super) fn execute(&mut self, block: *mut Block) -> Exec<*mut Block> {
        match self.translation(block) {
            Some(body) => self.run_native(block, body),
            None => self.interpret(block),
        }
    }

    /// Runs a block to its end in the interpreter; the result is that of `execute`.
    #[inline(always)]
    pub(crate) fn interpret(&mut self, block: *mut Block) -> Exec<*mut Block> {
        // SAFETY: blocks are freed by `collect` only, which no handler calls; the last micro-op of a block always stops.
        let (first, instructions) = unsafe { ((*block).uops.as_ptr(), (*block).instructions) };
        self.budget -= i64::from(instructions);
        self.blocks_run += 1;
        self.at = first;
        loop {
            // SAFETY: as above; a block that dies while it runs keeps its micro-ops, which then stop at once.
            let uop = unsafe { &*self.at };
            let mut result = (uop.run)(self, uop);
            if result == Err(Stop::Slow) {
                result = self.run_reference(block);
            }
            match result {
                // SAFETY: not the last micro-op, because that one stops.
                Ok(()) => self.at = unsafe { self.at.add(1) },
                Err(Stop::Next) => return Ok(block),
                Err(stop) => {
                    // SAFETY: both point into the same slice.
                    let (uop, index) = unsafe { (&*self.at, self.at.offset_from(first)) };
                    self.leave(uop, stop, i64::from(instructions) - index as i64)?;
                    return Ok(ptr::null_mut());
                }
            }
        }
    }

    /// Runs the instruction at `at` with its reference handler.
    #[cold]
    #[inline(never)]
    fn run_reference(&mut self, block: *mut Block) -> Exec {
        // SAFETY: as in `execute`, which runs `block`; fast handlers keep `at` inside it.
        let (uop, handler) = unsafe {
            let index = self.at.offset_from((*block).uops.as_ptr()) as usize;
            let reference = &(*block).reference;
            (&*self.at, *reference.get_unchecked(index))
        };
        handler(self, uop)
    }

    /// Leaves a block before its end; `left` instructions of it, the one of `uop` included, had been paid for.
    #[cold]
    #[inline(never)]
    pub(crate) fn leave(&mut self, uop: &Uop, stop: Stop, left: i64) -> Exec {
        if stop == Stop::Leave {
            self.budget += left - 1;
            self.regs[slot::RIP as usize] = self.rip_at(uop.next_offset());
            return Ok(());
        }
        self.budget += left;
        self.regs[slot::RIP as usize] = self.rip_at(uop.offset.into());
        if stop == Stop::Exit {
            self.complete_exit(uop);
        }
        self.stopped(stop)
    }

    /// Acts on a stop at a boundary where RIP is exact. What retires no instruction uses up the budget all the same.
    pub(super) fn stopped(&mut self, stop: Stop) -> Exec {
        self.budget -= 1;
        self.budget_start -= 1;
        match stop {
            Stop::Next | Stop::Leave | Stop::Again | Stop::Retry | Stop::Slow => Ok(()),
            Stop::Fault => self.deliver_fault(),
            Stop::Exit => Err(Stop::Exit),
        }
    }

    /// The instruction at RIP, the first of its block, may have a hidden breakpoint: another guest-physical address than that of the
    /// breakpoint can lead to the same memory.
    pub(crate) fn meet_breakpoint(&mut self) -> Exec {
        let la = self.segment_address(crate::state::seg::CS, self.rip(), 1, AccessKind::Fetch)?;
        let found = probe(&self.paging, &self.npt.tree(), la, Privilege::SupervisorAc, AccessKind::Read);
        match found {
            Ok(mapping) if self.npt.breakpoints.contains(mapping.gpa) => Err(self.exit_breakpoint(mapping.gpa, la)),
            _ => Ok(()),
        }
    }

    // ---- one instruction at a time --------------------------------------------------------------------------------------------------

    /// Runs one instruction, and what comes with its end: shadows and RF end, single-step traps are noted, and a hypervisor that asked for
    /// one instruction gets control.
    pub(super) fn single(&mut self) -> Exec {
        let hits = self.instruction_breakpoints();
        if hits != 0 {
            self.fault = Fault { vector: vector::DB, error: None, payload: hits };
            return self.deliver_fault();
        }
        let (traps, resume) = (self.state.pending_debug, self.rflags & rflags::RF);
        self.rflags &= !rflags::RF;
        self.step_settled = false;
        let shadow = self.state.interruptibility & SHADOWS;
        let stepping = self.rflags & rflags::TF != 0;
        self.state.interruptibility &= !SHADOWS;
        self.pending &= !pending::SHADOW;
        let (stop, branched) = match self.next_block() {
            Ok(block) => self.execute_one(block),
            Err(stop) => (stop, false),
        };
        match stop {
            Stop::Exit | Stop::Retry | Stop::Again | Stop::Fault => {
                self.state.interruptibility |= shadow;
                self.pending |= if shadow != 0 { pending::SHADOW } else { 0 };
                self.rflags |= resume;
            }
            Stop::Next | Stop::Leave | Stop::Slow => {}
        }
        if matches!(stop, Stop::Exit | Stop::Retry | Stop::Fault) {
            self.set_traps(traps);
        }
        self.stopped(stop)?;
        if stop == Stop::Retry {
            return Ok(());
        }
        if stepping && stop != Stop::Fault && !self.step_settled && self.step_traps(branched) {
            self.trap(dr6::BS);
        }
        if self.pending & pending::EMULATE != 0 {
            self.end_emulation()?;
        }
        if self.control.intercepts(intercept::MONITOR_TRAP) {
            return Err(self.exit(code::MONITOR_TRAP, 0));
        }
        Ok(())
    }

    /// The emulated instruction is done: back to the hypervisor, or on without it.
    #[cold]
    fn end_emulation(&mut self) -> Exec {
        self.pending &= !pending::EMULATE;
        self.accesses.clear();
        self.end_waivers();
        if std::mem::take(&mut self.control.emulate) == emulate::FIRST {
            return Ok(());
        }
        Err(self.exit(code::EMULATED, 0))
    }

    /// What was waived is in force again.
    pub fn end_waivers(&mut self) {
        self.waivers.clear();
        self.control.waiver_count = 0;
    }

    /// Runs exactly the first instruction of a block and moves RIP; tells also whether it was a taken branch.
    fn execute_one(&mut self, block: *mut Block) -> (Stop, bool) {
        // SAFETY: as in `execute`; a block has at least one micro-op.
        let (uop, handler, breakpoint) = unsafe { (*(*block).uops.as_ptr(), *(*block).reference.as_ptr(), (*block).breakpoint) };
        if breakpoint && self.pending & pending::EMULATE == 0 {
            if let Err(stop) = self.meet_breakpoint() {
                return (stop, false);
            }
        }
        self.blocks_run += 1;
        let first = self.rip();
        self.budget -= 1;
        let stop = handler(self, &uop).err().unwrap_or(Stop::Leave);
        match stop {
            Stop::Next => return (stop, self.note_branch(block, first)),
            Stop::Leave => {
                self.regs[slot::RIP as usize] = self.rip_at(uop.next_offset());
                return (stop, false);
            }
            Stop::Exit => self.complete_exit(&uop),
            Stop::Fault | Stop::Again | Stop::Retry | Stop::Slow => {}
        }
        self.budget += 1;
        (stop, false)
    }
}
