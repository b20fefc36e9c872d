//! Conversions between XMM registers and general or MMX registers: CVTSI2SD, CVTTSD2SI, CVTPI2PS and siblings (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::operand::{by_encoding, is_memory, legacy_source, vector_source, Encoding, Source};
use crate::cpu::Cpu;
use crate::exec::float::unit::{simd, simd_from_integer, simd_to_integer};
use crate::model::Silicon;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

const LOW64: u128 = u64::MAX as u128;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let from = |register32: Handler, register64: Handler, memory32: Handler, memory64: Handler| {
        let last = insn.op_count() - 1;
        let memory = is_memory(insn, last);
        let wide = if memory { insn.memory_size().size() == 8 } else { insn.op_register(last).is_gpr64() };
        match (memory, wide) {
            (false, false) => register32,
            (false, true) => register64,
            (true, false) => memory32,
            (true, true) => memory64,
        }
    };
    let wide = insn.op0_register().is_gpr64();
    Some(match insn.mnemonic() {
        Mnemonic::Cvtsi2ss | Mnemonic::Vcvtsi2ss => from(
            by_encoding!(insn, from_register, u32, Cvtsi2ss32),
            by_encoding!(insn, from_register, u64, Cvtsi2ss64),
            by_encoding!(insn, from_memory, u32, Cvtsi2ss32),
            by_encoding!(insn, from_memory, u64, Cvtsi2ss64),
        ),
        Mnemonic::Cvtsi2sd | Mnemonic::Vcvtsi2sd => from(
            by_encoding!(insn, from_register, u32, Cvtsi2sd32),
            by_encoding!(insn, from_register, u64, Cvtsi2sd64),
            by_encoding!(insn, from_memory, u32, Cvtsi2sd32),
            by_encoding!(insn, from_memory, u64, Cvtsi2sd64),
        ),
        Mnemonic::Cvtss2si | Mnemonic::Vcvtss2si if wide => vector_source!(insn, to_integer, Cvtss2si64),
        Mnemonic::Cvtss2si | Mnemonic::Vcvtss2si => vector_source!(insn, to_integer, Cvtss2si32),
        Mnemonic::Cvttss2si | Mnemonic::Vcvttss2si if wide => vector_source!(insn, to_integer, Cvttss2si64),
        Mnemonic::Cvttss2si | Mnemonic::Vcvttss2si => vector_source!(insn, to_integer, Cvttss2si32),
        Mnemonic::Cvtsd2si | Mnemonic::Vcvtsd2si if wide => vector_source!(insn, to_integer, Cvtsd2si64),
        Mnemonic::Cvtsd2si | Mnemonic::Vcvtsd2si => vector_source!(insn, to_integer, Cvtsd2si32),
        Mnemonic::Cvttsd2si | Mnemonic::Vcvttsd2si if wide => vector_source!(insn, to_integer, Cvttsd2si64),
        Mnemonic::Cvttsd2si | Mnemonic::Vcvttsd2si => vector_source!(insn, to_integer, Cvttsd2si32),
        Mnemonic::Cvtpi2ps if is_memory(insn, 1) => pi2ps_memory,
        Mnemonic::Cvtpi2ps => pi2ps_register,
        Mnemonic::Cvtpi2pd if is_memory(insn, 1) => pi2pd_memory,
        Mnemonic::Cvtpi2pd => pi2pd_register,
        Mnemonic::Cvtps2pi => legacy_source!(insn, to_mm, Cvtps2pi),
        Mnemonic::Cvttps2pi => legacy_source!(insn, to_mm, Cvttps2pi),
        Mnemonic::Cvtpd2pi => legacy_source!(insn, to_mm, Cvtpd2pi),
        Mnemonic::Cvttpd2pi => legacy_source!(insn, to_mm, Cvttpd2pi),
        _ => return None,
    })
}

// ---- general registers --------------------------------------------------------------------------------------------------------------

trait FromInteger {
    fn apply(mxcsr: u32, a: u128, b: u64) -> (u128, u32);
}

trait ToInteger {
    fn apply(mxcsr: u32, b: u128) -> (u64, u32);
}

macro_rules! from_integer {
    ($($operation:ident => $op:literal $width:literal;)*) => {$(
        struct $operation;
        impl FromInteger for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, a: u128, b: u64) -> (u128, u32) {
                simd_from_integer!(mxcsr, $op, $width, a, b)
            }
        }
    )*};
}
from_integer! {
    Cvtsi2ss32 => "cvtsi2ss" ":e";
    Cvtsi2ss64 => "cvtsi2ss" ":r";
    Cvtsi2sd32 => "cvtsi2sd" ":e";
    Cvtsi2sd64 => "cvtsi2sd" ":r";
}

macro_rules! to_integer {
    ($($operation:ident => $op:literal $width:literal;)*) => {$(
        struct $operation;
        impl ToInteger for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, b: u128) -> (u64, u32) {
                simd_to_integer!(mxcsr, $op, $width, b)
            }
        }
    )*};
}
to_integer! {
    Cvtss2si32 => "cvtss2si" ":e";
    Cvtss2si64 => "cvtss2si" ":r";
    Cvttss2si32 => "cvttss2si" ":e";
    Cvttss2si64 => "cvttss2si" ":r";
    Cvtsd2si32 => "cvtsd2si" ":e";
    Cvtsd2si64 => "cvtsd2si" ":r";
    Cvttsd2si32 => "cvttsd2si" ":e";
    Cvttsd2si64 => "cvttsd2si" ":r";
}

fn convert_from<O: FromInteger, E: Encoding>(cpu: &mut Cpu, uop: &Uop, value: u64) -> Exec {
    let (result, flags) = O::apply(cpu.state.fpu.mxcsr, cpu.xmm(E::first(uop)), value);
    cpu.raise_simd(flags)?;
    E::put_xmm(cpu, uop.reg[0], result);
    Ok(())
}

fn from_register<W: Word, O: FromInteger, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.reg::<W>(E::second(uop)).zero_extend();
    convert_from::<O, E>(cpu, uop, value)
}

fn from_memory<W: Word, O: FromInteger, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load::<W>(uop)?.zero_extend();
    convert_from::<O, E>(cpu, uop, value)
}

/// A 32-bit result comes with the upper half of its register clear.
fn to_integer<O: ToInteger, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::xmm(cpu, uop)?;
    let (result, flags) = O::apply(cpu.state.fpu.mxcsr, b);
    cpu.raise_simd(flags)?;
    cpu.set_reg::<u64>(uop.reg[0], result);
    Ok(())
}

// ---- MMX registers ------------------------------------------------------------------------------------------------------------------

impl Cpu {
    /// [`Cpu::raise_simd`] of an instruction that enters MMX mode: AMD's silicon has entered it when the exception comes.
    fn raise_in_mmx(&mut self, flags: u32) -> Exec {
        if self.silicon == Silicon::Amd {
            self.touch_mmx();
        }
        self.raise_simd(flags)?;
        self.touch_mmx();
        Ok(())
    }
}

fn pi2ps(cpu: &mut Cpu, uop: &Uop, b: u64, enters_mmx: bool) -> Exec {
    let a = cpu.xmm(uop.reg[0]);
    let (result, flags) = simd!(cpu.state.fpu.mxcsr, "cvtdq2ps", a, u128::from(b));
    if enters_mmx {
        cpu.raise_in_mmx(flags)?;
    } else {
        cpu.raise_simd(flags)?;
    }
    cpu.set_xmm(uop.reg[0], a & !LOW64 | result & LOW64);
    Ok(())
}

fn pi2ps_register(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let b = cpu.mm(uop.reg[1]);
    pi2ps(cpu, uop, b, true)
}

/// With a memory operand it is an MMX instruction to Intel's silicon alone.
fn pi2ps_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let b = cpu.load::<u64>(uop)?;
    pi2ps(cpu, uop, b, cpu.silicon == Silicon::Intel)
}

fn pi2pd(cpu: &mut Cpu, uop: &Uop, b: u64) {
    // Every 32-bit integer is a double, so no flag can come.
    let (result, _) = simd!(cpu.state.fpu.mxcsr, "cvtdq2pd", 0, u128::from(b));
    cpu.set_xmm(uop.reg[0], result);
}

fn pi2pd_register(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let b = cpu.mm(uop.reg[1]);
    cpu.touch_mmx();
    pi2pd(cpu, uop, b);
    Ok(())
}

/// With a memory operand the instruction leaves the x87 state alone.
fn pi2pd_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let b = cpu.load::<u64>(uop)?;
    pi2pd(cpu, uop, b);
    Ok(())
}

/// A conversion to two integers in an MMX register.
trait ToMmx {
    fn apply(mxcsr: u32, b: u128) -> (u128, u32);
}

macro_rules! to_mmx {
    ($($operation:ident => $op:literal, $mask:expr;)*) => {$(
        struct $operation;
        impl ToMmx for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, b: u128) -> (u128, u32) {
                simd!(mxcsr, $op, 0, b & $mask)
            }
        }
    )*};
}
to_mmx! {
    Cvtps2pi => "cvtps2dq", LOW64;
    Cvttps2pi => "cvttps2dq", LOW64;
    Cvtpd2pi => "cvtpd2dq", u128::MAX;
    Cvttpd2pi => "cvttpd2dq", u128::MAX;
}

fn to_mm<O: ToMmx, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.require_mmx()?;
    let b = S::xmm(cpu, uop)?;
    let (result, flags) = O::apply(cpu.state.fpu.mxcsr, b);
    cpu.raise_in_mmx(flags)?;
    cpu.set_mm(uop.reg[0], result as u64);
    Ok(())
}
