//! Arithmetic and logic on registers and memory. The operations themselves are those of the reference, `exec::alu`.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{by_address, by_width_chained, load, place, Address};
use super::Outcome;
use crate::cpu::Cpu;
use crate::exec::alu::{Adc, Add, And, Binary, Dec, Inc, Neg, Not, Or, Sbb, Sub, Unary, Xor};
use crate::exec::select::{in_memory, is_immediate, width};
use crate::flags::Flags;
use crate::uop::{Handler, Uop};
use crate::word::Word;

/// What becomes of the flags that an instruction leaves.
pub trait Record: 'static {
    fn record(cpu: &mut Cpu, flags: Flags);
}

/// Somebody may see them.
pub struct Live;

/// The next instruction that looks at flags, or that may fault, comes behind one that replaces them all.
pub struct Dead;

impl Record for Live {
    #[inline(always)]
    fn record(cpu: &mut Cpu, flags: Flags) {
        cpu.flags = flags;
    }
}

impl Record for Dead {
    #[inline(always)]
    fn record(_cpu: &mut Cpu, _flags: Flags) {}
}

pub fn handler<R: Record>(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Add => binary::<R, self::Add>(insn, uop),
        Mnemonic::Or => binary::<R, self::Or>(insn, uop),
        Mnemonic::Adc => binary::<R, self::Adc>(insn, uop),
        Mnemonic::Sbb => binary::<R, self::Sbb>(insn, uop),
        Mnemonic::And => binary::<R, self::And>(insn, uop),
        Mnemonic::Sub => binary::<R, self::Sub>(insn, uop),
        Mnemonic::Xor => binary::<R, self::Xor>(insn, uop),
        Mnemonic::Cmp => comparison::<self::Sub>(insn, uop),
        Mnemonic::Test => comparison::<self::And>(insn, uop),
        Mnemonic::Inc => unary::<R, self::Inc>(insn, uop),
        Mnemonic::Dec => unary::<R, self::Dec>(insn, uop),
        Mnemonic::Neg => unary::<R, self::Neg>(insn, uop),
        Mnemonic::Not => unary::<Dead, self::Not>(insn, uop),
        _ => None,
    }
}

// ---- two operands ---------------------------------------------------------------------------------------------------------------------

fn binary<R: Record, O: Binary>(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1)) {
        (true, _, true) => by_address!(uop, width(insn, 0), binary_mi, R, O),
        (true, _, false) => by_address!(uop, width(insn, 1), binary_mr, R, O),
        (_, true, _) => by_address!(uop, width(insn, 0), binary_rm, R, O),
        (_, _, true) => by_width_chained!(width(insn, 0), binary_ri, R, O),
        _ => by_width_chained!(width(insn, 0), binary_rr, R, O),
    }
}

#[inline(always)]
fn into_register<R: Record, O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop, b: W) -> Outcome {
    let (result, flags) = O::apply::<W>(cpu.flags, cpu.reg(uop.reg[0]), b);
    cpu.set_reg(uop.reg[0], result);
    R::record(cpu, flags);
    Outcome::Done
}

#[inline(always)]
fn into_memory<R: Record, O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop, b: W) -> Outcome {
    let Some(place) = place::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    let (result, flags) = O::apply::<W>(cpu.flags, place.read(), b);
    place.write(result);
    R::record(cpu, flags);
    Outcome::Done
}

#[inline(always)]
fn binary_rr<R: Record, O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    into_register::<R, O, W>(cpu, uop, cpu.reg(uop.reg[1]))
}

#[inline(always)]
fn binary_ri<R: Record, O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    into_register::<R, O, W>(cpu, uop, W::truncate(uop.imm))
}

#[inline(always)]
fn binary_rm<R: Record, O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(b) = load::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    into_register::<R, O, W>(cpu, uop, b)
}

#[inline(always)]
fn binary_mr<R: Record, O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    into_memory::<R, O, A, W>(cpu, uop, cpu.reg(uop.reg[1]))
}

#[inline(always)]
fn binary_mi<R: Record, O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    into_memory::<R, O, A, W>(cpu, uop, W::truncate(uop.imm))
}

// ---- CMP and TEST ---------------------------------------------------------------------------------------------------------------------

fn comparison<O: Binary>(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1)) {
        (true, _, true) => by_address!(uop, width(insn, 0), compare_mi, O),
        (true, _, false) => by_address!(uop, width(insn, 1), compare_mr, O),
        (_, true, _) => by_address!(uop, width(insn, 0), compare_rm, O),
        (_, _, true) => by_width_chained!(width(insn, 0), compare_ri, O),
        _ => by_width_chained!(width(insn, 0), compare_rr, O),
    }
}

#[inline(always)]
fn compare<O: Binary, W: Word>(cpu: &mut Cpu, a: W, b: W) -> Outcome {
    cpu.flags = O::apply::<W>(cpu.flags, a, b).1;
    Outcome::Done
}

#[inline(always)]
pub fn compare_rr<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]))
}

#[inline(always)]
pub fn compare_ri<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), W::truncate(uop.imm))
}

#[inline(always)]
fn compare_rm<O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(b) = load::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), b)
}

#[inline(always)]
fn compare_mr<O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(a) = load::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    compare::<O, W>(cpu, a, cpu.reg(uop.reg[1]))
}

#[inline(always)]
pub fn compare_mi<O: Binary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(a) = load::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    compare::<O, W>(cpu, a, W::truncate(uop.imm))
}

// ---- one operand ----------------------------------------------------------------------------------------------------------------------

fn unary<R: Record, O: Unary>(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    match in_memory(insn, 0) {
        true => by_address!(uop, width(insn, 0), unary_m, R, O),
        false => by_width_chained!(width(insn, 0), unary_r, R, O),
    }
}

#[inline(always)]
fn unary_r<R: Record, O: Unary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let (result, flags) = O::apply::<W>(cpu.flags, cpu.reg(uop.reg[0]));
    cpu.set_reg(uop.reg[0], result);
    R::record(cpu, flags);
    Outcome::Done
}

#[inline(always)]
fn unary_m<R: Record, O: Unary, A: Address, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let Some(place) = place::<A, W>(cpu, uop) else { return Outcome::GiveUp };
    let (result, flags) = O::apply::<W>(cpu.flags, place.read());
    place.write(result);
    R::record(cpu, flags);
    Outcome::Done
}
