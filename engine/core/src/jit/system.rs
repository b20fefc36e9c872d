//! Instructions of a kernel's every system call and interrupt: SWAPGS, STAC, CLAC, and PUSH from memory, where `pt_regs` are built
//! (SDM vol. 2).

use std::mem::offset_of;

use iced_x86::Instruction;
use iced_x86::Register::{R13, R14, R15, RBP};

use super::asm::{byte_ptr, qword_ptr, Label};
use super::block::{Place, Translation};
use super::emit::cpu_field;
use super::native::STAMP;
use crate::cpu::Cpu;
use crate::paging::tlb;
use crate::paging::AccessKind;
use crate::state::{rflags, seg, Segment, State};

impl Translation<'_> {
    /// Goes to `miss` unless the code runs at CPL 0.
    fn require_kernel(&mut self, miss: Label) {
        self.out.asm.cmp(byte_ptr(RBP, offset_of!(Cpu, cpl) as i32), 0);
        self.out.asm.jne(miss);
    }

    pub(super) fn swap_gs(&mut self, place: Place) {
        const KERNEL: usize = offset_of!(Cpu, state) + offset_of!(State, kernel_gs_base);
        const HIDDEN: usize =
            offset_of!(Cpu, state) + offset_of!(State, segments) + seg::GS * size_of::<Segment>() + offset_of!(Segment, base);
        const USED: usize = offset_of!(Cpu, bases) + seg::GS * size_of::<u64>();
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.require_kernel(miss);
        let a = &mut *self.out.asm;
        a.mov(R13, cpu_field(KERNEL));
        a.mov(R14, cpu_field(HIDDEN));
        a.mov(cpu_field(KERNEL), R14);
        a.mov(cpu_field(HIDDEN), R13);
        a.mov(cpu_field(USED), R13);
        self.out.rejoin();
    }

    /// STAC, or CLAC without `allow`.
    pub(super) fn allow_user_pages(&mut self, allow: bool, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.require_kernel(miss);
        let flags = cpu_field(offset_of!(Cpu, rflags));
        let table = offset_of!(Cpu, kernel_tables) + usize::from(allow) * size_of::<*const tlb::Entries>();
        let a = &mut *self.out.asm;
        if allow {
            a.or(flags, rflags::AC as i32);
        } else {
            a.and(flags, !(rflags::AC as i32));
        }
        a.mov(R13, cpu_field(table));
        a.mov(cpu_field(offset_of!(Cpu, active_table)), R13);
        a.mov(R13, qword_ptr(R13, offset_of!(tlb::Entries, epoch) as i32));
        a.mov(cpu_field(STAMP), R13);
        self.out.rejoin();
    }

    /// PUSH of 64 bits from memory.
    pub(super) fn push_memory(&mut self, insn: &Instruction, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let address = self.operand_address(insn);
        let operand = self.out.access(address, 8, AccessKind::Read, miss);
        self.out.asm.mov(R15, operand);
        self.out.keep_rip();
        let slot = self.stack_slot(-8, AccessKind::Write, miss);
        self.out.take_rip();
        self.out.asm.mov(slot, R15);
        self.move_stack(-8);
        self.out.rejoin();
    }
}
