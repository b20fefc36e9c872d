//! Where the guest's vector registers and MXCSR are while host code runs: in the CPU, or in the host's registers of the same numbers.
//!
//! They come into the host's when a block that works on them begins, and stay there from block to block, until the interpreter is asked or
//! host code ends. `Native::vectors` tells how much of them is there: nothing, XMM, or YMM. With them the host runs under the guest's
//! MXCSR, which therefore gathers the exception flags by itself; a guest with an unmasked exception has its blocks interpreted, as has one
//! that may not use the registers at all. What could change that is the last instruction of its block.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use super::emit::Emit;
use super::native::{DEFAULT_MXCSR, VECTORS};
use super::vector::Width;
use crate::cpu::mode::media;
use crate::cpu::Cpu;
use crate::state::{Fpu, State};

const REGISTERS: u32 = 16;
const FPU: usize = offset_of!(Cpu, state) + offset_of!(State, fpu);
const MXCSR: i32 = (FPU + offset_of!(Fpu, mxcsr)) as i32;
/// Exception masks of MXCSR.
const MASKS: i32 = 0x1f80;
/// Components of XCR0 that lie above YMM registers, which VEX instructions clear.
const AVX512: i32 = 0xe0;

fn vectors() -> AsmMemoryOperand {
    byte_ptr(rbp + VECTORS as i32)
}

/// The place of vector register `number` in the CPU.
fn place(number: u32) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RBP, (FPU + offset_of!(Fpu, vector) + 64 * number as usize) as i64)
}

/// Shared code: puts the vector registers back into the CPU, wherever they are, and MXCSR with them. Changes no register but the flags.
pub fn write_spill(a: &mut CodeAssembler, has_ymm: bool) -> Emit {
    let (mut done, mut wide) = (a.create_label(), a.create_label());
    a.cmp(vectors(), 0)?;
    a.je(done)?;
    a.stmxcsr(dword_ptr(rbp + MXCSR))?;
    a.ldmxcsr(dword_ptr(rbp + DEFAULT_MXCSR as i32))?;
    if has_ymm {
        a.cmp(vectors(), Width::Ymm as i32)?;
        a.je(wide)?;
    }
    for n in 0..REGISTERS {
        a.add_instruction(Instruction::with2(Code::Movups_xmmm128_xmm, place(n), Register::XMM0 + n)?)?;
    }
    a.mov(vectors(), 0)?;
    a.ret()?;
    if has_ymm {
        a.set_label(&mut wide)?;
        for n in 0..REGISTERS {
            a.add_instruction(Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, place(n), Register::YMM0 + n)?)?;
        }
        a.vzeroupper()?;
        a.mov(vectors(), 0)?;
    }
    a.set_label(&mut done)?;
    a.ret()
}

/// Shared code: brings the vector registers, which are in the CPU, as wide as R13 tells, and MXCSR. Changes no other register but the flags.
pub fn write_fill(a: &mut CodeAssembler, has_ymm: bool) -> Emit {
    let mut wide = a.create_label();
    a.ldmxcsr(dword_ptr(rbp + MXCSR))?;
    a.mov(vectors(), r13b)?;
    if has_ymm {
        a.cmp(r13d, Width::Ymm as i32)?;
        a.je(wide)?;
    }
    for n in 0..REGISTERS {
        a.add_instruction(Instruction::with2(Code::Movups_xmm_xmmm128, Register::XMM0 + n, place(n))?)?;
    }
    a.ret()?;
    if has_ymm {
        a.set_label(&mut wide)?;
        for n in 0..REGISTERS {
            a.add_instruction(Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, Register::YMM0 + n, place(n))?)?;
        }
        a.ret()?;
    }
    Ok(())
}

/// Goes to `refuse` if vector registers of `width` may not be in host registers.
pub fn write_permission(a: &mut CodeAssembler, width: Width, refuse: CodeLabel) -> Emit {
    const SSE: u8 = media::TASK_SWITCHED | media::EMULATED | media::NO_SSE;
    let reasons = if width == Width::Ymm { SSE | media::NO_AVX | media::NO_VEX } else { SSE };
    a.test(byte_ptr(rbp + offset_of!(Cpu, media) as i32), i32::from(reasons))?;
    a.jne(refuse)?;
    if width == Width::Ymm {
        a.test(byte_ptr(rbp + (offset_of!(Cpu, state) + offset_of!(State, xcr0)) as i32), AVX512)?;
        a.jne(refuse)?;
    }
    a.mov(r15d, dword_ptr(rbp + MXCSR))?;
    a.not(r15d)?;
    a.test(r15d, MASKS)?;
    a.jne(refuse)
}
