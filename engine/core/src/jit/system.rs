//! Instructions of a kernel's every system call and interrupt: SWAPGS, STAC, CLAC, STI, reads of control and segment registers, PKRU and
//! the time stamp counter, and PUSH from memory, where `pt_regs` are built (SDM vol. 2).

use std::mem::offset_of;

use iced_x86::Register::{self, EAX, ECX, R13, R13D, R14, R15, RAX, RBP, RDX};
use iced_x86::{Code, Instruction};

use super::asm::{byte_ptr, dword_ptr, qword_ptr, word_ptr, Label, Memory};
use super::block::{Place, Translation};
use super::emit::cpu_field;
use super::native::STAMP;
use crate::cpu::clock::{self, Clock};
use crate::cpu::Cpu;
use crate::paging::tlb;
use crate::paging::AccessKind;
use crate::state::{cr4, rflags, seg, Fpu, Segment, State};
use crate::virt::control::{intercept, Control};

/// Offset of a field of the architectural state.
macro_rules! state {
    ($field:ident) => {
        offset_of!(Cpu, state) + offset_of!(State, $field)
    };
}
pub(super) use state;

/// Offset of a field of segment register `number`.
pub(super) const fn segment(number: usize, field: usize) -> usize {
    state!(segments) + number * size_of::<Segment>() + field
}

/// A field of the clock.
fn clock(offset: usize) -> Memory {
    cpu_field(offset_of!(Cpu, clock) + offset)
}

/// Number of the control register that MOV reads without effects.
pub fn control_register(insn: &Instruction) -> Option<usize> {
    match (insn.code(), insn.op1_register()) {
        (Code::Mov_r64_cr, Register::CR2) => Some(2),
        (Code::Mov_r64_cr, Register::CR3) => Some(3),
        _ => None,
    }
}

impl Translation<'_> {
    /// Goes to `miss` unless the code runs at CPL 0.
    pub(super) fn require_kernel(&mut self, miss: Label) {
        self.out.asm.cmp(byte_ptr(RBP, offset_of!(Cpu, cpl) as i32), 0);
        self.out.asm.jne(miss);
    }

    pub(super) fn swap_gs(&mut self, place: Place) {
        const KERNEL: usize = state!(kernel_gs_base);
        const HIDDEN: usize = segment(seg::GS, offset_of!(Segment, base));
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

    /// STI at CPL 0; its shadow is over a NOP (see `exec::fast`), unless it is the block's last instruction.
    pub(super) fn enable_interrupts(&mut self, place: Place) {
        if self.out.is_last(place.index) {
            return self.out.interpret(place.index);
        }
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.require_kernel(miss);
        self.out.asm.or(cpu_field(offset_of!(Cpu, rflags)), rflags::IF as i32);
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

    // ---- reads of registers -----------------------------------------------------------------------------------------------------------

    /// MOV from CR2 and CR3, which the hypervisor does not want to see.
    pub(super) fn read_control(&mut self, insn: &Instruction, number: usize, place: Place) {
        const INTERCEPTED: usize = offset_of!(Cpu, control) + offset_of!(Control, cr_read);
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.require_kernel(miss);
        let a = &mut *self.out.asm;
        a.movzx(R13D, word_ptr(RBP, INTERCEPTED as i32));
        a.test(R13D, 1 << number);
        a.jne(miss);
        a.mov(R13, cpu_field(if number == 2 { state!(cr2) } else { state!(cr3) }));
        self.set(insn.op0_register(), R13);
        self.out.rejoin();
    }

    /// MOV from a segment register to at least 32 bits.
    pub(super) fn read_segment(&mut self, insn: &Instruction) {
        let number = insn.op1_register().number();
        self.out.asm.movzx(R13D, word_ptr(RBP, segment(number, offset_of!(Segment, selector)) as i32));
        self.set(insn.op0_register().full_register(), R13);
    }

    /// RDPKRU.
    pub(super) fn read_keys(&mut self, place: Place) {
        const PKRU: usize = state!(fpu) + offset_of!(Fpu, pkru);
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let a = &mut *self.out.asm;
        a.test(dword_ptr(RBP, state!(cr4) as i32), cr4::PKE as i32);
        a.je(miss);
        a.test(ECX, ECX);
        a.jne(miss);
        a.mov(EAX, dword_ptr(RBP, PKRU as i32));
        a.mov(RDX, 0);
        self.out.rejoin();
    }

    /// RDTSC, and RDTSCP with `aux`, of a TSC that is the host's, scaled and moved.
    pub(super) fn read_time(&mut self, aux: bool, place: Place) {
        const INTERCEPTS: usize = offset_of!(Cpu, control) + offset_of!(Control, intercepts);
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let plain = self.out.asm.create_label();
        let a = &mut *self.out.asm;
        a.test(dword_ptr(RBP, INTERCEPTS as i32), 1 << intercept::RDTSC);
        a.jne(miss);
        a.test(dword_ptr(RBP, state!(cr4) as i32), cr4::TSD as i32);
        a.jne(miss);
        a.cmp(clock(offset_of!(Clock, rate)), 0);
        a.jne(miss);
        a.must_add(Ok(Instruction::with(Code::Rdtsc)));
        a.shl(RDX, 32);
        a.or(RAX, RDX);
        a.mov(R13, clock(offset_of!(Clock, multiplier)));
        a.test(R13, R13);
        a.je(plain);
        a.mov(R14, clock::UNITY);
        a.cmp(R13, R14);
        a.je(plain);
        a.must_add(Instruction::with1(Code::Mul_rm64, R13));
        a.must_add(Instruction::with3(Code::Shrd_rm64_r64_imm8, RAX, RDX, clock::UNITY.trailing_zeros()));
        a.set_label(plain);
        a.add(RAX, clock(offset_of!(Clock, offset)));
        a.mov(RDX, RAX);
        a.shr(RDX, 32);
        a.mov(EAX, EAX);
        if aux {
            a.mov(ECX, dword_ptr(RBP, state!(tsc_aux) as i32));
        }
        self.out.rejoin();
    }
}
