//! PUSH, POP, CALL and RET of 64-bit code. The references are `exec::stack` and `exec::branch`.

use iced_x86::{Code, Instruction, Mnemonic};

use super::{chained, Outcome};
use crate::cpu::Cpu;
use crate::exec::select::width;
use crate::memory::order;
use crate::paging::AccessKind;
use crate::state::gpr;
use crate::uop::{Exec, Handler, Stop, Uop};

pub fn handler(insn: &Instruction) -> Option<Handler> {
    match (insn.mnemonic(), insn.code()) {
        (Mnemonic::Push, _) if width(insn, 0) == 8 && insn.op0_register().is_gpr() => Some(chained(push_r)),
        (Mnemonic::Pop, _) if width(insn, 0) == 8 && insn.op0_register().is_gpr() => Some(chained(pop_r)),
        (_, Code::Call_rel32_64) => Some(call_rel),
        (_, Code::Retnq) => Some(ret),
        _ => None,
    }
}

/// Pushes `value`, if the TLB covers the stack.
#[inline(always)]
fn push(cpu: &mut Cpu, value: u64) -> Outcome {
    let top = cpu.gpr(gpr::RSP).wrapping_sub(8);
    let Some(host) = cpu.cached(top, 8, AccessKind::Write) else { return Outcome::GiveUp };
    // SAFETY: a write tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
    unsafe { order::store(host.cast::<u64>(), value) };
    cpu.set_gpr(gpr::RSP, top);
    Outcome::Done
}

/// The word on top of the stack, if the TLB covers it.
#[inline(always)]
fn top(cpu: &Cpu) -> Option<u64> {
    let host = cpu.cached(cpu.gpr(gpr::RSP), 8, AccessKind::Read)?;
    // SAFETY: a read tag means that the page is mapped RAM as long as the tag stands, and the access is inside it.
    Some(unsafe { order::load(host.cast::<u64>()) })
}

#[inline(always)]
fn push_r(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    push(cpu, cpu.reg(uop.reg[0]))
}

#[inline(always)]
fn pop_r(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(value) = top(cpu) else { return Outcome::GiveUp };
    cpu.set_gpr(gpr::RSP, cpu.gpr(gpr::RSP).wrapping_add(8));
    cpu.set_reg(uop.reg[0], value);
    Outcome::Done
}

fn call_rel(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target = cpu.rip().wrapping_add(uop.imm);
    if !cpu.canonical(target) || push(cpu, cpu.rip().wrapping_add(uop.next_offset())) == Outcome::GiveUp {
        return Err(Stop::Slow);
    }
    cpu.set_rip_64(target);
    Err(Stop::Next)
}

fn ret(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let Some(target) = top(cpu).filter(|target| cpu.canonical(*target)) else { return Err(Stop::Slow) };
    cpu.set_gpr(gpr::RSP, cpu.gpr(gpr::RSP).wrapping_add(8));
    cpu.set_rip_64(target);
    Err(Stop::Next)
}
