//! The ways out of a block: jumps, calls and returns.

use iced_x86::Register::{R13, R15};
use iced_x86::{ConditionCode, Instruction, OpKind, Register};

use super::asm::{qword_ptr, Label};
use super::block::{Place, Translation};
use super::exits::opposite;
use super::watched::Target;
use crate::paging::AccessKind;

impl Translation<'_> {
    /// The branch goes to `distance` bytes behind the block's first byte.
    pub(super) fn branch_to(&mut self, distance: i64, taken: bool) {
        if let Some(branch) = self.branch {
            self.out.clobber_flags(true);
            self.out.note_branch(branch, Target::Fixed, taken);
        }
        self.out.exit(distance, false);
    }

    /// The branch goes to RIP R15.
    pub(super) fn branch_to_r15(&mut self) {
        if let Some(branch) = self.branch {
            self.out.note_branch(branch, Target::Computed, true);
        }
        self.out.go_to_r15();
    }

    pub(super) fn jump_relative(&mut self, insn: &Instruction) {
        self.branch_to(insn.near_branch_target() as i64, true);
    }

    pub(super) fn conditional(&mut self, insn: &Instruction) {
        if self.out.flags.recipe.is_none() {
            self.out.save_flags();
        }
        self.out.need_flags();
        let (condition, target) = (insn.condition_code(), insn.near_branch_target() as i64);
        if self.branch.is_some() || !self.out.is_near(target) {
            let on = self.out.asm.create_label();
            self.out.asm.jcc(opposite(condition), on);
            let flags = self.out.flags;
            self.branch_to(target, true);
            self.out.flags = flags;
            self.out.asm.set_label(on);
        } else {
            self.out.exit_near_if(condition, target);
        }
        self.branch_to(insn.next_ip() as i64, false);
    }

    /// R15 = the target of an indirect branch.
    fn target(&mut self, insn: &Instruction, miss: Label) {
        if insn.op0_kind() == OpKind::Register {
            let register = self.get(insn.op0_register(), Register::R15);
            self.out.asm.mov(R15, register);
        } else {
            let address = self.operand_address(insn);
            let slot = self.out.access(address, 8, AccessKind::Read, miss);
            self.out.asm.mov(R15, slot);
        }
        self.require_canonical(miss);
    }

    /// A branch to an address that none is faults before it is taken, which is the interpreter's: so is, with five levels of tables, one
    /// of more than 48 bits.
    pub(super) fn require_canonical(&mut self, miss: Label) {
        const SIGN: u8 = 47;
        let a = &mut *self.out.asm;
        a.mov(R13, R15);
        a.sar(R13, SIGN);
        a.lea(R13, qword_ptr(R13, 1));
        a.cmp(R13, 1);
        a.jcc(ConditionCode::a, miss);
    }

    pub(super) fn jump_indirect(&mut self, insn: &Instruction, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        self.target(insn, miss);
        self.branch_to_r15();
    }

    pub(super) fn call_relative(&mut self, insn: &Instruction, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        self.push_return(insn, miss);
        let (target, back) = (insn.near_branch_target() as i64, insn.next_ip() as i64);
        if self.out.is_near(back) {
            if let Some(branch) = self.branch {
                self.out.note_branch(branch, Target::Fixed, true);
            }
            self.out.call(target, back);
        } else {
            self.branch_to(target, true);
        }
    }

    pub(super) fn call_indirect(&mut self, insn: &Instruction, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        self.target(insn, miss);
        // A register still has the target behind the push.
        let register = Some(insn.op0_register()).filter(|named| insn.op0_kind() == OpKind::Register && *named != Register::RSP);
        if register.is_none() {
            self.out.keep_rip();
        }
        self.push_return(insn, miss);
        let back = insn.next_ip() as i64;
        if self.out.is_near(back) {
            if let Some(branch) = self.branch {
                self.target_again(register);
                self.out.note_branch(branch, Target::Computed, true);
                self.out.rip_at(R15, back);
            }
            self.out.push_call();
            self.target_again(register);
            self.out.call_r15(back);
        } else {
            self.target_again(register);
            self.branch_to_r15();
        }
    }

    /// R15 = the target of a call, which is in `register` or was kept.
    fn target_again(&mut self, register: Option<Register>) {
        match register.map(|register| self.get(register, R15)) {
            Some(R15) => {}
            Some(value) => self.out.asm.mov(R15, value),
            None => self.out.take_rip(),
        }
    }

    fn push_return(&mut self, insn: &Instruction, miss: Label) {
        let slot = self.stack_slot(-8, AccessKind::Write, miss);
        self.out.rip_at(R15, insn.next_ip() as i64);
        self.out.asm.mov(slot, R15);
        self.move_stack(-8);
        if let Some(branch) = self.branch {
            self.out.note_call(branch);
        }
    }

    pub(super) fn ret(&mut self, insn: &Instruction, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        let slot = self.stack_slot(0, AccessKind::Read, miss);
        self.out.asm.mov(R15, slot);
        let released = 8 + if insn.op_count() > 0 { i32::from(insn.immediate16()) } else { 0 };
        let other = self.out.asm.create_label();
        self.out.expect_call(other);
        if let Some(branch) = self.branch {
            self.out.note_branch(branch, Target::Computed, true);
        }
        self.out.return_to_call(released);
        self.out.asm.set_label(other);
        self.require_canonical(miss);
        self.move_stack(released);
        self.out.forget_calls();
        self.branch_to_r15();
    }
}
