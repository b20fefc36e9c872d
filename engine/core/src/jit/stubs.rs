//! Code that all blocks share: into host code, out of it, and through the interpreter for one instruction.

use std::mem::offset_of;

use iced_x86::Register::{self, EAX, EDX, R12, R13, R13D, R14, R15, R15D, R15W, RAX, RBP, RBX, RDI, RSI, RSP};

use super::arena::Arena;
use super::asm::{qword_ptr, word_ptr, Asm, Label};
use super::emit::in_memory;
use super::native::{resume, status, Trampoline, BLOCK, KEPT, VECTORS, X87};
use super::registers::PINNED;
use super::vector::Width;
use super::vector_registers::{write_fill, write_permission, write_spill};
use super::x87::{self, enter as enter_x87};
use crate::cpu::Cpu;

/// Entry points of the shared code.
#[derive(Clone, Copy)]
pub struct Stubs {
    pub trampoline: Trampoline,
    pub resume: u64,
    /// [`Stubs::resume`] that brings vector registers and x87 unit back.
    pub resume_keeping: u64,
    pub boundary: u64,
    /// Bring XMM registers, YMM registers and the x87 unit.
    pub xmm: u64,
    pub ymm: u64,
    pub x87: u64,
}

/// Registers that the System V ABI wants back, in the order in which they are pushed.
const SAVED: [Register; 6] = [RBX, RBP, R12, R13, R14, R15];

/// Writes the shared code to an empty arena. `None` if it does not fit.
pub fn write(arena: &mut Arena, a: &mut Asm, has_ymm: bool) -> Option<Stubs> {
    a.begin(arena.next());
    let [enter, again, again_keeping, stopped, boundary, refused, leave] = [(); 7].map(|()| a.create_label());
    let [spill, fill, spill_x87, fill_x87, xmm, ymm, x87] = [(); 7].map(|()| a.create_label());

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
    a.push(R15);
    a.mov(word_ptr(RBP, KEPT as i32), 0);
    a.call(spill);
    a.call(spill_x87);
    call_resume(a, stopped);
    load(a);
    a.ret();

    // The same with vector registers and x87 unit back behind it, as they are before it.
    const { assert!(X87 == VECTORS + 1) };
    a.set_label(again_keeping);
    a.movzx(R15D, word_ptr(RBP, VECTORS as i32));
    a.push(R15);
    a.mov(word_ptr(RBP, KEPT as i32), R15W);
    a.call(spill);
    a.call(spill_x87);
    call_resume(a, stopped);
    load(a);
    a.test(R15D, 1 << 8);
    let without = a.create_label();
    a.je(without);
    a.call(fill_x87);
    a.set_label(without);
    a.mov(R13D, R15D);
    a.and(R13D, 0xff);
    a.jne(fill);
    a.ret();
    a.set_label(stopped);
    a.add(RSP, 8);
    a.jmp(leave);

    // Back to the dispatcher before a block.
    a.set_label(boundary);
    a.call(spill);
    a.call(spill_x87);
    store(a);
    a.mov(EAX, status::BOUNDARY as i32);
    a.jmp(leave);

    // The block in R14, which works on vector registers, begins; behind a `call`. Back to the dispatcher if they may not be used.
    for (width, gate) in [(Width::Xmm, xmm), (Width::Ymm, ymm)] {
        a.set_label(gate);
        write_permission(a, width, refused);
        a.call(spill);
        a.mov(R13D, width as i32);
        a.jmp(fill);
    }
    a.set_label(x87);
    a.call(spill);
    store(a);
    a.push(R14);
    a.mov(RDI, RBP);
    a.mov(RAX, enter_x87 as *const () as u64);
    a.call_indirect(RAX);
    a.pop(R14);
    a.test(EAX, EAX);
    load(a);
    a.jne(fill_x87);
    a.set_label(refused);
    a.add(RSP, 8);
    a.call(spill);
    a.call(spill_x87);
    store(a);
    a.mov(qword_ptr(RBP, BLOCK as i32), R14);
    a.mov(EAX, status::REFUSED as i32);
    a.set_label(leave);
    a.add(RSP, 8);
    for register in SAVED.into_iter().rev() {
        a.pop(register);
    }
    a.ret();

    a.set_label(spill);
    write_spill(a, has_ymm);
    a.set_label(fill);
    write_fill(a, has_ymm);
    a.set_label(spill_x87);
    x87::write_spill(a);
    a.set_label(fill_x87);
    x87::write_fill(a);

    let places = [enter, again, again_keeping, boundary, xmm, ymm, x87].map(|label| a.offset(label) as u64);
    let start = arena.add(a.finish())? as u64;
    let [enter, resume, resume_keeping, boundary, xmm, ymm, x87] = places.map(|place| start + place);
    // SAFETY: the code at `enter` follows the System V ABI with the arguments and the result of a `Trampoline`.
    let trampoline = unsafe { std::mem::transmute::<*const u8, Trampoline>(std::ptr::with_exposed_provenance(enter as usize)) };
    Some(Stubs { trampoline, resume, resume_keeping, boundary, xmm, ymm, x87 })
}

/// Calls [`resume`] for instruction R13 of block R14, behind one `push` of which R15 is the value afterwards; to `stopped` if it says so.
fn call_resume(a: &mut Asm, stopped: Label) {
    store(a);
    a.mov(RDI, RBP);
    a.mov(RSI, R14);
    a.mov(EDX, R13D);
    a.mov(RAX, resume as *const () as u64);
    a.call_indirect(RAX);
    a.pop(R15);
    a.test(EAX, EAX);
    a.jne(stopped);
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
