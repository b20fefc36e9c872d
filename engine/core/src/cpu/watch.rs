//! The dispatcher while somebody watches: counters count, branches are recorded, the branch log is on (see [`crate::pmu`]).
//!
//! It runs the same blocks with the same handlers as the plain one. Every branch ends a block, so what a branch did is read off RIP behind
//! it; instructions are counted by the budget anyway. The plain dispatcher knows of this one by a bit of `Cpu::pending` that is set as long
//! as there is anything to watch, so whoever is not watched pays nothing.

use core::ptr;

use super::{pending, CodeSize, Cpu};
use crate::decode::block::{self, Block};
use crate::fault::vector;
use crate::interrupts::Kind as InterruptKind;
use crate::memory::PAGE_OFFSET;
use crate::paging::AccessKind;
use crate::pmu::branch::{taken_in_place, Kind};
use crate::pmu::lbr::{Site, Transfer};
use crate::pmu::predictor::Predictor;
use crate::pmu::registers::Refused;
use crate::pmu::{debugctl, registers, watch, Watching};
use crate::uop::Exec;

/// Instructions that a block runs at most.
const LONGEST: u64 = block::MAX_INSTRUCTIONS as u64;

impl Cpu {
    /// Begins to watch a guest whose state has just been loaded.
    pub fn begin_watch(&mut self) {
        self.watch_from(self.instructions());
        self.choose_watch();
    }

    /// Ends it: counters stand still outside the guest.
    pub fn end_watch(&mut self) {
        self.watch_from(self.instructions());
        (self.pmu.watched, self.pmu.check_at) = (0, u64::MAX);
        if std::mem::take(&mut self.pmu.watching) != Watching::NONE {
            self.refresh_table();
        }
    }

    /// Decides again what to watch. Whoever changes DEBUGCTL or a register of the PMU calls this.
    pub fn choose_watch(&mut self) {
        let before = self.pmu.watching;
        self.pmu.choose(self.state.debugctl);
        if self.pmu.watched != 0 {
            self.pending |= pending::WATCHED;
        }
        if self.pmu.watching != before {
            self.refresh_table();
        }
    }

    /// For an instruction that reads or writes a register of the PMU, which is the last of its block: all counters are right for the
    /// instructions before it. A counter that it starts counts it too, one that it stops does not.
    pub fn sync_counters(&mut self) {
        self.watch_from(self.instructions().wrapping_sub(1));
    }

    /// Brings all counters up to date at instruction count `now`, and counts from there on.
    fn watch_from(&mut self, now: u64) {
        if self.pmu.watched != 0 {
            self.pmu.account(now);
            self.pmu.fold(&mut self.state.debugctl);
        }
        (self.pmu.cpl, self.pmu.since) = (self.cpl(), now);
    }

    // ---- the loop -------------------------------------------------------------------------------------------------------------------

    /// Runs the guest as long as there is something to watch.
    pub(super) fn run_watched(&mut self) -> Exec {
        let mut previous = ptr::null_mut();
        while self.pmu.watched != 0 {
            previous = self.step_watched(previous)?;
        }
        Ok(())
    }

    /// One block, as `Cpu::step` runs it.
    #[inline(always)]
    fn step_watched(&mut self, previous: *mut Block) -> Exec<*mut Block> {
        self.pending &= !pending::WATCHED;
        let mut alone = (self.signal.pending() | self.pending != 0 || self.budget <= 0) && self.boundary()?;
        if self.pmu.cpl != self.cpl() {
            self.enter_level();
        }
        if self.instructions() >= self.pmu.check_at {
            alone |= self.approach_overflow()?;
        }
        if alone {
            self.single()?;
            return Ok(ptr::null_mut());
        }
        match self.successor(previous) {
            Ok(block) if self.overflow_is_near() && self.reaches_overflow(block) => {
                self.single()?;
                Ok(ptr::null_mut())
            }
            Ok(block) => self.execute_watched(block),
            Err(stop) => {
                self.stopped(stop)?;
                Ok(ptr::null_mut())
            }
        }
    }

    /// Runs a block and looks at the branch that it ended with. Where only instructions count, the budget tells them.
    #[inline(always)]
    fn execute_watched(&mut self, block: *mut Block) -> Exec<*mut Block> {
        if self.pmu.watched & watch::BRANCHES == 0 {
            return self.execute(block);
        }
        // SAFETY: blocks are freed by `collect` only, which neither this nor `execute` calls.
        let (kind, watching) = unsafe { ((*block).branch, (*block).key.watching) };
        let (first, before) = (self.rip(), self.instructions());
        if watching != Watching::NONE {
            if let Some(body) = self.translation(block) {
                return self.run_native_watched(block, body);
            }
        }
        let done = self.interpret(block)?;
        if kind != Kind::None && !done.is_null() {
            if kind == Kind::Loop {
                self.earlier_turns(block, first, before);
            }
            self.branch_done(block, first);
        }
        Ok(done)
    }

    /// Runs host code, which looks at its branches itself, but for the last one if that was left to the interpreter.
    fn run_native_watched(&mut self, block: *mut Block, body: *const u8) -> Exec<*mut Block> {
        let done = self.run_native(block, body)?;
        // SAFETY: as in `execute_watched`.
        if unsafe { done.as_ref() }.is_some_and(|done| done.branch != Kind::None) {
            self.branch_done(done, self.native.rip);
        }
        Ok(done)
    }

    /// Whether a counter may overflow before the next block ends.
    #[inline(always)]
    fn overflow_is_near(&self) -> bool {
        self.instructions().wrapping_add(LONGEST) >= self.pmu.check_at
    }

    /// Whether a counter may overflow before the last instruction of `block`: in one that is too long, or that turns as often as it can.
    fn reaches_overflow(&self, block: *const Block) -> bool {
        // SAFETY: as in `execute_watched`.
        let (instructions, kind) = unsafe { ((*block).instructions, (*block).branch) };
        let left = self.pmu.check_at.saturating_sub(self.instructions());
        kind == Kind::Loop || self.pmu.exact && u64::from(instructions) > left
    }

    /// The privilege level has changed: from here on others count.
    #[cold]
    fn enter_level(&mut self) {
        let now = self.instructions();
        self.pmu.account(now);
        self.pmu.cpl = self.cpl();
        self.pmu.lbr.enter_level(self.pmu.cpl);
        self.pmu.check_at = if self.pmu.watched & watch::COUNT != 0 { now } else { u64::MAX };
    }

    /// A counter may have overflowed. Takes the interrupt of one that did, and finds out how far it is to the next; tells whether the next
    /// instruction must run alone.
    #[cold]
    #[inline(never)]
    fn approach_overflow(&mut self) -> Exec<bool> {
        let now = self.instructions();
        self.pmu.account(now);
        if self.pmu.fold(&mut self.state.debugctl) {
            self.choose_watch();
        }
        if self.pmu.interrupt {
            if self.pending & pending::EMULATE != 0 {
                return Ok(true);
            }
            self.pmu.interrupt = false;
            self.interrupt_guest()?;
        }
        let (room, exact) = self.pmu.headroom(LONGEST);
        (self.pmu.check_at, self.pmu.exact) = (now.saturating_add(room), exact);
        self.shorten_budget();
        Ok(false)
    }

    /// An overflow's interrupt: the guest takes it if it is its own and can come at once. Otherwise it is one of the host's.
    fn interrupt_guest(&mut self) -> Exec {
        const NMI: u32 = 1 << 31 | (InterruptKind::Nmi as u32) << 8 | vector::NMI as u32;
        let taken = self.state.interruptibility == 0 && self.pmu.take_virtual_interrupt();
        if !taken {
            if self.pmu.virtual_lvtpc.is_some() {
                self.pmu.mask_interrupts();
            }
            return Err(if self.pmu.is_nmi() { self.exit_nmi() } else { self.exit_external_interrupt() });
        }
        self.deliver_event(NMI, 0, 0)?;
        self.enter_level();
        self.choose_watch();
        Ok(())
    }

    /// Instructions that the budget may have: host code looks at nothing else before it begins a block.
    pub(super) fn until_overflow(&self) -> i64 {
        let left = self.pmu.check_at.saturating_sub(self.instructions()).saturating_sub(LONGEST);
        i64::try_from(left).unwrap_or(i64::MAX)
    }

    /// Something counts besides instructions: cycles of a stall, a page walk. An overflow is that much nearer than it seemed, and the budget
    /// ends earlier, as it does in host code.
    #[inline]
    fn hasten_overflow(&mut self, events: u64) {
        self.pmu.check_at = self.pmu.check_at.saturating_sub(events);
        self.budget -= events as i64;
        self.budget_start -= events as i64;
    }

    /// Core cycles that the core has seen.
    #[cfg(target_arch = "x86_64")]
    fn cycles(&self) -> u64 {
        self.instructions().wrapping_add(self.pmu.tally.stalled())
    }

    /// Takes what host code has noted: mispredicted branches, for which it has paid from the budget alone, and records.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn take_notes(&mut self) {
        let mispredicted = std::mem::take(&mut self.pmu.mispredicted);
        let stalled = self.pmu.tally.add_stalls(self.pmu.cpl, mispredicted);
        self.pmu.check_at = self.pmu.check_at.saturating_sub(stalled);
        self.budget_start -= stalled as i64;
        let (now, budget, code) = (self.cycles(), self.budget, &self.code);
        self.pmu.lbr.settle(now, budget, |number| {
            let Some(block) = code.numbered(number) else { unreachable!("host code does not outlive its block") };
            let (start, branch) = (block.key.host & PAGE_OFFSET, &block.uops[block.instructions as usize - 1]);
            Site { from: start + u64::from(block.last), to: start.wrapping_add(branch.imm) }
        });
    }

    /// Notes a page walk.
    #[cold]
    pub fn note_walk(&mut self, kind: AccessKind, found: bool) {
        let cpl = self.pmu.cpl;
        self.pmu.tally.add_walk(cpl, kind, found);
        self.hasten_overflow(1);
    }

    /// Notes a branch or a delivery; returns whether it was mispredicted.
    #[inline(always)]
    fn retire(&mut self, kind: Kind, cpl: u8, from: u64, next: u64, to: u64, taken: bool) -> bool {
        let (mispredicted, stalled) = self.pmu.retire(kind, cpl, from, next, to, taken);
        if stalled != 0 {
            self.hasten_overflow(stalled);
        }
        mispredicted
    }

    // ---- branches -------------------------------------------------------------------------------------------------------------------

    /// The turns that a LOOP to itself made in one go, but for the last one; `before` is the instruction count where they began.
    #[inline(never)]
    fn earlier_turns(&mut self, block: *const Block, at: u64, before: u64) {
        // SAFETY: as in `execute_watched`.
        let (instructions, length) = unsafe { ((*block).instructions, (*block).length) };
        let turns = self.instructions().wrapping_sub(before).wrapping_sub(instructions.into());
        let (cpl, next) = (self.pmu.cpl, at.wrapping_add(length.into()));
        let recorded = self.pmu.recording || self.pmu.log.is_some();
        let singly = if recorded { turns } else { turns.min(Predictor::LEARNS) };
        for behind in (turns - singly + 1..=turns).rev() {
            let mispredicted = self.retire(Kind::Loop, cpl, at, next, at, true);
            self.record(&Transfer { kind: Kind::Loop, from: at, to: at, mispredicted, before: cpl, after: cpl, vector: 0 }, behind);
        }
        let stalled = self.pmu.tally.add_turns(cpl, turns - singly);
        self.hasten_overflow(stalled);
    }

    /// [`Cpu::branch_done`] for an instruction that ran alone.
    #[inline(never)]
    pub(super) fn note_branch(&mut self, block: *const Block, first: u64) -> bool {
        self.branch_done(block, first)
    }

    /// The branch at the end of `block`, whose first instruction is at `first`, has just run. Returns whether it was taken.
    #[inline(always)]
    fn branch_done(&mut self, block: *const Block, first: u64) -> bool {
        // SAFETY: as in `execute_watched`.
        let block = unsafe { &*block };
        let kind = block.branch;
        let from = truncate(first.wrapping_add(block.last.into()), block.key.size);
        let next = truncate(first.wrapping_add(block.length.into()), block.key.size);
        let to = self.rip();
        let taken = to != next || kind.always_taken() || taken_in_place(self, block);
        if self.pmu.watched & watch::BRANCHES != 0 {
            let before = self.pmu.cpl;
            let mispredicted = self.retire(kind, before, from, next, to, taken);
            // What an INT instruction leads to has been recorded at the delivery.
            if taken && kind != Kind::SoftwareInterrupt {
                self.record(&Transfer { kind, from, to, mispredicted, before, after: self.cpl(), vector: 0 }, 0);
            }
        }
        taken
    }

    /// An event that interrupted the code at `from`, with privilege level `before`, is at its handler.
    #[cold]
    pub fn note_delivery(&mut self, kind: Kind, vector: u8, from: u64, before: u8) {
        let transfer = Transfer { kind, from, to: self.rip(), mispredicted: false, before, after: self.cpl(), vector };
        if kind != Kind::SoftwareInterrupt {
            self.retire(kind, before, from, from, transfer.to, true);
            self.hasten_overflow(1);
        }
        self.record(&transfer, 0);
    }

    /// Records a transfer that took place; `behind` instructions have retired since.
    #[inline(always)]
    fn record(&mut self, transfer: &Transfer, behind: u64) {
        if self.pmu.recording {
            let now = self.instructions().wrapping_sub(behind);
            self.pmu.record(transfer, now);
        }
        if self.pmu.log.is_some() {
            self.log(transfer);
        }
    }

    #[inline(never)]
    fn log(&mut self, transfer: &Transfer) {
        let cr3 = self.state.cr3;
        if self.pmu.log.as_mut().is_some_and(|log| log.record(transfer, cr3)) {
            self.signal.kick();
        }
    }

    /// Whether TF traps behind an instruction, of which `branched` tells whether it was a taken branch (SDM vol. 3, 18.4.3).
    pub(super) fn step_traps(&self, branched: bool) -> bool {
        branched || self.state.debugctl & debugctl::BTF == 0
    }

    // ---- registers, for the guest ---------------------------------------------------------------------------------------------------

    /// Reads an MSR of the PMU; #GP if there is none of this number.
    pub fn read_pmu(&mut self, index: u32) -> Exec<u64> {
        if let (registers::index::X2APIC_LVTPC, Some(entry)) = (index, self.pmu.virtual_lvtpc) {
            return Ok(entry);
        }
        self.sync_counters();
        self.pmu.read(index).map_err(|Refused| self.general_protection())
    }

    /// Writes one; #GP for a value that it does not take.
    pub fn write_pmu(&mut self, index: u32, value: u64) -> Exec {
        if let (registers::index::X2APIC_LVTPC, Some(entry)) = (index, &mut self.pmu.virtual_lvtpc) {
            *entry = value;
            return Ok(());
        }
        self.sync_counters();
        self.pmu.write(index, value).map_err(|Refused| self.general_protection())?;
        self.choose_watch();
        Ok(())
    }

    /// The counter that RDPMC asks for.
    pub fn read_counter(&mut self, index: u32) -> Exec<u64> {
        self.sync_counters();
        self.pmu.rdpmc(index).map_err(|Refused| self.general_protection())
    }
}

/// An instruction pointer of code of `size`.
#[inline(always)]
fn truncate(rip: u64, size: CodeSize) -> u64 {
    match size {
        CodeSize::Bits64 => rip,
        CodeSize::Bits32 => rip & 0xffff_ffff,
        CodeSize::Bits16 => rip & 0xffff,
    }
}
