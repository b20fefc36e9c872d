//! Host code that watches the branch at the end of its block: predictor, counters by kind, branch records (see [`crate::pmu`]).
//!
//! It does what the dispatcher of `cpu/watch.rs` does behind a block that the interpreter ran, for near branches between blocks that have
//! host code. Every other branch goes through the interpreter and that dispatcher.

use std::mem::offset_of;

use iced_x86::ConditionCode;
use iced_x86::Register::{R13, R13D, R14, R14D, R15, R15D, R15L, RBP};

use super::asm::{byte_ptr, dword_ptr, qword_ptr, Label, Memory};
use super::emit::{cpu_field, Emitter};
use super::native::PAGE;
use super::registers::BUDGET;
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::decode::cache::MAX_BLOCKS;
use crate::memory::PAGE_OFFSET;
use crate::pmu::branch::Kind;
use crate::pmu::lbr::{recent, Lbr, Recent, RECENT};
use crate::pmu::predictor::{self, Predictor};
use crate::pmu::tally::{outcome, Totals, MISPREDICTED};
use crate::pmu::{Pmu, Watching};

/// A branch that is watched.
#[derive(Clone, Copy)]
pub struct Branch {
    watching: Watching,
    kind: Kind,
    /// What a note of it says, but for the budget.
    note: i32,
    /// Its place in the predictor's table of directions, and in that of targets.
    direction: usize,
    target: usize,
}

impl Branch {
    /// The branch that ends `block`, if somebody watches it.
    pub fn of(block: &Block) -> Option<Self> {
        let from = (block.key.host & PAGE_OFFSET) + u64::from(block.last);
        let watched = block.key.watching != Watching::NONE && block.branch != Kind::None;
        watched.then_some(Branch {
            watching: block.key.watching,
            kind: block.branch,
            note: (block.number << recent::BUDGET_BITS) as i32,
            direction: predictor::place(from, predictor::DIRECTIONS),
            target: predictor::place(from, predictor::TARGETS),
        })
    }
}

/// Where a branch goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Where it always goes.
    Fixed,
    /// To the RIP in R15.
    Computed,
}

/// Whether a branch was mispredicted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mispredicted {
    No,
    Yes,
    /// R15 tells.
    Maybe,
}

/// A branch of which the predictor was not sure: what comes of it at the end of the code.
pub struct Doubt {
    label: Label,
    /// Where to go on.
    back: Label,
    branch: Branch,
    target: Target,
    taken: bool,
}

const PMU: usize = offset_of!(Cpu, pmu);
const PREDICTOR: usize = PMU + offset_of!(Pmu, predictor);
const RECORDS: usize = PMU + offset_of!(Pmu, lbr) + offset_of!(Lbr, recent);

/// Element R13 of the predictor's stack of return addresses, and its place.
const RETURNS: usize = PREDICTOR + offset_of!(Predictor, returns);
const TOP: usize = PREDICTOR + offset_of!(Predictor, top);

const STALL_SHIFT: u8 = MISPREDICTED.trailing_zeros() as u8;
const _: () = assert!(MISPREDICTED.is_power_of_two());
/// A note has room for the number of every block.
const _: () = assert!(MAX_BLOCKS <= 1 << (u32::BITS - recent::BUDGET_BITS));

/// A total of the branch's privilege level.
fn total(branch: Branch, offset: usize) -> Memory {
    cpu_field(PMU + offset_of!(Pmu, tally) + usize::from(branch.watching.is_user()) * size_of::<Totals>() + offset)
}

/// The predictor's counter for a conditional branch.
fn direction(branch: Branch) -> Memory {
    byte_ptr(RBP, (PREDICTOR + offset_of!(Predictor, directions) + branch.direction) as i32)
}

/// The predictor's target of an indirect branch.
fn last_target(branch: Branch) -> Memory {
    cpu_field(PREDICTOR + offset_of!(Predictor, targets) + 8 * branch.target)
}

impl Emitter<'_> {
    /// A call is about to go to its target, with the return address in R15. Clobbers R13 and the flags.
    pub fn note_call(&mut self, branch: Branch) {
        if branch.kind == Kind::ZeroCall {
            return;
        }
        let a = &mut *self.asm;
        a.mov(R13, cpu_field(TOP));
        a.add(R13D, 1);
        a.and(R13D, predictor::RETURNS as i32 - 1);
        a.mov(cpu_field(TOP), R13);
        a.mov(cpu_field(RETURNS).index(R13, 8), R15);
    }

    /// The branch is about to go to `target`. Clobbers R13, R14 and the flags, and a conditional one R15.
    pub fn note_branch(&mut self, branch: Branch, target: Target, taken: bool) {
        let back = self.predict(branch, taken).map(|label| {
            let back = self.asm.create_label();
            self.doubts.push(Doubt { label, back, branch, target, taken });
            back
        });
        self.tally(branch, taken);
        self.record(branch, target, taken, Mispredicted::No);
        back.into_iter().for_each(|back| self.asm.set_label(back));
    }

    /// Asks the predictor, and goes to the label that is returned unless it was right and has nothing to learn.
    fn predict(&mut self, branch: Branch, taken: bool) -> Option<Label> {
        let doubt = self.asm.create_label();
        let a = &mut *self.asm;
        match branch.kind {
            Kind::Conditional => a.cmp(direction(branch), if taken { predictor::STRONGLY_TAKEN.into() } else { 0 }),
            Kind::IndirectJump | Kind::IndirectCall => a.cmp(last_target(branch), R15),
            Kind::Return => {
                a.mov(R13, cpu_field(TOP));
                a.lea(R14, qword_ptr(R13, -1));
                a.and(R14D, predictor::RETURNS as i32 - 1);
                a.mov(cpu_field(TOP), R14);
                a.cmp(cpu_field(RETURNS).index(R13, 8), R15);
            }
            _ => return None,
        }
        a.jne(doubt);
        Some(doubt)
    }

    /// Writes the code for branches of which the predictor was not sure.
    pub(super) fn finish_doubts(&mut self) {
        for Doubt { label, back, branch, target, taken } in std::mem::take(&mut self.doubts) {
            self.asm.set_label(label);
            if branch.kind == Kind::Conditional {
                self.learn_direction(branch, taken);
                self.record(branch, target, taken, Mispredicted::Maybe);
            } else {
                self.learn_target(branch);
                self.record(branch, target, taken, Mispredicted::Yes);
            }
            self.asm.jmp(back);
        }
    }

    /// A counter that is not at its end moves there, and was wrong in its lower or upper half: R15 = 1 then, and 0 otherwise. Nothing here
    /// jumps, because the host's predictor would be no better than the guest's.
    fn learn_direction(&mut self, branch: Branch, taken: bool) {
        let a = &mut *self.asm;
        a.mov(R15D, 0);
        a.cmp(direction(branch), i32::from(predictor::NOT_TAKEN));
        if taken {
            a.setcc(ConditionCode::be, R15L);
            a.add(direction(branch), 1);
        } else {
            a.setcc(ConditionCode::a, R15L);
            a.sub(direction(branch), 1);
        }
        a.add(cpu_field(PMU + offset_of!(Pmu, mispredicted)), R15);
        a.mov(R14D, R15D);
        a.shl(R14D, STALL_SHIFT);
        a.sub(BUDGET, R14);
        if branch.watching.tallies() {
            const { assert!(outcome::MISPREDICTED == 2) };
            a.lea(R14D, qword_ptr(R15, 0).index(R15, 1));
            a.inc(transfers(branch, taken).index(R14, 8));
        }
    }

    /// An indirect branch or a return went elsewhere.
    fn learn_target(&mut self, branch: Branch) {
        let a = &mut *self.asm;
        if branch.kind != Kind::Return {
            a.mov(last_target(branch), R15);
        }
        a.inc(cpu_field(PMU + offset_of!(Pmu, mispredicted)));
        a.sub(BUDGET, MISPREDICTED as i32);
        if branch.watching.tallies() {
            let Memory { displacement, .. } = transfers(branch, true);
            a.inc(qword_ptr(RBP, displacement + 8 * outcome::MISPREDICTED as i32));
        }
    }

    fn tally(&mut self, branch: Branch, taken: bool) {
        if branch.watching.tallies() {
            self.asm.inc(transfers(branch, taken));
        }
    }

    /// [`Lbr::record`](crate::pmu::lbr::Lbr::record), as a note from which [`Lbr::settle`] makes a record of the stack.
    fn record(&mut self, branch: Branch, target: Target, taken: bool, mispredicted: Mispredicted) {
        if !taken || !branch.watching.records() {
            return;
        }
        let skip = self.asm.create_label();
        let a = &mut *self.asm;
        if branch.watching.filters() {
            let suppressed = PMU + offset_of!(Pmu, lbr) + offset_of!(Lbr, suppressed);
            a.test(dword_ptr(RBP, suppressed as i32), branch.kind.bit() as i32);
            a.jne(skip);
        }
        let count = cpu_field(RECORDS + offset_of!(Recent, count));
        a.mov(R13, count);
        a.add(R13, 1);
        a.mov(count, R13);
        a.and(R13D, RECENT as i32 - 1);
        let mut bits = if mispredicted == Mispredicted::Yes { recent::MISPREDICTED } else { 0 };
        if target == Target::Computed {
            bits |= recent::COMPUTED;
            a.mov(cpu_field(RECORDS + offset_of!(Recent, to)).index(R13, 8), R15);
        }
        a.mov(R14, cpu_field(PAGE));
        match mispredicted {
            Mispredicted::Maybe => {
                const { assert!(recent::MISPREDICTED == 1) };
                a.add(R14, R15);
            }
            _ if bits != 0 => a.lea(R14, qword_ptr(R14, bits as i32)),
            _ => {}
        }
        a.mov(cpu_field(RECORDS + offset_of!(Recent, page)).index(R13, 8), R14);
        a.lea(R14D, qword_ptr(BUDGET, branch.note));
        a.mov(dword_ptr(RBP, (RECORDS + offset_of!(Recent, note)) as i32).index(R13, 4), R14D);
        a.set_label(skip);
    }
}

/// How often branches of the kind were taken, or not, and predicted.
fn transfers(branch: Branch, taken: bool) -> Memory {
    let place = outcome::COUNT * branch.kind as usize + usize::from(taken) * outcome::TAKEN;
    total(branch, offset_of!(Totals, transfers) + 8 * place)
}
