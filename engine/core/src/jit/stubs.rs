//! Code that all blocks share: into host code, out of it, and through Rust code.

use std::mem::offset_of;

use iced_x86::Register::{self, EAX, EDX, R12, R13, R13D, R14, R15, R15D, R15W, RAX, RBP, RBX, RDI, RSI, RSP};

use super::access::write_shared;
use super::arena::Arena;
use super::asm::{qword_ptr, word_ptr, Asm, Label};
use super::emit::{cpu_field, in_memory, Places};
use super::native::detour::FIND;
use super::native::{self, status, Trampoline, BLOCK, HOST_STACK, HOST_STACK_END, KEPT, TARGET, VECTORS, X87};
use super::plan::Host;
use super::registers::{BUDGET, PINNED};
use super::vector::Width;
use super::vector_registers::{write_fill, write_permission, write_spill};
use super::x87::{self, enter as enter_x87};
use crate::cpu::Cpu;
use crate::paging::AccessKind;
use crate::uop::slot;

/// Entry points of the shared code.
#[derive(Clone, Copy)]
pub struct Stubs {
    pub trampoline: Trampoline,
    pub places: Places,
}

/// Registers that the System V ABI wants back, in the order in which they are pushed.
const SAVED: [Register; 6] = [RBX, RBP, R12, R13, R14, R15];
/// Bytes that align the stack behind them.
const PADDING: i32 = 8;
/// Bytes of the host's stack for calls of host code that wait for their returns: 16 for each.
const CALLS: i32 = 64 << 10;

/// Writes the shared code to an empty arena. `None` if it does not fit.
pub fn write(arena: &mut Arena, a: &mut Asm, host: Host) -> Option<Stubs> {
    let has_ymm = host.vectors.has_ymm();
    a.begin(arena.next());
    let [enter, detour, detour_keeping, elsewhere, unknown, refused, out] = [(); 7].map(|()| a.create_label());
    let [spill, fill, spill_x87, fill_x87, xmm, ymm, x87] = [(); 7].map(|()| a.create_label());

    // The trampoline: cpu in RDI, code in RSI. Behind it the stack is aligned to 16 bytes.
    a.set_label(enter);
    for register in SAVED {
        a.push(register);
    }
    a.sub(RSP, PADDING);
    a.mov(RBP, RDI);
    a.mov(R13, RSI);
    // Below all calls is one that returns to RIP 0, which host code does not know.
    let (bottom, begin) = (a.create_label(), a.create_label());
    a.mov(R14, 0);
    a.push(R14);
    a.call(begin);
    a.jmp(bottom);
    a.set_label(begin);
    a.mov(cpu_field(HOST_STACK), RSP);
    a.lea(R14, qword_ptr(RSP, -CALLS));
    a.mov(cpu_field(HOST_STACK_END), R14);
    load(a);
    a.jmp_indirect(R13);

    // Into Rust code: the reason in R13, the block in R14; behind a `call`.
    a.set_label(detour);
    a.push(R15);
    a.mov(word_ptr(RBP, KEPT as i32), 0);
    a.call(spill);
    a.call(spill_x87);
    call_rust(a, elsewhere);
    load(a);
    a.ret();

    // The same with vector registers and x87 unit back behind it, as they are before it.
    const { assert!(X87 == VECTORS + 1) };
    a.set_label(detour_keeping);
    a.movzx(R15D, word_ptr(RBP, VECTORS as i32));
    a.push(R15);
    a.mov(word_ptr(RBP, KEPT as i32), R15W);
    a.call(spill);
    a.call(spill_x87);
    call_rust(a, elsewhere);
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
    a.set_label(elsewhere);
    a.mov(RSP, cpu_field(HOST_STACK));
    a.cmp(EAX, status::GO as i32);
    a.jne(out);
    load(a);
    a.jmp_indirect(cpu_field(TARGET));

    // To the block at RIP R15, which is not at hand; half a call may be on the stack.
    a.set_label(bottom);
    a.set_label(unknown);
    a.mov(RSP, cpu_field(HOST_STACK));
    a.mov(cpu_field(offset_of!(Cpu, regs) + slot::RIP as usize * 8), R15);
    a.mov(R13D, FIND as i32);
    a.call(detour); // which does not come back

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
    a.call(spill);
    a.call(spill_x87);
    store(a);
    a.mov(cpu_field(BLOCK), R14);
    a.mov(EAX, status::REFUSED as i32);
    a.set_label(out);
    a.mov(RSP, cpu_field(HOST_STACK));
    a.add(RSP, PADDING + 16);
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

    let base = arena.next();
    let [read, write] = [AccessKind::Read, AccessKind::Write].map(|kind| write_shared(a, kind, host.bmi1, base));
    let places = [enter, detour, detour_keeping, unknown, xmm, ymm, x87].map(|label| base + a.offset(label) as u64);
    let [enter, detour, detour_keeping, unknown, xmm, ymm, x87] = places;
    arena.add(a.finish(), &[])?;
    // SAFETY: the code at `enter` follows the System V ABI with the arguments and the result of a `Trampoline`.
    let trampoline = unsafe { std::mem::transmute::<*const u8, Trampoline>(std::ptr::with_exposed_provenance(enter as usize)) };
    Some(Stubs { trampoline, places: Places { detour, detour_keeping, xmm, ymm, x87, unknown, read, write } })
}

/// Calls Rust code for the reason in R13 and block R14, behind one `push` of which R15 is the value afterwards; to `elsewhere` unless host
/// code goes on behind.
fn call_rust(a: &mut Asm, elsewhere: Label) {
    store(a);
    a.mov(RDI, RBP);
    a.mov(RSI, R14);
    a.mov(EDX, R13D);
    a.mov(RAX, native::leave as *const () as u64);
    a.call_indirect(RAX);
    a.pop(R15);
    a.test(EAX, EAX);
    a.jne(elsewhere);
}

/// Loads the pinned registers and the budget from the CPU.
fn load(a: &mut Asm) {
    a.mov(BUDGET, cpu_field(offset_of!(Cpu, budget)));
    PINNED.iter().for_each(|(guest, host)| a.mov(*host, in_memory(*guest)))
}

/// Stores the pinned registers and the budget to the CPU.
fn store(a: &mut Asm) {
    a.mov(cpu_field(offset_of!(Cpu, budget)), BUDGET);
    const { assert!(offset_of!(Cpu, regs) == 0) };
    PINNED.iter().for_each(|(guest, host)| a.mov(in_memory(*guest), *host))
}
