//! Near control transfers: Jcc, JMP, CALL, RET, LOOPcc, JrCXZ (SDM vol. 1, 6.4 and 7.3.8; vol. 2 for each).
//!
//! A target outside the code segment, or not canonical, raises #GP at the branch, before anything changes.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::select::{condition, holds, in_memory};
use crate::cpu::{CodeSize, Cpu};
use crate::model::Silicon;
use crate::state::{gpr, seg};
use crate::uop::{Exec, Handler, RegOffset, Stop, Uop};
use crate::word::Word;

const RCX: RegOffset = gpr::RCX as u8 * 8;

/// The handler of an instruction of this family. Operand size is a type: u16, u32 or u64, the width of the new RIP.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Mnemonic::*;
    if insn.op_count() > 0 && matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32) {
        return None;
    }
    match insn.mnemonic() {
        Jmp => jump(insn),
        Call => call(insn),
        Ret => ret(insn),
        Loop | Loope | Loopne => loops(insn),
        Jcxz => jump_if_zero::<u16>(insn),
        Jecxz => jump_if_zero::<u32>(insn),
        Jrcxz => jump_if_zero::<u64>(insn),
        _ if insn.is_jcc_short_or_near() => {
            let condition = condition(insn)?;
            match insn.op0_kind() {
                OpKind::NearBranch16 => by_condition!(condition, jcc, u16),
                OpKind::NearBranch32 => by_condition!(condition, jcc, u32),
                _ => by_condition!(condition, jcc, u64),
            }
        }
        _ => None,
    }
}

/// Goes to `target`, which is as wide as the operand size.
#[inline(always)]
fn go<W: Word>(cpu: &mut Cpu, target: u64) -> Exec {
    check_target::<W>(cpu, target)?;
    set_rip::<W>(cpu, target);
    Err(Stop::Next)
}

/// Only 64-bit code has 64-bit operands; near branches in it have no other, but for those of 16 bits that AMD's silicon has.
#[inline(always)]
fn set_rip<W: Word>(cpu: &mut Cpu, target: u64) {
    if W::BITS == 64 {
        cpu.set_rip_64(target);
    } else {
        cpu.set_rip(target);
    }
}

#[inline(always)]
fn check_target<W: Word>(cpu: &mut Cpu, target: u64) -> Exec {
    let allowed = if W::BITS == 64 || cpu.long_mode() { cpu.canonical(target) } else { target <= cpu.state.segments[seg::CS].limit.into() };
    if !allowed {
        return Err(cpu.general_protection());
    }
    Ok(())
}

/// Target of a relative branch.
#[inline(always)]
fn relative<W: Word>(cpu: &Cpu, uop: &Uop) -> u64 {
    W::truncate(cpu.rip().wrapping_add(uop.imm)).zero_extend()
}

/// Address of the next instruction, to push.
#[inline(always)]
fn return_address<W: Word>(cpu: &Cpu, uop: &Uop) -> W {
    W::truncate(cpu.rip_at(uop.next_offset()))
}

#[inline(always)]
fn fall_through<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    set_rip::<W>(cpu, cpu.rip().wrapping_add(uop.next_offset()));
    Err(Stop::Next)
}

#[inline(always)]
fn branch_if<W: Word>(cpu: &mut Cpu, uop: &Uop, taken: bool) -> Exec {
    if taken {
        go::<W>(cpu, relative::<W>(cpu, uop))
    } else {
        fall_through::<W>(cpu, uop)
    }
}

#[inline(always)]
pub fn jcc<const C: u8, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    branch_if::<W>(cpu, uop, holds::<C>(cpu.flags))
}

// ---- JMP and CALL ---------------------------------------------------------------------------------------------------------------------

/// Picks the handler of a relative or indirect branch by form and operand size.
macro_rules! by_target {
    ($insn:expr, $relative:ident, $register:ident, $memory:ident) => {
        match ($insn.op0_kind(), in_memory($insn, 0)) {
            (OpKind::NearBranch16, _) => Some($relative::<u16> as Handler),
            (OpKind::NearBranch32, _) => Some($relative::<u32> as Handler),
            (OpKind::NearBranch64, _) => Some($relative::<u64> as Handler),
            (OpKind::Register, _) => by_wide_width!($insn.op0_register().size(), $register),
            (_, true) => by_wide_width!($insn.memory_size().size(), $memory),
            _ => None,
        }
    };
}

fn jump(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 => None,
        _ => by_target!(insn, jmp_rel, jmp_r, jmp_m),
    }
}

fn jmp_rel<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    go::<W>(cpu, relative::<W>(cpu, uop))
}

fn jmp_r<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target: W = cpu.reg(uop.reg[0]);
    go::<W>(cpu, target.zero_extend())
}

fn jmp_m<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target: W = cpu.load(uop)?;
    go::<W>(cpu, target.zero_extend())
}

fn call(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 => None,
        _ => by_target!(insn, call_rel, call_r, call_m),
    }
}

#[inline(always)]
fn call_to<W: Word>(cpu: &mut Cpu, uop: &Uop, target: u64) -> Exec {
    if let Err(stop) = check_target::<W>(cpu, target) {
        if cpu.silicon == Silicon::Amd {
            cpu.probe_push::<W>()?; // it looks at the stack first
        }
        return Err(stop);
    }
    cpu.push(return_address::<W>(cpu, uop))?;
    cpu.set_rip(target);
    Err(Stop::Next)
}

fn call_rel<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    call_to::<W>(cpu, uop, relative::<W>(cpu, uop))
}

fn call_r<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target: W = cpu.reg(uop.reg[0]);
    call_to::<W>(cpu, uop, target.zero_extend())
}

fn call_m<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target: W = cpu.load(uop)?;
    call_to::<W>(cpu, uop, target.zero_extend())
}

// ---- RET ------------------------------------------------------------------------------------------------------------------------------

fn ret(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Retnw | Code::Retnw_imm16 => Some(retn::<u16>),
        Code::Retnd | Code::Retnd_imm16 => Some(retn::<u32>),
        Code::Retnq | Code::Retnq_imm16 => Some(retn::<u64>),
        _ => None,
    }
}

/// Without an immediate operand `imm` is zero.
fn retn<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target = cpu.peek::<W>(0)?.zero_extend();
    check_target::<W>(cpu, target)?;
    let released = cpu.gpr(gpr::RSP).wrapping_add(W::BYTES).wrapping_add(uop.imm & 0xffff);
    cpu.set_stack_pointer(released);
    cpu.set_rip(target);
    Err(Stop::Next)
}

// ---- branches on rCX ------------------------------------------------------------------------------------------------------------------

/// Width in bytes of the counter of LOOPcc, which is its address size.
fn counter_width(insn: &Instruction) -> usize {
    use Code::*;
    match insn.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX | Loopne_rel8_32_CX => 2,
        Loop_rel8_64_RCX | Loope_rel8_64_RCX | Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// Whether LOOPcc goes on besides its count: always, while equal, while not equal.
const ALWAYS: u8 = 0;
const EQUAL: u8 = 1;
const NOT_EQUAL: u8 = 2;

fn loops(insn: &Instruction) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Loop => loop_by_widths::<ALWAYS>(insn),
        Mnemonic::Loope => loop_by_widths::<EQUAL>(insn),
        _ => loop_by_widths::<NOT_EQUAL>(insn),
    }
}

fn loop_by_widths<const WHILE: u8>(insn: &Instruction) -> Option<Handler> {
    Some(match (insn.op0_kind(), counter_width(insn)) {
        (OpKind::NearBranch16, 2) => loop_while::<WHILE, u16, u16>,
        (OpKind::NearBranch16, _) => loop_while::<WHILE, u32, u16>,
        (OpKind::NearBranch32, 2) => loop_while::<WHILE, u16, u32>,
        (OpKind::NearBranch32, _) => loop_while::<WHILE, u32, u32>,
        (_, 8) => loop_while::<WHILE, u64, u64>,
        _ => loop_while::<WHILE, u32, u64>,
    })
}

/// `N` is the width of the counter.
fn loop_while<const WHILE: u8, N: Word, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = cpu.reg::<N>(RCX).sub(N::ONE);
    let equal = cpu.flags.zf();
    let taken = count != N::ZERO && (WHILE == ALWAYS || equal == (WHILE == EQUAL));
    let target = relative::<W>(cpu, uop);
    if taken {
        check_target::<W>(cpu, target)?;
    }
    cpu.set_reg(RCX, count);
    if taken {
        cpu.set_rip(target);
        return Err(Stop::Next);
    }
    fall_through::<W>(cpu, uop)
}

fn jump_if_zero<N: Word>(insn: &Instruction) -> Option<Handler> {
    Some(match insn.op0_kind() {
        OpKind::NearBranch16 => jrcxz::<N, u16>,
        OpKind::NearBranch32 => jrcxz::<N, u32>,
        _ => jrcxz::<N, u64>,
    })
}

fn jrcxz<N: Word, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let zero = cpu.reg::<N>(RCX) == N::ZERO;
    branch_if::<W>(cpu, uop, zero)
}
