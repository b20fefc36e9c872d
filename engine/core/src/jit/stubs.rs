//! Code that all blocks share: into host code, out of it, and through the interpreter for one instruction.

use std::mem::offset_of;

use iced_x86::code_asm::*;
use iced_x86::BlockEncoderOptions;

use super::arena::Arena;
use super::emit::{in_memory, r64, Emit};
use super::native::{resume, status, Trampoline, BLOCK, VECTORS};
use super::registers::PINNED;
use super::vector::Width;
use super::vector_registers::{write_fill, write_permission, write_spill};
use crate::cpu::Cpu;

/// Entry points of the shared code.
#[derive(Clone, Copy)]
pub struct Stubs {
    pub trampoline: Trampoline,
    pub resume: u64,
    /// [`Stubs::resume`] that brings the vector registers back.
    pub resume_vectors: u64,
    pub boundary: u64,
    /// Bring the vector registers, XMM or YMM.
    pub gates: [u64; 2],
}

/// Registers that the System V ABI wants back, in the order in which they are pushed.
const SAVED: [AsmRegister64; 6] = [rbx, rbp, r12, r13, r14, r15];

/// Writes the shared code to an empty arena. `None` if it does not fit.
pub fn write(arena: &mut Arena, has_ymm: bool) -> Emit<Option<Stubs>> {
    let mut a = CodeAssembler::new(64)?;
    let [mut enter, mut again, mut again_with_vectors, mut stopped, mut boundary, mut refused, mut leave] =
        [(); 7].map(|()| a.create_label());
    let [mut spill, mut fill, mut xmm_gate, mut ymm_gate] = [(); 4].map(|()| a.create_label());

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
    a.push(r15)?;
    a.call(spill)?;
    call_resume(&mut a, stopped)?;
    load(&mut a)?;
    a.ret()?;

    // The same with the vector registers back behind it, as wide as they are before it.
    a.set_label(&mut again_with_vectors)?;
    a.movzx(r15d, byte_ptr(rbp + VECTORS as i32))?;
    a.push(r15)?;
    a.call(spill)?;
    call_resume(&mut a, stopped)?;
    load(&mut a)?;
    a.mov(r13, r15)?;
    a.jmp(fill)?;
    a.set_label(&mut stopped)?;
    a.add(rsp, 8)?;
    a.jmp(leave)?;

    // Back to the dispatcher before a block.
    a.set_label(&mut boundary)?;
    a.call(spill)?;
    store(&mut a)?;
    a.mov(eax, status::BOUNDARY)?;
    a.jmp(leave)?;

    // The block in R14, which works on vector registers, begins; behind a `call`. Back to the dispatcher if they may not be used.
    for (width, gate) in [(Width::Xmm, &mut xmm_gate), (Width::Ymm, &mut ymm_gate)] {
        a.set_label(gate)?;
        write_permission(&mut a, width, refused)?;
        a.call(spill)?;
        a.mov(r13d, width as u32)?;
        a.jmp(fill)?;
    }
    a.set_label(&mut refused)?;
    a.add(rsp, 8)?;
    a.call(spill)?;
    store(&mut a)?;
    a.mov(qword_ptr(rbp + BLOCK as i32), r14)?;
    a.mov(eax, status::REFUSED)?;
    a.set_label(&mut leave)?;
    a.add(rsp, 8)?;
    for register in SAVED.into_iter().rev() {
        a.pop(register)?;
    }
    a.ret()?;

    a.set_label(&mut spill)?;
    write_spill(&mut a, has_ymm)?;
    a.set_label(&mut fill)?;
    write_fill(&mut a, has_ymm)?;

    let result = a.assemble_options(arena.next(), BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
    let (enter, resume, boundary) = (result.label_ip(&enter)?, result.label_ip(&again)?, result.label_ip(&boundary)?);
    let resume_vectors = result.label_ip(&again_with_vectors)?;
    let gates = [result.label_ip(&xmm_gate)?, result.label_ip(&ymm_gate)?];
    if arena.add(&result.inner.code_buffer).is_none() {
        return Ok(None);
    }
    // SAFETY: the code at `enter` follows the System V ABI with the arguments and the result of a `Trampoline`.
    let trampoline = unsafe { std::mem::transmute::<*const u8, Trampoline>(std::ptr::with_exposed_provenance(enter as usize)) };
    Ok(Some(Stubs { trampoline, resume, resume_vectors, boundary, gates }))
}

/// Calls [`resume`] for instruction R13 of block R14, behind one `push` of which R15 is the value afterwards; to `stopped` if it says so.
fn call_resume(a: &mut CodeAssembler, stopped: CodeLabel) -> Emit {
    store(a)?;
    a.mov(rdi, rbp)?;
    a.mov(rsi, r14)?;
    a.mov(edx, r13d)?;
    a.mov(rax, resume as *const () as u64)?;
    a.call(rax)?;
    a.pop(r15)?;
    a.test(eax, eax)?;
    a.jne(stopped)
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
