//! Code that all blocks share: into host code, out of it, and through the interpreter for one instruction.

use std::mem::offset_of;

use iced_x86::Register::{self, EAX, EDX, R12, R13, R13D, R14, R15, RAX, RBP, RBX, RDI, RSI, RSP};

use super::arena::Arena;
use super::asm::Asm;
use super::emit::in_memory;
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
const SAVED: [Register; 6] = [RBX, RBP, R12, R13, R14, R15];

/// Writes the shared code to an empty arena. `None` if it does not fit.
pub fn write(arena: &mut Arena, a: &mut Asm) -> Option<Stubs> {
    a.begin(arena.next());
    let [enter, again, stopped, boundary, leave] = [(); 5].map(|()| a.create_label());

    // The trampoline: cpu in RDI, code in RSI. Behind it the stack is aligned to 16 bytes.
    a.set_label(enter);
    for register in SAVED {
        a.push(register);
    }
    a.sub(RSP, 8);
    a.mov(RBP, RDI);
    a.mov(R13, RSI);
    load(a);
    a.jmp_indirect(R13);

    // One instruction in the interpreter: its number in R13, the block in R14.
    a.set_label(again);
    store(a);
    a.mov(RDI, RBP);
    a.mov(RSI, R14);
    a.mov(EDX, R13D);
    a.sub(RSP, 8);
    a.mov(RAX, resume as *const () as u64);
    a.call_indirect(RAX);
    a.add(RSP, 8);
    a.test(EAX, EAX);
    a.jne(stopped);
    load(a);
    a.ret();
    a.set_label(stopped);
    a.add(RSP, 8);
    a.jmp(leave);

    // Back to the dispatcher before a block.
    a.set_label(boundary);
    store(a);
    a.mov(EAX, status::BOUNDARY as i32);
    a.set_label(leave);
    a.add(RSP, 8);
    for register in SAVED.into_iter().rev() {
        a.pop(register);
    }
    a.ret();

    let [enter, resume, boundary] = [enter, again, boundary].map(|label| a.offset(label) as u64);
    let start = arena.add(a.finish())? as u64;
    let enter = start + enter;
    // SAFETY: the code at `enter` follows the System V ABI with the arguments and the result of a `Trampoline`.
    let trampoline = unsafe { std::mem::transmute::<*const u8, Trampoline>(std::ptr::with_exposed_provenance(enter as usize)) };
    Some(Stubs { trampoline, resume: start + resume, boundary: start + boundary })
}

/// Loads the pinned registers from the CPU.
fn load(a: &mut Asm) {
    PINNED.iter().for_each(|(guest, host)| a.mov(*host, in_memory(*guest)))
}

/// Stores the pinned registers to the CPU.
fn store(a: &mut Asm) {
    const { assert!(offset_of!(Cpu, regs) == 0) };
    PINNED.iter().for_each(|(guest, host)| a.mov(in_memory(*guest), *host))
}
