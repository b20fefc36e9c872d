//! MOV, MOVZX, MOVSX, LEA, CMOVcc of registers and NOP. The reference is `exec::mov`.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{by_address, by_width_chained, is_based, load, place, Address, Based, Indexed};
use super::{chained, Outcome};
use crate::cpu::Cpu;
use crate::exec::select::{condition, holds, in_memory, is_immediate, width};
use crate::uop::{Handler, Uop};
use crate::word::Word;

pub fn handler(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Mov => mov(insn, uop),
        Mnemonic::Movzx => zero_extension(insn, uop),
        Mnemonic::Movsx | Mnemonic::Movsxd => sign_extension(insn, uop),
        Mnemonic::Lea => lea(insn, uop),
        Mnemonic::Nop => Some(chained(nop)),
        _ => conditional_move(insn),
    }
}

fn nop(_cpu: &mut Cpu, _uop: &Uop) -> Outcome {
    Outcome::Done
}

fn mov(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1)) {
        (true, _, true) => by_address!(uop, width(insn, 0), mov_mi),
        (true, _, false) => by_address!(uop, width(insn, 1), mov_mr),
        (_, true, _) => by_address!(uop, width(insn, 0), mov_rm),
        (_, _, true) => by_width_chained!(width(insn, 0), mov_ri),
        // Segment, control and debug registers have no width here.
        _ if width(insn, 0) == width(insn, 1) => by_width_chained!(width(insn, 0), mov_rr),
        _ => None,
    }
}

#[inline(always)]
fn mov_rr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], cpu.reg::<W>(uop.reg[1]));
    Outcome::Done
}

#[inline(always)]
fn mov_ri<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], W::truncate(uop.imm));
    Outcome::Done
}

#[inline(always)]
fn mov_rm<A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(value) = load::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    cpu.set_reg(uop.reg[0], value);
    Outcome::Done
}

#[inline(always)]
fn mov_mr<A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(place) = place::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    place.write(cpu.reg(uop.reg[1]));
    Outcome::Done
}

#[inline(always)]
fn mov_mi<A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(place) = place::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    place.write(W::truncate(uop.imm));
    Outcome::Done
}

// ---- widening -------------------------------------------------------------------------------------------------------------------------

/// A 32-bit write clears the upper half, so it also serves 64-bit destinations.
fn zero_extension(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    if width(insn, 0) < 4 {
        return None;
    }
    match (width(insn, 1), in_memory(insn, 1)) {
        (1, false) => Some(chained(movzx_rr::<u8>)),
        (2, false) => Some(chained(movzx_rr::<u16>)),
        (1, true) if is_based(uop) => Some(chained(movzx_rm::<u8, Based>)),
        (2, true) if is_based(uop) => Some(chained(movzx_rm::<u16, Based>)),
        (1, true) => Some(chained(movzx_rm::<u8, Indexed>)),
        (2, true) => Some(chained(movzx_rm::<u16, Indexed>)),
        _ => None,
    }
}

#[inline(always)]
fn movzx_rr<S: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], cpu.reg::<S>(uop.reg[1]).zero_extend());
    Outcome::Done
}

#[inline(always)]
fn movzx_rm<S: Word, A: Address>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(value) = load::<A, S>(cpu, uop) else { return Outcome::GiveUp };
    cpu.set_reg(uop.reg[0], value.zero_extend());
    Outcome::Done
}

fn sign_extension(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match (width(insn, 1), in_memory(insn, 1)) {
        (1, false) => by_width_chained!(width(insn, 0), movsx_rr, u8),
        (2, false) => by_width_chained!(width(insn, 0), movsx_rr, u16),
        (4, false) => by_width_chained!(width(insn, 0), movsx_rr, u32),
        (1, true) => by_address!(uop, width(insn, 0), movsx_rm, u8),
        (2, true) => by_address!(uop, width(insn, 0), movsx_rm, u16),
        (4, true) => by_address!(uop, width(insn, 0), movsx_rm, u32),
        _ => None,
    }
}

#[inline(always)]
fn movsx_rr<S: Word, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], D::truncate(cpu.reg::<S>(uop.reg[1]).sign_extend()));
    Outcome::Done
}

#[inline(always)]
fn movsx_rm<S: Word, A: Address, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(value) = load::<A, S>(cpu, uop) else { return Outcome::GiveUp };
    cpu.set_reg(uop.reg[0], D::truncate(value.sign_extend()));
    Outcome::Done
}

// ---- LEA and CMOVcc -------------------------------------------------------------------------------------------------------------------

fn lea(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    // A segment has no part in LEA's result.
    match (width(insn, 0), is_based(uop)) {
        (4, true) => Some(chained(lea_based::<u32>)),
        (8, true) => Some(chained(lea_based::<u64>)),
        (4, false) => Some(chained(lea_indexed::<u32>)),
        (8, false) => Some(chained(lea_indexed::<u64>)),
        _ => None,
    }
}

#[inline(always)]
fn lea_based<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], W::truncate(Based::linear(cpu, uop)));
    Outcome::Done
}

#[inline(always)]
fn lea_indexed<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    cpu.set_reg(uop.reg[0], W::truncate(cpu.effective(uop)));
    Outcome::Done
}

/// Picks `$body::<C, $type>` for condition number `$condition`, chained.
macro_rules! by_condition_chained {
    ($condition:expr, $body:ident, $type:ty) => {
        by_condition_chained!($condition, $body, $type, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    ($condition:expr, $body:ident, $type:ty, $($number:literal)+) => {
        match $condition {
            $($number => Some(chained($body::<$number, $type>)),)+
            _ => None,
        }
    };
}

fn conditional_move(insn: &Instruction) -> Option<Handler> {
    // SETcc and Jcc have conditions too, but no two general registers.
    let number = condition(insn).filter(|_| insn.op_count() == 2)?;
    match (width(insn, 0), in_memory(insn, 1)) {
        (4, false) => by_condition_chained!(number, cmov_rr, u32),
        (8, false) => by_condition_chained!(number, cmov_rr, u64),
        _ => None,
    }
}

#[inline(always)]
fn cmov_rr<const C: u8, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let from = if holds::<C>(cpu.flags) { uop.reg[1] } else { uop.reg[0] };
    cpu.set_reg(uop.reg[0], cpu.reg::<W>(from));
    Outcome::Done
}
