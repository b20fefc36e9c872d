//! Host code that watches the branch at the end of its block: predictor, counters by kind, branch records (see [`crate::pmu`]).
//!
//! It does what the dispatcher of `cpu/watch.rs` does behind a block that the interpreter ran, for near branches between blocks that have
//! host code. Every other branch goes through the interpreter and that dispatcher.

use std::mem::offset_of;

use iced_x86::ConditionCode;
use iced_x86::Register::{R13, R13D, R14, R15, R15D, RBP};

use super::asm::{byte_ptr, dword_ptr, qword_ptr, Label, Memory};
use super::emit::{cpu_field, Emitter};
use super::registers::{resized, BUDGET};
use crate::cpu::Cpu;
use crate::decode::block::Block;
use crate::memory::PAGE_OFFSET;
use crate::pmu::branch::Kind;
use crate::pmu::lbr::{self, Lbr, Recent};
use crate::pmu::predictor::{self, Predictor};
use crate::pmu::tally::{outcome, Totals, MISPREDICTED};
use crate::pmu::{Pmu, Watching};

/// A branch that is watched.
#[derive(Clone, Copy)]
pub struct Branch {
    watching: Watching,
    kind: Kind,
    /// Distance of its first byte from the block's.
    distance: i64,
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
            distance: block.last.into(),
            direction: predictor::place(from, predictor::DIRECTIONS),
            target: predictor::place(from, predictor::TARGETS),
        })
    }
}

/// A field of the PMU, whose address is in R14.
fn field(offset: usize) -> Memory {
    qword_ptr(R14, offset as i32)
}

fn lbr_field(offset: usize) -> Memory {
    field(offset_of!(Pmu, lbr) + offset)
}

/// Element R13 of a row of recent records.
fn row(offset: usize) -> Memory {
    lbr_field(offset_of!(Lbr, recent) + offset).index(R13, 8)
}

/// A total of the branch's privilege level.
fn total(branch: Branch, offset: usize) -> Memory {
    field(offset_of!(Pmu, tally) + usize::from(branch.watching.is_user()) * size_of::<Totals>() + offset)
}

impl Emitter<'_> {
    /// A call is about to go to its target, with the return address in R15. Clobbers R13, R14 and the flags.
    pub fn note_call(&mut self, branch: Branch) {
        if branch.kind == Kind::ZeroCall {
            return;
        }
        let top = field(offset_of!(Pmu, predictor) + offset_of!(Predictor, top));
        let a = &mut *self.asm;
        a.mov(R14, cpu_field(offset_of!(Cpu, pmu)));
        a.mov(R13, top);
        a.add(R13D, 1);
        a.and(R13D, predictor::RETURNS as i32 - 1);
        a.mov(top, R13);
        a.mov(field(offset_of!(Pmu, predictor) + offset_of!(Predictor, returns)).index(R13, 8), R15);
    }

    /// The branch is about to go to the RIP in R15, which stays there. Clobbers R13, R14 and the flags.
    pub fn note_branch(&mut self, branch: Branch, taken: bool) {
        let (right, done) = (self.asm.create_label(), self.asm.create_label());
        self.asm.mov(R14, cpu_field(offset_of!(Cpu, pmu)));
        if self.predict(branch, taken, right) {
            self.stall(branch);
            self.tally(branch, taken, true);
            self.record(branch, taken, true);
            self.asm.jmp(done);
            self.asm.set_label(right);
        }
        self.tally(branch, taken, false);
        self.record(branch, taken, false);
        self.asm.set_label(done);
    }

    /// Lets the predictor learn, and goes on at `right` if it was. False, and nothing else, if it always is.
    fn predict(&mut self, branch: Branch, taken: bool, right: Label) -> bool {
        let predictor = offset_of!(Pmu, predictor);
        let a = &mut *self.asm;
        match branch.kind {
            Kind::Conditional => self.predict_direction(branch, taken, right),
            Kind::IndirectJump | Kind::IndirectCall => {
                let last = field(predictor + offset_of!(Predictor, targets) + 8 * branch.target);
                a.cmp(last, R15);
                a.je(right);
                a.mov(last, R15);
            }
            Kind::Return => {
                let top = field(predictor + offset_of!(Predictor, top));
                a.mov(R13, top);
                a.mov(R13, field(predictor + offset_of!(Predictor, returns)).index(R13, 8));
                a.sub(top, 1);
                a.and(top, predictor::RETURNS as i32 - 1);
                a.cmp(R13, R15);
                a.je(right);
            }
            _ => return false,
        }
        true
    }

    fn predict_direction(&mut self, branch: Branch, taken: bool, right: Label) {
        let counter = byte_ptr(R14, (offset_of!(Pmu, predictor) + offset_of!(Predictor, directions) + branch.direction) as i32);
        let a = &mut *self.asm;
        a.cmp(counter, if taken { predictor::STRONGLY_TAKEN.into() } else { 0 });
        a.je(right);
        a.movzx(R13D, counter);
        if taken {
            a.inc(counter);
        } else {
            a.sub(counter, 1);
        }
        a.cmp(R13D, i32::from(predictor::NOT_TAKEN));
        a.jcc(if taken { ConditionCode::a } else { ConditionCode::be }, right);
    }

    /// A mispredicted branch makes the core stall, which brings an overflow nearer.
    fn stall(&mut self, branch: Branch) {
        let cycles = MISPREDICTED as i32;
        let above = self.asm.create_label();
        let a = &mut *self.asm;
        a.add(total(branch, offset_of!(Totals, stalled)), cycles);
        a.inc(total(branch, offset_of!(Totals, stalls)));
        a.sub(field(offset_of!(Pmu, check_at)), cycles);
        a.jcc(ConditionCode::ae, above);
        a.mov(field(offset_of!(Pmu, check_at)), 0);
        a.set_label(above);
        a.sub(BUDGET, cycles);
        a.sub(cpu_field(offset_of!(Cpu, budget_start)), cycles);
    }

    fn tally(&mut self, branch: Branch, taken: bool, mispredicted: bool) {
        if branch.watching.tallies() {
            let outcome = usize::from(taken) * outcome::TAKEN + usize::from(mispredicted) * outcome::MISPREDICTED;
            let place = outcome::COUNT * branch.kind as usize + outcome;
            self.asm.inc(total(branch, offset_of!(Totals, transfers) + 8 * place));
        }
    }

    /// [`Lbr::record`], in the row of recent records, from which [`Lbr::settle`] makes those of the stack.
    fn record(&mut self, branch: Branch, taken: bool, mispredicted: bool) {
        if !taken || !branch.watching.records() {
            return;
        }
        let skip = self.asm.create_label();
        let count = lbr_field(offset_of!(Lbr, recent) + offset_of!(Recent, count));
        let a = &mut *self.asm;
        if branch.watching.filters() {
            a.mov(R13D, dword_ptr(R14, (offset_of!(Pmu, lbr) + offset_of!(Lbr, suppressed)) as i32));
            a.test(R13D, branch.kind.bit() as i32);
            a.jne(skip);
        }
        a.mov(R13, count);
        a.inc(count);
        a.and(R13D, lbr::RECENT as i32 - 1);
        a.mov(row(offset_of!(Recent, to)), R15);
        self.rip_at(branch.distance);
        let a = &mut *self.asm;
        a.mov(row(offset_of!(Recent, from)), R15);
        a.mov(R15D, resized(BUDGET, R15D));
        a.mov(row(offset_of!(Recent, info)), R15);
        if mispredicted {
            let flag = offset_of!(Pmu, lbr) + offset_of!(Lbr, recent) + offset_of!(Recent, info) + 4;
            a.mov(dword_ptr(R14, flag as i32).index(R13, 8), (lbr::MISPREDICTED >> 32) as i32);
        }
        a.mov(R15, row(offset_of!(Recent, to)));
        a.set_label(skip);
    }
}
