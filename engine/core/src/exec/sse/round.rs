//! ROUNDPS, ROUNDPD, ROUNDSS, ROUNDSD (SDM vol. 2), on the bits of the numbers.

use iced_x86::{Instruction, Mnemonic};

use super::lanes::{build, Lane};
use super::operand::{halves, vector_source, Source};
use crate::cpu::Cpu;
use crate::exec::float::mxcsr::{DAZ, FLAGS, INVALID, PRECISION, ROUNDING_SHIFT};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Roundps | Mnemonic::Vroundps => vector_source!(insn, round, u32, Packed),
        Mnemonic::Roundpd | Mnemonic::Vroundpd => vector_source!(insn, round, u64, Packed),
        Mnemonic::Roundss | Mnemonic::Vroundss => vector_source!(insn, round, u32, Scalar),
        Mnemonic::Roundsd | Mnemonic::Vroundsd => vector_source!(insn, round, u64, Scalar),
        _ => return None,
    })
}

/// How many lanes an instruction rounds.
trait Width {
    const LANES: usize;
}
struct Packed;
struct Scalar;
impl Width for Packed {
    const LANES: usize = usize::MAX;
}
impl Width for Scalar {
    const LANES: usize = 1;
}

/// Immediate: round as MXCSR says; do not report inexact results.
const BY_MXCSR: u64 = 4;
const QUIET: u64 = 8;

/// A binary floating-point format, by its bits.
trait Float: Lane {
    const FRACTION: u32;
    const WIDTH: u32;
    fn bits(self) -> u64;
    fn from_bits(bits: u64) -> Self;
}
impl Float for u32 {
    const FRACTION: u32 = 23;
    const WIDTH: u32 = 32;
    fn bits(self) -> u64 {
        self.into()
    }
    fn from_bits(bits: u64) -> Self {
        bits as u32
    }
}
impl Float for u64 {
    const FRACTION: u32 = 52;
    const WIDTH: u32 = 64;
    fn bits(self) -> u64 {
        self
    }
    fn from_bits(bits: u64) -> Self {
        bits
    }
}

/// `bits` rounded to an integral value in direction `mode` (0 nearest even, 1 down, 2 up, 3 to zero), and the flags raised.
fn round_lane<F: Float>(bits: u64, mode: u32, daz: bool) -> (u64, u32) {
    let sign = bits >> (F::WIDTH - 1) << (F::WIDTH - 1);
    let exponent_bits = F::WIDTH - 1 - F::FRACTION;
    let magnitude = bits ^ sign;
    let exponent = (magnitude >> F::FRACTION) as u32;
    let special = (1 << exponent_bits) - 1;
    let bias = special >> 1;
    if exponent == special {
        let quiet = 1 << (F::FRACTION - 1);
        let signaling = magnitude & ((1 << F::FRACTION) - 1) != 0 && magnitude & quiet == 0;
        return if signaling { (bits | quiet, INVALID) } else { (bits, 0) };
    }
    if magnitude == 0 || exponent == 0 && daz {
        return (sign, 0);
    }
    if exponent >= bias + F::FRACTION {
        return (bits, 0);
    }
    let away = mode == if sign == 0 { 2 } else { 1 };
    if exponent < bias {
        let one = u64::from(bias) << F::FRACTION;
        let above_half = exponent == bias - 1 && magnitude & ((1 << F::FRACTION) - 1) != 0;
        let to_one = away || mode == 0 && above_half;
        return (sign | if to_one { one } else { 0 }, PRECISION);
    }
    let below = F::FRACTION - (exponent - bias);
    let lost = magnitude & ((1 << below) - 1);
    let kept = magnitude - lost;
    if lost == 0 {
        return (bits, 0);
    }
    let half = 1 << (below - 1);
    let odd = kept >> below & 1 != 0;
    let up = away || mode == 0 && (lost > half || lost == half && odd);
    (sign | if up { kept + (1 << below) } else { kept }, PRECISION)
}

fn round<F: Float, W: Width, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?.map(u128::to_le_bytes);
    let a = S::first(cpu, uop).map(u128::to_le_bytes);
    let mxcsr = cpu.state.fpu.mxcsr;
    let mode = if uop.imm & BY_MXCSR != 0 { mxcsr >> ROUNDING_SHIFT & 3 } else { uop.imm as u32 & 3 };
    let lane = |half: usize, n| round_lane::<F>(F::get(&b[half], n).bits(), mode, mxcsr & DAZ != 0);
    let lanes = W::LANES.min(16 / F::BYTES);
    let raised = (0..S::HALVES * lanes).fold(0, |flags, n| flags | lane(n / lanes, n % lanes).1);
    let hidden = if uop.imm & QUIET != 0 { PRECISION } else { 0 };
    cpu.raise_simd(raised & FLAGS & !hidden)?;
    let rounded = |half: usize| build::<F, 16>(|n| if n < lanes { F::from_bits(lane(half, n).0) } else { F::get(&a[half], n) });
    let result = halves::<S>(|half| u128::from_le_bytes(rounded(half)));
    S::put(cpu, uop.reg[0], result);
    Ok(())
}
