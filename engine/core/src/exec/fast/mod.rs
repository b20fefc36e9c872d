//! Handlers for the hot path of blocks: the commonest instructions in their commonest forms.
//!
//! Every instruction has a reference handler in its family, which is complete. A fast handler does the same for one form of it, calls
//! the next micro-op itself, and gives up before it changed anything where it would need more than the TLB's fast path: it returns
//! `Stop::Slow`, and the dispatcher runs the reference handler. So fast handlers have no cold calls, and need no stack frame.
//!
//! Calls from handler to handler end with the block, so they nest at most as deep as a block is long where the compiler does not turn
//! them into jumps.

mod alu;
mod fused;
mod interrupt;
mod mov;
mod operand;
mod repeat;
mod shift;
mod stack;

use core::ptr;

use iced_x86::Instruction;

use crate::cpu::Cpu;
use crate::uop::{flag, Exec, Handler, Stop, Uop};

/// The fast handler of an instruction that was lowered to `uop`, if it has one; `following` is the next one of its block. With
/// `dead_flags`, nobody sees the flags it leaves.
pub fn handler(insn: &Instruction, uop: &Uop, following: Option<&Instruction>, dead_flags: bool) -> Option<Handler> {
    if uop.has(flag::LOCK | flag::SLOW_ADDRESS) || !uop.has(flag::LONG) {
        return None;
    }
    let fused = following.and_then(fused::branch_condition).and_then(|condition| fused::handler(insn, uop, condition));
    fused
        .or_else(|| mov::handler(insn, uop))
        .or_else(|| if dead_flags { alu::handler::<alu::Dead>(insn, uop) } else { alu::handler::<alu::Live>(insn, uop) })
        .or_else(|| if dead_flags { shift::handler::<alu::Dead>(insn) } else { shift::handler::<alu::Live>(insn) })
        .or_else(|| stack::handler(insn))
        .or_else(|| repeat::handler(insn, uop))
        .or_else(|| interrupt::handler(insn, following))
}

/// What a fast handler did.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The instruction is complete.
    Done,
    /// Nothing happened; the reference handler must do it.
    GiveUp,
}

/// What a fast handler does besides going on: a function item, so that its type says it all.
trait Body: Fn(&mut Cpu, &Uop) -> Outcome + Copy + 'static {}

impl<B: Fn(&mut Cpu, &Uop) -> Outcome + Copy + 'static> Body for B {}

/// Fails to compile for function pointers and closures with captures.
fn assert_function_item<B: Body>(_body: B) {
    const { assert!(size_of::<B>() == 0, "the body must be a function item") };
}

/// The handler that runs `body` and goes on with the next micro-op.
fn chained<B: Body>(body: B) -> Handler {
    assert_function_item(body);
    chain::<B>
}

fn chain<B: Body>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    // SAFETY: `chained` had a value of this type, and it has no bytes.
    let body: B = unsafe { core::mem::zeroed() };
    if body(cpu, uop) == Outcome::GiveUp {
        return Err(Stop::Slow);
    }
    // SAFETY: fast handlers are run inside blocks only, and the last micro-op of a block is never a fast one that goes on.
    let next = unsafe { next(uop) };
    cpu.at = next;
    (next.run)(cpu, next)
}

/// The micro-op behind `uop`.
///
/// # Safety
/// `uop` must lie in a block, whose micro-ops are one allocation of exposed provenance, and must not be the last.
#[inline(always)]
unsafe fn next(uop: &Uop) -> &Uop {
    // SAFETY: by the caller's promise there is one.
    unsafe { &*ptr::with_exposed_provenance((&raw const *uop).wrapping_add(1).addr()) }
}
