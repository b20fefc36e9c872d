//! Integer instructions that are more than the same operation on other operands: division, shifts by CL, rotates, bit scans, and those
//! that work on RFLAGS.

use std::mem::offset_of;

use iced_x86::Register::{AL, EAX, EDX, R13, R13D, R14, R14D, R15, R15D, RAX, RBP, RCX, RDX};
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::asm::{byte_ptr, qword_ptr, Label};
use super::block::{Place, Translation};
use super::emit::{cpu_field, in_memory};
use super::flags::{Overflow, Rule};
use super::native::FLAGS;
use super::registers::{host, resized};
use crate::cpu::Cpu;
use crate::model::Silicon;
use crate::paging::AccessKind;
use crate::state::rflags;

impl Translation<'_> {
    /// R15 = the memory operand, with nothing of interest above it.
    fn load_memory(&mut self, insn: &Instruction, miss: Label) {
        let address = self.operand_address(insn);
        let bytes = insn.memory_size().size();
        let memory = self.out.access(address, bytes, AccessKind::Read, miss).of(bytes);
        match bytes {
            8 => self.out.asm.mov(R15, memory),
            4 => self.out.asm.mov(R15D, memory),
            _ => self.out.asm.movzx(R15D, memory),
        }
    }

    /// R15 = the guest's register of which `part` is a part.
    fn load_register(&mut self, part: Register) {
        let value = self.get(part.full_register(), R15);
        if value != R15 {
            self.out.asm.mov(R15, value);
        }
    }

    /// DIV and IDIV of 32 and 64 bits. The interpreter gets those that fail, and signed ones of a dividend that is really that wide.
    pub(super) fn divide(&mut self, insn: &Instruction, place: Place) {
        let wide = matches!(insn.code(), Code::Div_rm64 | Code::Idiv_rm64);
        let (low, high) = if wide { (RAX, RDX) } else { (EAX, EDX) };
        let (divisor, scratch) = if wide { (R15, R13) } else { (R15D, R13D) };
        self.out.flush_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        if insn.op0_kind() == OpKind::Memory {
            self.load_memory(insn, miss);
        } else {
            self.load_register(insn.op0_register());
        }
        let a = &mut *self.out.asm;
        if insn.mnemonic() == Mnemonic::Idiv {
            a.mov(scratch, low);
            a.sar(scratch, if wide { 63 } else { 31 });
            a.cmp(scratch, high);
            a.jne(miss);
            // A divisor of zero, or of -1, by which the smallest number cannot be divided.
            a.lea(scratch, qword_ptr(R15, 1));
            a.cmp(scratch, 1);
            a.jcc(ConditionCode::be, miss);
        } else {
            a.cmp(high, divisor);
            a.jcc(ConditionCode::ae, miss);
        }
        self.out.add_made(Instruction::with1(insn.code(), divisor));
        self.out.store_flags_of_quotient();
        self.out.rejoin();
    }

    /// SHL, SHR or SAR of at least 32 bits by CL, whose flags somebody sees: those before it, if the count is zero.
    pub(super) fn shift_by_cl(&mut self, insn: &Instruction, place: Place) {
        let memory = insn.op0_kind() == OpKind::Memory;
        self.out.flush_flags(place.seen_before);
        let bytes = if memory { insn.memory_size().size() } else { insn.op0_register().size() };
        let operand = memory.then(|| {
            let miss = self.out.detour(place.index);
            let address = self.operand_address(insn);
            self.out.access(address, bytes, AccessKind::Write, miss)
        });
        if !memory && bytes == 4 {
            self.clear_upper_half(insn.op0_register().full_register());
        }
        let done = self.out.asm.create_label();
        self.out.asm.mov(R15, RCX);
        self.out.asm.and(R15D, 8 * bytes as i32 - 1);
        self.out.asm.je(done);
        self.with_operands(insn, operand, Rule::Shift(Overflow::HostIfOne));
        self.out.store_flags_of_shift(match insn.mnemonic() {
            Mnemonic::Shr => Overflow::HostIfOne,
            Mnemonic::Sar => Overflow::Clear,
            _ => Overflow::CarryFromSign,
        });
        self.out.asm.set_label(done);
        if memory {
            self.out.rejoin();
        }
    }

    /// Clears bits 63:32 of a guest register, as every 32-bit operation on it does.
    fn clear_upper_half(&mut self, guest: Register) {
        match host(guest) {
            Some(host) => {
                let low = resized(host, EAX);
                self.out.asm.mov(low, low);
            }
            None => {
                self.out.asm.mov(R13, in_memory(guest));
                self.out.asm.mov(R13D, R13D);
                self.out.asm.mov(in_memory(guest), R13);
            }
        }
    }

    /// ROL or ROR of a register by an immediate: the last step alone, which tells OF.
    pub(super) fn rotate(&mut self, insn: &Instruction, count: u32, place: Place) {
        self.out.need_flags();
        let mut step = *insn;
        step.set_immediate8((count - 1) as u8);
        self.with_operands(&step, None, Rule::Exact);
        step.set_immediate8(1);
        let result = self.with_operands(&step, None, Rule::Exact);
        self.out.new_flags(Rule::Exact, result, place.seen_behind);
    }

    /// BSF and BSR: Intel's flags are those of the source.
    pub(super) fn scan(&mut self, insn: &Instruction, place: Place) {
        let memory = insn.op1_kind() == OpKind::Memory;
        if memory {
            self.out.clobber_flags(place.seen_before);
            let miss = self.out.detour(place.index);
            self.load_memory(insn, miss);
        } else {
            self.load_register(insn.op1_register());
        }
        let guest = insn.op0_register().full_register();
        let target = self.get(guest, R13);
        let source = resized(R15, insn.op0_register());
        let code = match (insn.mnemonic(), insn.op0_register().size()) {
            (Mnemonic::Bsf, 8) => Code::Bsf_r64_rm64,
            (Mnemonic::Bsf, 4) => Code::Bsf_r32_rm32,
            (Mnemonic::Bsf, _) => Code::Bsf_r16_rm16,
            (_, 8) => Code::Bsr_r64_rm64,
            (_, 4) => Code::Bsr_r32_rm32,
            _ => Code::Bsr_r16_rm16,
        };
        self.out.add_made(Instruction::with2(code, resized(target, insn.op0_register()), source));
        if target == R13 {
            self.out.asm.mov(in_memory(guest), R13);
        }
        if self.out.silicon == Silicon::Amd {
            self.out.new_flags(Rule::Found, resized(target, AL), place.seen_behind);
        } else {
            self.out.asm.test(source, source);
            self.out.new_flags(Rule::Exact, source, place.seen_behind);
        }
        if memory {
            self.out.rejoin();
        }
    }

    // ---- RFLAGS -----------------------------------------------------------------------------------------------------------------------

    /// R15 = RFLAGS as PUSHF and SYSCALL show it. Clobbers R14; the arithmetic flags are in memory.
    pub(super) fn flags_image(&mut self) {
        const HIDDEN: i32 = (rflags::VM | rflags::RF) as i32;
        const STORED: i32 = (rflags::ARITHMETIC & 0xff) as i32;
        let a = &mut *self.out.asm;
        a.movzx(R14D, byte_ptr(RBP, FLAGS as i32));
        a.rol(R14D, rflags::OF.trailing_zeros() as u8);
        a.movzx(R15D, byte_ptr(RBP, FLAGS as i32 + 1));
        a.and(R15D, STORED);
        a.or(R15D, R14D);
        a.mov(R14, cpu_field(offset_of!(Cpu, rflags)));
        a.and(R14, !HIDDEN);
        a.or(R15, R14);
    }

    /// PUSHFQ.
    pub(super) fn push_flags(&mut self, place: Place) {
        self.out.flush_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        let slot = self.stack_slot(-8, AccessKind::Write, miss);
        self.flags_image();
        self.out.asm.mov(slot, R15);
        self.move_stack(-8);
        self.out.rejoin();
    }

    /// CLI at CPL 0.
    pub(super) fn disable_interrupts(&mut self, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let miss = self.out.detour(place.index);
        self.out.asm.cmp(byte_ptr(RBP, offset_of!(Cpu, cpl) as i32), 0);
        self.out.asm.jne(miss);
        self.out.asm.and(cpu_field(offset_of!(Cpu, rflags)), !(rflags::IF as i32));
        self.out.rejoin();
    }

    /// CLD and STD.
    pub(super) fn set_direction(&mut self, down: bool, place: Place) {
        self.out.clobber_flags(place.seen_before);
        let flags = cpu_field(offset_of!(Cpu, rflags));
        if down {
            self.out.asm.or(flags, rflags::DF as i32);
        } else {
            self.out.asm.and(flags, !(rflags::DF as i32));
        }
    }
}
