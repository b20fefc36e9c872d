//! SSE3 and SSE4.1 floating point across lanes: HADDPS, HSUBPD, ADDSUBPS, DPPS and siblings (SDM vol. 2), made of SSE2 operations.

use iced_x86::{Instruction, Mnemonic};

use super::float::{float, Float};
use super::lanes::{build, Lane};
use super::operand::{halves, vector_source, Source, Vector};
use crate::cpu::Cpu;
use crate::exec::float::unit::simd;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Haddps | Mnemonic::Vhaddps => vector_source!(insn, float, Haddps),
        Mnemonic::Hsubps | Mnemonic::Vhsubps => vector_source!(insn, float, Hsubps),
        Mnemonic::Haddpd | Mnemonic::Vhaddpd => vector_source!(insn, float, Haddpd),
        Mnemonic::Hsubpd | Mnemonic::Vhsubpd => vector_source!(insn, float, Hsubpd),
        Mnemonic::Addsubps | Mnemonic::Vaddsubps => vector_source!(insn, float, Addsubps),
        Mnemonic::Addsubpd | Mnemonic::Vaddsubpd => vector_source!(insn, float, Addsubpd),
        Mnemonic::Dpps | Mnemonic::Vdpps => vector_source!(insn, dot_single),
        Mnemonic::Dppd | Mnemonic::Vdppd => vector_source!(insn, dot_double),
        _ => return None,
    })
}

/// Every second lane of `a:b`, from lane `first` on.
#[inline(always)]
fn every_second<L: Lane>(a: u128, b: u128, first: usize) -> u128 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let half = 8 / L::BYTES;
    u128::from_le_bytes(build::<L, 16>(|n| L::get(if n < half { &a } else { &b }, 2 * (n % half) + first)))
}

/// Declares operations on neighbouring lanes.
macro_rules! neighbours {
    ($($operation:ident => $op:literal $lane:ty;)*) => {$(
        struct $operation;
        impl Float for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32) {
                simd!(mxcsr, $op, every_second::<$lane>(a, b, 0), every_second::<$lane>(a, b, 1))
            }
        }
    )*};
}
neighbours! {
    Haddps => "addps" u32;
    Hsubps => "subps" u32;
    Haddpd => "addpd" u64;
    Hsubpd => "subpd" u64;
}

/// Declares operations that subtract in the even lanes (`$even`) and add in the odd ones. The lanes of the other half are zero, which
/// raises no flag.
macro_rules! alternating {
    ($($operation:ident => $add:literal $sub:literal $even:expr;)*) => {$(
        struct $operation;
        impl Float for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32) {
                let (sum, raised) = simd!(mxcsr, $add, a & !$even, b & !$even);
                let (difference, more) = simd!(mxcsr, $sub, a & $even, b & $even);
                (sum & !$even | difference & $even, raised | more)
            }
        }
    )*};
}
const EVEN_SINGLE: u128 = 0x0000_0000_ffff_ffff_0000_0000_ffff_ffff;
const EVEN_DOUBLE: u128 = 0xffff_ffff_ffff_ffff;
alternating! {
    Addsubps => "addps" "subps" EVEN_SINGLE;
    Addsubpd => "addpd" "subpd" EVEN_DOUBLE;
}

/// `value` in the lanes whose bit in `lanes` is set, zero in the others.
#[inline(always)]
fn keep<L: Lane + Default>(value: u128, lanes: u64) -> u128 {
    let bytes = value.to_le_bytes();
    u128::from_le_bytes(build::<L, 16>(|n| if lanes >> n & 1 != 0 { L::get(&bytes, n) } else { L::default() }))
}

/// Both halves' results and flags of a step.
#[inline(always)]
fn step<S: Source>(cpu: &mut Cpu, half: impl Fn(usize) -> (u128, u32)) -> Exec<Vector> {
    let (low, raised) = half(0);
    let (high, more) = if S::HALVES == 2 { half(1) } else { (0, 0) };
    cpu.raise_simd(raised | more)?;
    Ok([low, high])
}

/// Each step of a dot product may raise its own exception, and keeps the following steps from running (SDM vol. 2, DPPS).
fn dot_single<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    const LOW: u128 = u32::MAX as u128;
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let mxcsr = cpu.state.fpu.mxcsr;
    let products = step::<S>(cpu, |n| simd!(mxcsr, "mulps", keep::<u32>(a[n], uop.imm >> 4), keep::<u32>(b[n], uop.imm >> 4)))?;
    let pairs = step::<S>(cpu, |n| {
        let products = products[n];
        simd!(mxcsr, "addps", every_second::<u32>(products, 0, 0), every_second::<u32>(products, 0, 1))
    })?;
    let sums = step::<S>(cpu, |n| simd!(mxcsr, "addss", pairs[n] & LOW, pairs[n] >> 32 & LOW))?;
    let result = halves::<S>(|n| {
        let sum = sums[n] as u32;
        keep::<u32>(u128::from_le_bytes(build::<u32, 16>(|_| sum)), uop.imm)
    });
    S::put(cpu, uop.reg[0], result);
    Ok(())
}

fn dot_double<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::xmm(cpu, uop)?;
    let [a, _] = S::first(cpu, uop);
    let mxcsr = cpu.state.fpu.mxcsr;
    let (products, raised) = simd!(mxcsr, "mulpd", keep::<u64>(a, uop.imm >> 4), keep::<u64>(b, uop.imm >> 4));
    cpu.raise_simd(raised)?;
    let (sum, raised) = simd!(mxcsr, "addsd", products, products >> 64);
    cpu.raise_simd(raised)?;
    let sum = sum as u64;
    let all = u128::from_le_bytes(build::<u64, 16>(|_| sum));
    S::put_xmm(cpu, uop.reg[0], keep::<u64>(all, uop.imm));
    Ok(())
}
