//! Where the guest's vector registers and MXCSR are while host code runs: in the CPU, or in the host's registers of the same numbers.
//!
//! They come into the host's when a block that works on them begins, and stay there from block to block, until the interpreter is asked or
//! host code ends. `Native::vectors` tells how much of them is there: nothing, XMM, or YMM. With them the host runs under the guest's
//! MXCSR, which therefore gathers the exception flags by itself; a guest with an unmasked exception has its blocks interpreted, as has one
//! that may not use the registers at all. What could change that is the last instruction of its block.

use std::mem::offset_of;

use iced_x86::Register::{self, R13D, R13L, R15D, RBP, XMM0, YMM0};
use iced_x86::{Code, Instruction, MemoryOperand};

use super::asm::{byte_ptr, dword_ptr, Asm, Label, Memory};
use super::native::{DEFAULT_MXCSR, VECTORS};
use super::vector::Width;
use crate::cpu::mode::media;
use crate::cpu::Cpu;
use crate::state::{Fpu, State};

const REGISTERS: u32 = 16;
const FPU: usize = offset_of!(Cpu, state) + offset_of!(State, fpu);
const MXCSR: usize = FPU + offset_of!(Fpu, mxcsr);
/// Exception masks of MXCSR, and bits that it does not have.
const MASKS: i32 = 0x1f80;
const NO_BITS: i32 = !0xffff;
/// Components of XCR0 that lie above YMM registers, which VEX instructions clear.
const AVX512: i32 = 0xe0;

fn vectors() -> Memory {
    byte_ptr(RBP, VECTORS as i32)
}

/// A place in the CPU.
fn field(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(RBP, offset as i64)
}

/// Moves all vector registers, of which `first` is the first, with `code`, to the CPU or from it.
fn move_all(a: &mut Asm, code: Code, first: Register) {
    let load = matches!(code, Code::Movups_xmm_xmmm128 | Code::VEX_Vmovups_ymm_ymmm256);
    for n in 0..REGISTERS {
        let place = field(FPU + offset_of!(Fpu, vector) + 64 * n as usize);
        a.must_add(if load { Instruction::with2(code, first + n, place) } else { Instruction::with2(code, place, first + n) });
    }
}

/// Shared code: puts the vector registers back into the CPU, if they are not there, and MXCSR with them. Changes nothing but the flags.
pub fn write_spill(a: &mut Asm, has_ymm: bool) {
    let (done, wide) = (a.create_label(), a.create_label());
    a.cmp(vectors(), 0);
    a.je(done);
    a.must_add(Instruction::with1(Code::Stmxcsr_m32, field(MXCSR)));
    a.must_add(Instruction::with1(Code::Ldmxcsr_m32, field(DEFAULT_MXCSR)));
    if has_ymm {
        a.cmp(vectors(), Width::Ymm as i32);
        a.je(wide);
    }
    move_all(a, Code::Movups_xmmm128_xmm, XMM0);
    a.mov(vectors(), 0);
    a.ret();
    if has_ymm {
        a.set_label(wide);
        move_all(a, Code::VEX_Vmovups_ymmm256_ymm, YMM0);
        a.must_add(Ok(Instruction::with(Code::VEX_Vzeroupper)));
        a.mov(vectors(), 0);
    }
    a.set_label(done);
    a.ret();
}

/// Shared code: brings the vector registers, which are in the CPU, as wide as R13 tells, and MXCSR. Changes nothing else but the flags.
pub fn write_fill(a: &mut Asm, has_ymm: bool) {
    let wide = a.create_label();
    a.must_add(Instruction::with1(Code::Ldmxcsr_m32, field(MXCSR)));
    a.mov(vectors(), R13L);
    if has_ymm {
        a.cmp(R13D, Width::Ymm as i32);
        a.je(wide);
    }
    move_all(a, Code::Movups_xmm_xmmm128, XMM0);
    a.ret();
    if has_ymm {
        a.set_label(wide);
        move_all(a, Code::VEX_Vmovups_ymm_ymmm256, YMM0);
        a.ret();
    }
}

/// Goes to `refuse` if vector registers of `width` may not be in host registers. Changes R15 and the flags.
pub fn write_permission(a: &mut Asm, width: Width, refuse: Label) {
    const SSE: u8 = media::TASK_SWITCHED | media::EMULATED | media::NO_SSE;
    let reasons = if width == Width::Ymm { SSE | media::NO_AVX | media::NO_VEX } else { SSE };
    a.movzx(R15D, byte_ptr(RBP, offset_of!(Cpu, media) as i32));
    a.test(R15D, i32::from(reasons));
    a.jne(refuse);
    if width == Width::Ymm {
        a.mov(R15D, dword_ptr(RBP, (offset_of!(Cpu, state) + offset_of!(State, xcr0)) as i32));
        a.test(R15D, AVX512);
        a.jne(refuse);
    }
    a.mov(R15D, dword_ptr(RBP, MXCSR as i32));
    a.xor(R15D, MASKS);
    a.test(R15D, MASKS | NO_BITS);
    a.jne(refuse);
}
