//! Host code that watches the branch at the end of its block: predictor, counters by kind, branch records (see [`crate::pmu`]).
//!
//! It does what the dispatcher of `cpu/watch.rs` does behind a block that the interpreter ran, for near branches between blocks that have
//! host code. Every other branch goes through the interpreter and that dispatcher.

use std::mem::offset_of;

use iced_x86::ConditionCode;
use iced_x86::Register::{R13, R13D, R14, R14D, R15, RBP};

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

/// Where a branch goes.
#[derive(Clone, Copy)]
pub enum Target {
    /// So many bytes behind the block's first byte.
    Distance(i64),
    /// To the RIP in R15.
    Computed,
}

const PMU: usize = offset_of!(Cpu, pmu);
const PREDICTOR: usize = PMU + offset_of!(Pmu, predictor);
const LBR: usize = PMU + offset_of!(Pmu, lbr);
const RECENT: usize = LBR + offset_of!(Lbr, recent);

/// Element R13 of the predictor's stack of return addresses, and its place.
const RETURNS: usize = PREDICTOR + offset_of!(Predictor, returns);
const TOP: usize = PREDICTOR + offset_of!(Predictor, top);

/// A field of the PMU.
fn field(offset: usize) -> Memory {
    cpu_field(PMU + offset)
}

/// Element R13 of a row of recent records.
fn row(offset: usize) -> Memory {
    cpu_field(RECENT + offset).index(R13, 8)
}

/// A total of the branch's privilege level.
fn total(branch: Branch, offset: usize) -> Memory {
    field(offset_of!(Pmu, tally) + usize::from(branch.watching.is_user()) * size_of::<Totals>() + offset)
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

    /// The branch is about to go to `target`. Clobbers R13, R14 and the flags.
    pub fn note_branch(&mut self, branch: Branch, target: Target, taken: bool) {
        let (right, done) = (self.asm.create_label(), self.asm.create_label());
        if self.predict(branch, taken, right) {
            self.stall(branch);
            self.tally(branch, taken, true);
            self.record(branch, target, taken, true);
            self.asm.jmp(done);
            self.asm.set_label(right);
        }
        self.tally(branch, taken, false);
        self.record(branch, target, taken, false);
        self.asm.set_label(done);
    }

    /// Lets the predictor learn, and goes on at `right` if it was. False, and nothing else, if it always is.
    fn predict(&mut self, branch: Branch, taken: bool, right: Label) -> bool {
        let a = &mut *self.asm;
        match branch.kind {
            Kind::Conditional => self.predict_direction(branch, taken, right),
            Kind::IndirectJump | Kind::IndirectCall => {
                let last = cpu_field(PREDICTOR + offset_of!(Predictor, targets) + 8 * branch.target);
                a.cmp(last, R15);
                a.je(right);
                a.mov(last, R15);
            }
            Kind::Return => {
                a.mov(R13, cpu_field(TOP));
                a.lea(R14, qword_ptr(R13, -1));
                a.and(R14D, predictor::RETURNS as i32 - 1);
                a.mov(cpu_field(TOP), R14);
                a.cmp(cpu_field(RETURNS).index(R13, 8), R15);
                a.je(right);
            }
            _ => return false,
        }
        true
    }

    fn predict_direction(&mut self, branch: Branch, taken: bool, right: Label) {
        let counter = byte_ptr(RBP, (PREDICTOR + offset_of!(Predictor, directions) + branch.direction) as i32);
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
    fn record(&mut self, branch: Branch, target: Target, taken: bool, mispredicted: bool) {
        if !taken || !branch.watching.records() {
            return;
        }
        let skip = self.asm.create_label();
        let count = cpu_field(RECENT + offset_of!(Recent, count));
        let a = &mut *self.asm;
        if branch.watching.filters() {
            a.mov(R13D, dword_ptr(RBP, (LBR + offset_of!(Lbr, suppressed)) as i32));
            a.test(R13D, branch.kind.bit() as i32);
            a.jne(skip);
        }
        a.mov(R13, count);
        a.inc(count);
        a.and(R13D, lbr::RECENT as i32 - 1);
        let to = row(offset_of!(Recent, to));
        match target {
            Target::Computed => self.asm.mov(to, R15),
            Target::Distance(distance) => {
                self.rip_at(R14, distance);
                self.asm.mov(to, R14);
            }
        }
        match target {
            Target::Distance(distance) if i32::try_from(branch.distance - distance).is_ok() => {
                self.asm.lea(R14, qword_ptr(R14, (branch.distance - distance) as i32));
            }
            _ => self.rip_at(R14, branch.distance),
        }
        let a = &mut *self.asm;
        a.mov(row(offset_of!(Recent, from)), R14);
        a.mov(R14D, resized(BUDGET, R14D));
        a.mov(row(offset_of!(Recent, info)), R14);
        if mispredicted {
            let flag = RECENT + offset_of!(Recent, info) + 4;
            a.mov(dword_ptr(RBP, flag as i32).index(R13, 8), (lbr::MISPREDICTED >> 32) as i32);
        }
        a.set_label(skip);
    }
}
