//! Turns of a loop without a look at the TLB; see [`super::loops`].
//!
//! What follows the jump back looks up the page of each group of accesses, once, and finds out how many turns keep all groups in these
//! pages. So many run, as far as the budget goes; a turn that none of these can be is run as any other block.

use std::mem::offset_of;

use iced_x86::Register::{R13, R14, R15, R15D};
use iced_x86::{Code, ConditionCode, Instruction, Register};

use super::access::{load_slot, tags, ADDENDS};
use super::asm::{qword_ptr, Label};
use super::block::Translation;
use super::emit::{cpu_field, in_memory};
use super::exits::opposite;
use super::flags::Whereabouts;
use super::loops::{Group, Loop};
use super::native::{LOOP_PLACES, LOOP_REST, LOOP_TURNS, PAGE};
use super::registers::BUDGET;
use crate::cpu::Cpu;
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};
use crate::paging::AccessKind;

/// Quotients of what is less than a page are products with a number of so many bits behind the point.
const POINT: u8 = 24;

/// Turns of so many instructions at most are short: so many of them are run for one look at the budget.
const SHORT: usize = 8;
const TIMES: i32 = 4;

/// What less than a page is multiplied with to be divided by `stride`.
const fn reciprocal(stride: u64) -> i32 {
    (1u64 << POINT).div_ceil(stride) as i32
}

impl Translation<'_> {
    /// The jump `insn` at the end of `found`, a block of so many instructions, and the turns for who takes it. True, as nothing behind it is
    /// reached.
    pub(super) fn close(&mut self, insn: &Instruction, found: &Loop, instructions: i32) -> bool {
        if self.out.flags.recipe.is_none() {
            self.out.save_flags();
        }
        self.out.need_flags();
        let [turns, none, over] = [(); 3].map(|()| self.out.asm.create_label());
        self.out.asm.jcc(insn.condition_code(), turns);
        self.out.exit(insn.next_ip() as i64, false);

        let at_end = Whereabouts { host: false, saved: false, recipe: Some(found.recipe) };
        self.out.asm.set_label(turns);
        self.find_pages(found, none);
        self.limit_budget(found, instructions);
        self.take_places(found);

        self.run_turns(insn.condition_code(), found, instructions, over);
        self.give_places(found);
        self.out.asm.mov(R13, cpu_field(LOOP_REST));
        self.out.asm.lea(BUDGET, qword_ptr(BUDGET, 0).index(R13, 1));
        self.out.flags = Whereabouts { host: true, ..at_end };
        self.out.exit(insn.next_ip() as i64, false);

        self.out.asm.set_label(over);
        self.give_places(found);
        self.out.asm.add(BUDGET, instructions);
        self.out.asm.add(BUDGET, cpu_field(LOOP_REST));
        self.out.asm.set_label(none);
        self.out.flags = at_end;
        self.out.save_flags();
        self.out.asm.jmp(self.out.start);
        true
    }

    /// Runs turns as long as `condition` holds behind them, or goes to `over` where the budget does not cover another one: several at once
    /// if they are short, and one by one when so many are not left.
    fn run_turns(&mut self, condition: ConditionCode, found: &Loop, instructions: i32, over: Label) {
        let [many, few, one, left] = [(); 4].map(|()| self.out.asm.create_label());
        let times = if found.body.len() <= SHORT { TIMES } else { 1 };
        if times > 1 {
            self.out.asm.set_label(many);
            self.out.asm.sub(BUDGET, times * instructions);
            self.out.asm.jcc(ConditionCode::s, few);
            let early: Vec<Label> = (1..times).map(|_| self.out.asm.create_label()).collect();
            for early in &early {
                self.turn(found);
                self.out.asm.jcc(opposite(condition), *early);
            }
            self.turn(found);
            self.out.asm.jcc(condition, many);
            self.out.asm.jmp(left);
            for (early, rest) in early.into_iter().zip((1..times).rev()) {
                self.out.asm.set_label(early);
                self.out.asm.lea(BUDGET, qword_ptr(BUDGET, rest * instructions));
                self.out.asm.jmp(left);
            }
            self.out.asm.set_label(few);
            self.out.asm.add(BUDGET, times * instructions);
        }
        self.out.asm.set_label(one);
        self.out.asm.sub(BUDGET, instructions);
        self.out.asm.jcc(ConditionCode::s, over);
        self.turn(found);
        self.out.asm.jcc(condition, one);
        self.out.asm.set_label(left);
    }

    fn turn(&mut self, found: &Loop) {
        found.body.iter().for_each(|(insn, group)| self.out.add(found.placed(insn, *group)));
    }

    /// Keeps for each group what its place will hold, and the number of turns less one; to `none` if a group has no page.
    fn find_pages(&mut self, found: &Loop, none: Label) {
        let mut limited = false;
        for (n, group) in found.groups.iter().enumerate() {
            self.find_page(group, none);
            self.add_fixed(group);
            self.out.asm.mov(cpu_field(LOOP_PLACES + 8 * n), R13);
            if group.stride != 0 {
                self.out.add_made(Instruction::with3(Code::Imul_r64_rm64_imm32, R15, R15, reciprocal(group.stride.unsigned_abs())));
                self.out.asm.shr(R15, POINT);
                if limited {
                    let fewer = self.out.asm.create_label();
                    self.out.asm.cmp(R15, cpu_field(LOOP_TURNS));
                    self.out.asm.jcc(ConditionCode::ae, fewer);
                    self.out.asm.mov(cpu_field(LOOP_TURNS), R15);
                    self.out.asm.set_label(fewer);
                } else {
                    self.out.asm.mov(cpu_field(LOOP_TURNS), R15);
                }
                limited = true;
            }
        }
    }

    /// R13 = the addend of the page of `group`, and R15 = how far it can move there; to `none` if there is no such page.
    fn find_page(&mut self, group: &Group, none: Label) {
        let span = (group.high - group.low) as i32;
        let (base, index) = self.parts(group);
        let in_page = if group.base == Register::RIP { self.out.offset as i32 } else { 0 };
        let has_bextr = self.out.has_bextr;
        let a = &mut *self.out.asm;
        a.lea(R14, qword_ptr(base, group.low as i32 + in_page).index(index, group.scale));
        if let Some((bytes, displacement)) = group.alignment {
            a.lea(R15, qword_ptr(R14, (displacement - group.low) as i32));
            a.test(R15D, bytes as i32 - 1);
            a.jne(none);
        }
        load_slot(a, R13, R14, R15, has_bextr);
        a.mov(R15, cpu_field(offset_of!(Cpu, active_table)));
        a.lea(R13, qword_ptr(R15, 0).index(R13, 8));
        a.mov(R15, R14);
        a.and(R15, !(PAGE_OFFSET as i32));
        for kind in [(group.reads, AccessKind::Read), (group.writes, AccessKind::Write)].iter().filter(|kind| kind.0) {
            a.cmp(R15, qword_ptr(R13, tags(kind.1)));
            a.jne(none);
        }
        a.mov(R13, qword_ptr(R13, ADDENDS));
        a.sub(R15, R14);
        a.add(R15, PAGE_SIZE as i32 - span);
        a.jcc(ConditionCode::s, none);
        if group.stride < 0 {
            a.mov(R15, R14);
            a.and(R15, PAGE_OFFSET as i32);
        }
    }

    /// Registers with base and index of `group`, which may be R14 and R15.
    fn parts(&mut self, group: &Group) -> (Register, Register) {
        let base = match group.base {
            Register::None => Register::None,
            Register::RIP => {
                self.out.asm.mov(R14, cpu_field(PAGE));
                R14
            }
            guest => self.get(guest, R14),
        };
        (base, if group.index == Register::None { Register::None } else { self.get(group.index, R15) })
    }

    /// Adds to R13 what is the same in all turns in the addresses of `group`, but for displacements. Clobbers R14.
    fn add_fixed(&mut self, group: &Group) {
        if group.base == Register::RIP {
            self.out.asm.mov(R14, cpu_field(PAGE));
            self.out.asm.lea(R13, qword_ptr(R13, self.out.offset as i32).index(R14, 1));
        } else if group.base != Register::None && group.fixed_base {
            let base = self.get(group.base, R14);
            self.out.asm.add(R13, base);
        }
        if group.index != Register::None && group.fixed_index {
            let index = self.get(group.index, R14);
            self.out.asm.lea(R13, qword_ptr(R13, 0).index(index, group.scale));
        }
    }

    /// Lets the budget end where the turns in these pages do, and keeps the rest. Clobbers R13 to R15.
    fn limit_budget(&mut self, found: &Loop, instructions: i32) {
        let a = &mut *self.out.asm;
        a.mov(R13, 0);
        if found.groups.iter().any(|group| group.stride != 0) {
            let all = a.create_label();
            a.mov(R15, cpu_field(LOOP_TURNS));
            a.lea(R15, qword_ptr(R15, 1));
            a.must_add(Instruction::with3(Code::Imul_r64_rm64_imm32, R15, R15, instructions));
            a.cmp(BUDGET, R15);
            a.jcc(ConditionCode::le, all);
            a.mov(R13, BUDGET);
            a.sub(R13, R15);
            a.mov(BUDGET, R15);
            a.set_label(all);
        }
        a.mov(cpu_field(LOOP_REST), R13);
    }

    /// Puts into host registers what they have in the loop alone.
    fn take_places(&mut self, found: &Loop) {
        let a = &mut *self.out.asm;
        found.lent.iter().for_each(|(guest, place)| a.mov(in_memory(*guest), *place));
        found.residents.iter().for_each(|(guest, place)| a.mov(*place, in_memory(*guest)));
        found.groups.iter().enumerate().for_each(|(n, group)| a.mov(group.place, cpu_field(LOOP_PLACES + 8 * n)));
    }

    /// Ends what [`Translation::take_places`] began. Changes no flags.
    fn give_places(&mut self, found: &Loop) {
        let a = &mut *self.out.asm;
        found.residents.iter().for_each(|(guest, place)| a.mov(in_memory(*guest), *place));
        found.lent.iter().for_each(|(guest, place)| a.mov(*place, in_memory(*guest)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_of_less_than_a_page_are_exact() {
        for stride in 1..=PAGE_SIZE / 4 {
            assert!((0..PAGE_SIZE).all(|room| (room * reciprocal(stride) as u64) >> POINT == room / stride), "{stride}");
        }
    }
}
