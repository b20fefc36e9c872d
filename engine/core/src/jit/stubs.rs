//! Code that all blocks share: into host code, out of it, and through the interpreter for one instruction.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::BlockEncoderOptions;

use super::arena::Arena;
use super::emit::{in_memory, r64, Emit};
use super::native::{resume, status, Trampoline};
use super::registers::PINNED;
use crate::cpu::Cpu;

/// Entry points of the shared code.
#[derive(Clone, Copy)]
pub struct Stubs {
    pub trampoline: Trampoline,
    pub resume: u64,
    pub boundary: u64,
}

/// Registers that the System V ABI wants back, in the order in which they are pushed.
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

/// Writes the shared code to an empty arena. `None` if it does not fit.
pub fn write(arena: &mut Arena) -> Emit<Option<Stubs>> {
    let mut a = CodeAssembler::new(64)?;
    let [mut enter, mut again, mut stopped, mut boundary, mut leave] = [(); 5].map(|()| a.create_label());

    // The trampoline: cpu in RDI, code in RSI. Behind it the stack is aligned to 16 bytes.
    a.set_label(&mut enter)?;
    for register in SAVED {
        a.push(register)?;
    }
    a.sub(rsp, 8)?;
    a.mov(rbp, rdi)?;
    a.mov(r13, rsi)?;
    load(&mut a)?;
    a.jmp(r13)?;

    // One instruction in the interpreter: its number in R13, the block in R14.
    a.set_label(&mut again)?;
    store(&mut a)?;
    a.mov(rdi, rbp)?;
    a.mov(rsi, r14)?;
    a.mov(edx, r13d)?;
    a.sub(rsp, 8)?;
    a.mov(rax, resume as *const () as u64)?;
    a.call(rax)?;
    a.add(rsp, 8)?;
    a.test(eax, eax)?;
    a.jne(stopped)?;
    load(&mut a)?;
    a.ret()?;
    a.set_label(&mut stopped)?;
    a.add(rsp, 8)?;
    a.jmp(leave)?;

    // Back to the dispatcher before a block.
    a.set_label(&mut boundary)?;
    store(&mut a)?;
    a.mov(eax, status::BOUNDARY)?;
    a.set_label(&mut leave)?;
    a.add(rsp, 8)?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;

    let result = a.assemble_options(arena.next(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let (enter, resume, boundary) = (result.label_ip(&enter)?, result.label_ip(&again)?, result.label_ip(&boundary)?);
    if arena.add(&result.inner.code_buffer).is_none() {
        return Ok(None);
    }
    // SAFETY: the code at `enter` follows the System V ABI with the arguments and the result of a `Trampoline`.
    let trampoline = unsafe { std::mem::transmute::<*const u8, Trampoline>(std::ptr::with_exposed_provenance(enter as usize)) };
    Ok(Some(Stubs { trampoline, resume, boundary }))
}

/// Loads the pinned registers from the CPU.
fn load(a: &mut CodeAssembler) -> Emit {
    PINNED.iter().try_for_each(|(guest, host)| a.mov(r64(*host), in_memory(*guest)))
}

/// Stores the pinned registers to the CPU.
fn store(a: &mut CodeAssembler) -> Emit {
    const { assert!(offset_of!(Cpu, regs) == 0) };
    PINNED.iter().try_for_each(|(guest, host)| a.mov(in_memory(*guest), r64(*host)))
}
