//! String comparison: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM vol. 2, 4.1).

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::{gpr, rflags};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let memory = insn.op1_kind() == OpKind::Memory;
    Some(match (insn.mnemonic(), memory) {
        (Mnemonic::Pcmpistri, false) => implicit::<false, true>,
        (Mnemonic::Pcmpistri, true) => implicit::<true, true>,
        (Mnemonic::Pcmpistrm, false) => implicit::<false, false>,
        (Mnemonic::Pcmpistrm, true) => implicit::<true, false>,
        (Mnemonic::Pcmpestri, false) => explicit::<false, true, false>,
        (Mnemonic::Pcmpestri, true) => explicit::<true, true, false>,
        (Mnemonic::Pcmpestrm, false) => explicit::<false, false, false>,
        (Mnemonic::Pcmpestrm, true) => explicit::<true, false, false>,
        (Mnemonic::Pcmpestri64, false) => explicit::<false, true, true>,
        (Mnemonic::Pcmpestri64, true) => explicit::<true, true, true>,
        (Mnemonic::Pcmpestrm64, false) => explicit::<false, false, true>,
        (Mnemonic::Pcmpestrm64, true) => explicit::<true, false, true>,
        _ => return None,
    })
}

fn operands<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec<(u128, u128)> {
    cpu.require_sse()?;
    let second = if MEMORY { cpu.load(uop)? } else { cpu.xmm(uop.reg[1]) };
    Ok((cpu.xmm(uop.reg[0]), second))
}

/// Strings that end at their first zero element.
fn implicit<const MEMORY: bool, const INDEX: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (first, second) = operands::<MEMORY>(cpu, uop)?;
    let form = Form(uop.imm as u8);
    let end = |value| (0..form.count()).find(|n| form.element(value, *n) == 0).unwrap_or(form.count());
    finish::<INDEX>(cpu, form, Text { value: first, length: end(first) }, Text { value: second, length: end(second) })
}

/// Strings whose lengths are in (R)AX and (R)DX, as absolute values.
fn explicit<const MEMORY: bool, const INDEX: bool, const WIDE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (first, second) = operands::<MEMORY>(cpu, uop)?;
    let form = Form(uop.imm as u8);
    let length = |register: u64| {
        let magnitude = if WIDE { (register as i64).unsigned_abs() } else { u64::from((register as i32).unsigned_abs()) };
        magnitude.min(form.count() as u64) as usize
    };
    let (a, b) = (length(cpu.gpr(gpr::RAX)), length(cpu.gpr(gpr::RDX)));
    finish::<INDEX>(cpu, form, Text { value: first, length: a }, Text { value: second, length: b })
}

/// The immediate operand.
#[derive(Clone, Copy)]
struct Form(u8);

impl Form {
    fn words(self) -> bool {
        self.0 & 1 != 0
    }
    fn signed(self) -> bool {
        self.0 & 2 != 0
    }
    /// Elements of an operand.
    fn count(self) -> usize {
        if self.words() {
            8
        } else {
            16
        }
    }
    fn element(self, value: u128, n: usize) -> i32 {
        match (self.words(), self.signed()) {
            (false, false) => (value >> (8 * n)) as u8 as i32,
            (false, true) => (value >> (8 * n)) as i8 as i32,
            (true, false) => (value >> (16 * n)) as u16 as i32,
            (true, true) => (value >> (16 * n)) as i16 as i32,
        }
    }
}

#[derive(Clone, Copy)]
struct Text {
    value: u128,
    length: usize,
}

/// The aggregated comparison before polarity: bit j belongs to element j of `second`.
fn compare(form: Form, first: Text, second: Text) -> u32 {
    let count = form.count();
    let (a, b) = (|n| form.element(first.value, n), |n| form.element(second.value, n));
    let holds = |j: usize| match form.0 >> 2 & 3 {
        0 => j < second.length && (0..first.length).any(|i| a(i) == b(j)),
        1 => j < second.length && (0..first.length / 2).any(|pair| a(2 * pair) <= b(j) && b(j) <= a(2 * pair + 1)),
        2 => match (j < first.length, j < second.length) {
            (true, true) => a(j) == b(j),
            (one, other) => one == other,
        },
        _ => (0..count - j).all(|i| i >= first.length || i + j < second.length && a(i) == b(i + j)),
    };
    (0..count).filter(|j| holds(*j)).fold(0, |bits, j| bits | 1 << j)
}

fn finish<const INDEX: bool>(cpu: &mut Cpu, form: Form, first: Text, second: Text) -> Exec {
    let count = form.count();
    let everything = (1u32 << count) - 1;
    let result = compare(form, first, second)
        ^ match form.0 >> 4 & 3 {
            1 => everything,
            3 => (1u32 << second.length) - 1,
            _ => 0,
        };
    if INDEX {
        let index = match (result, form.0 & 0x40 != 0) {
            (0, _) => count as u32,
            (_, false) => result.trailing_zeros(),
            (_, true) => 31 - result.leading_zeros(),
        };
        cpu.set_gpr(gpr::RCX, index.into());
    } else {
        cpu.set_xmm(0, mask(form, result));
    }
    let mut image = 0;
    for (set, bit) in
        [(result != 0, rflags::CF), (second.length < count, rflags::ZF), (first.length < count, rflags::SF), (result & 1 != 0, rflags::OF)]
    {
        if set {
            image |= bit;
        }
    }
    cpu.flags = Flags::from_bits(image);
    Ok(())
}

/// The result as bits, or widened to all-ones elements.
fn mask(form: Form, result: u32) -> u128 {
    if form.0 & 0x40 == 0 {
        return result.into();
    }
    let width = if form.words() { 16 } else { 8 };
    (0..form.count()).filter(|n| result >> n & 1 != 0).fold(0, |all, n| all | ((1u128 << width) - 1) << (width * n))
}
