//! SYSCALL and SYSRET between 64-bit code of CPL 3 and CPL 0 (SDM vol. 3, 5.8.8). The references are in `exec::syscall`.
//!
//! The privilege level decides which table of the TLB accesses look in and which blocks the jump cache may name; the CPU keeps both for
//! either level. Whatever else could follow (a single-step trap, alignment checks, a branch that is watched) is the interpreter's.

use std::mem::offset_of;

use iced_x86::Register::{R11, R13, R13D, R13L, R13W, R14, R14D, R14W, R15, RBP, RCX};
use iced_x86::{Instruction, Register};

use super::asm::{byte_ptr, dword_ptr, qword_ptr, word_ptr, Label};
use super::block::{Place, Translation};
use super::emit::cpu_field;
use super::native::{CONTEXT, CONTEXT_FIELD, FLAGS, STAMP};
use super::system::{segment, state};
use crate::cpu::Cpu;
use crate::exec::syscall::{FLAT_CODE_64, FLAT_DATA, SYSRET_DROPS, USER};
use crate::paging::tlb;
use crate::pmu::Pmu;
use crate::state::{efer, rflags, seg, Segment, State};

/// Flags of RFLAGS that the CPU keeps apart from the arithmetic ones.
const KEPT: u64 = rflags::WRITABLE & !rflags::ARITHMETIC;
/// Flags that make the interpreter load them.
const RARE: u64 = rflags::TF | rflags::AC;

impl Translation<'_> {
    /// Goes to `miss` if there are no fast system calls, or somebody counts by privilege level.
    fn require_system_calls(&mut self, miss: Label) {
        let a = &mut *self.out.asm;
        a.test(byte_ptr(RBP, state!(efer) as i32), efer::SCE as i32);
        a.je(miss);
        a.cmp(byte_ptr(RBP, (offset_of!(Cpu, pmu) + offset_of!(Pmu, watched)) as i32), 0);
        a.jne(miss);
    }

    /// Loads a flat segment with the selector in `selector`.
    fn load_flat(&mut self, number: usize, selector: Register, rights: u32) {
        let a = &mut *self.out.asm;
        a.mov(word_ptr(RBP, segment(number, offset_of!(Segment, selector)) as i32), selector);
        a.mov(dword_ptr(RBP, segment(number, offset_of!(Segment, access_rights)) as i32), rights as i32);
        a.mov(dword_ptr(RBP, segment(number, offset_of!(Segment, limit)) as i32), -1);
        a.mov(cpu_field(segment(number, offset_of!(Segment, base))), 0);
    }

    /// The code at RIP R15 runs at `level`, with the TLB's table at offset `table` of the CPU. No return finds a call of the other level.
    fn enter_level(&mut self, level: i32, table: usize) {
        let context = offset_of!(Cpu, contexts) + usize::from(level == 3) * size_of::<u64>();
        let a = &mut *self.out.asm;
        a.mov(byte_ptr(RBP, offset_of!(Cpu, cpl) as i32), level);
        a.mov(R13, cpu_field(table));
        a.mov(cpu_field(offset_of!(Cpu, active_table)), R13);
        a.mov(R13, qword_ptr(R13, offset_of!(tlb::Entries, epoch) as i32));
        a.mov(cpu_field(STAMP), R13);
        a.mov(R13, cpu_field(context));
        a.mov(cpu_field(CONTEXT_FIELD), R13);
        a.mov(cpu_field(CONTEXT), R13);
        self.out.forget_calls();
        self.out.go_to_r15();
    }

    pub(super) fn system_call(&mut self, insn: &Instruction, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        self.require_system_calls(miss);
        self.flags_image();
        let a = &mut *self.out.asm;
        a.mov(R14, cpu_field(state!(fmask)));
        a.xor(R14, -1);
        a.and(R14, R15);
        a.test(R14D, (rflags::ARITHMETIC | RARE) as i32);
        a.jne(miss);
        a.or(R14, rflags::FIXED as i32);
        a.mov(cpu_field(offset_of!(Cpu, rflags)), R14);
        a.mov(word_ptr(RBP, FLAGS as i32), 0);
        self.set(R11, R15);
        self.out.rip_at(RCX, insn.next_ip() as i64);
        let a = &mut *self.out.asm;
        a.mov(R13D, dword_ptr(RBP, state!(star) as i32 + 4));
        a.and(R13D, 0xfffc);
        self.load_flat(seg::CS, R13W, FLAT_CODE_64);
        self.out.asm.add(R13D, 8);
        self.load_flat(seg::SS, R13W, FLAT_DATA);
        self.out.asm.mov(R15, cpu_field(state!(lstar)));
        self.enter_level(0, offset_of!(Cpu, kernel_tables));
    }

    /// SYSRET to 64-bit code.
    pub(super) fn system_return(&mut self, place: Place) {
        self.out.flush_flags(true);
        let miss = self.out.detour(place.index);
        self.require_system_calls(miss);
        self.require_kernel(miss);
        self.out.asm.mov(R15, RCX);
        self.require_canonical(miss);
        let flags = self.get(R11, R14);
        let a = &mut *self.out.asm;
        a.mov(R14, flags);
        a.test(R14D, RARE as i32);
        a.jne(miss);
        a.mov(R13D, R14D);
        a.and(R13D, (rflags::ARITHMETIC & 0xff) as i32);
        a.mov(byte_ptr(RBP, FLAGS as i32 + 1), R13L);
        a.mov(R13D, R14D);
        a.shr(R13D, rflags::OF.trailing_zeros() as u8);
        a.and(R13D, 1);
        a.mov(byte_ptr(RBP, FLAGS as i32), R13L);
        a.and(R14D, (KEPT & !SYSRET_DROPS) as i32);
        a.or(R14D, rflags::FIXED as i32);
        a.mov(cpu_field(offset_of!(Cpu, rflags)), R14);
        a.mov(R13D, dword_ptr(RBP, state!(star) as i32 + 4));
        a.shr(R13D, 16);
        a.add(R13D, 8);
        a.mov(R14D, R13D);
        a.or(R14D, 3);
        self.load_flat(seg::SS, R14W, FLAT_DATA | USER);
        self.out.asm.add(R13D, 8);
        self.out.asm.or(R13D, 3);
        self.load_flat(seg::CS, R13W, FLAT_CODE_64 | USER);
        self.enter_level(3, offset_of!(Cpu, user_table));
    }
}
