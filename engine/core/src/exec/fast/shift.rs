//! Shifts and rotates of registers, and products. The operations themselves are those of `exec::shift` and `exec::muldiv`.

use iced_x86::{Instruction, Mnemonic};

use super::alu::Record;
use super::operand::by_width_chained;
use super::Outcome;
use crate::cpu::Cpu;
use crate::exec::muldiv::{exceeds_sign, multiply_signed};
use crate::exec::select::{in_memory, is_immediate, width};
use crate::exec::shift::{self, Count, Shift};
use crate::uop::{Handler, Uop};
use crate::word::Word;

pub fn handler<R: Record>(insn: &Instruction) -> Option<Handler> {
    if (0..insn.op_count()).any(|n| in_memory(insn, n)) {
        return None;
    }
    match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => by_count::<R, shift::Shl>(insn),
        Mnemonic::Shr => by_count::<R, shift::Shr>(insn),
        Mnemonic::Sar => by_count::<R, shift::Sar>(insn),
        Mnemonic::Rol => by_count::<R, shift::Rol>(insn),
        Mnemonic::Ror => by_count::<R, shift::Ror>(insn),
        Mnemonic::Imul => match insn.op_count() {
            2 => by_width_chained!(width(insn, 0), imul, R),
            3 => by_width_chained!(width(insn, 0), imul_immediate, R),
            _ => None,
        },
        _ => None,
    }
}

fn by_count<R: Record, O: Shift + 'static>(insn: &Instruction) -> Option<Handler> {
    match is_immediate(insn, 1) {
        true => by_width_chained!(width(insn, 0), shift, R, O, shift::ByImmediate),
        false => by_width_chained!(width(insn, 0), shift, R, O, shift::ByCl),
    }
}

#[inline(always)]
fn shift<R: Record, O: Shift, C: Count, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    let count = shift::mask_count::<W>(C::get(cpu, uop));
    let (result, flags) = shift::apply::<O, W>(cpu.silicon, cpu.flags, cpu.reg(uop.reg[0]), count);
    cpu.set_reg(uop.reg[0], result);
    R::record(cpu, flags);
    Outcome::Done
}

#[inline(always)]
fn product<R: Record, W: Word>(cpu: &mut Cpu, uop: &Uop, a: W, b: W) -> Outcome {
    let (low, high) = multiply_signed(a, b);
    cpu.set_reg(uop.reg[0], low);
    R::record(cpu, cpu.silicon.product(cpu.flags, low, exceeds_sign(low, high)));
    Outcome::Done
}

#[inline(always)]
fn imul<R: Record, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    product::<R, W>(cpu, uop, cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]))
}

#[inline(always)]
fn imul_immediate<R: Record, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Outcome {
    product::<R, W>(cpu, uop, cpu.reg(uop.reg[1]), W::truncate(uop.imm))
}
