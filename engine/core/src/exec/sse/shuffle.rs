//! Rearranging lanes: pack, unpack, shuffle, blend, align (SDM vol. 2: PACKSSWB, PUNPCKLBW, PSHUFD, SHUFPS, PBLENDW and siblings).

use iced_x86::{Instruction, Mnemonic};

use super::form::{immediate_operations, operations};
use super::lanes::{build, Lane};
use super::operand::{halves, vector_source, Encoding, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Pblendvb | Mnemonic::Vpblendvb => Some(vector_source!(insn, variable_blend, u8)),
        Mnemonic::Blendvps | Mnemonic::Vblendvps => Some(vector_source!(insn, variable_blend, u32)),
        Mnemonic::Blendvpd | Mnemonic::Vblendvpd => Some(vector_source!(insn, variable_blend, u64)),
        _ => fixed::handler(insn).or_else(|| selected(insn)),
    }
}

mod fixed {
    use super::{operations, pack, pick, unpack};

    operations! {
        Punpcklbw | Vpunpcklbw => |a, b| unpack::<u8, N>(a, b, 0);
        Punpcklwd | Vpunpcklwd => |a, b| unpack::<u16, N>(a, b, 0);
        Punpckldq | Vpunpckldq => |a, b| unpack::<u32, N>(a, b, 0);
        Punpcklqdq | Vpunpcklqdq => |a, b| unpack::<u64, N>(a, b, 0);
        Punpckhbw | Vpunpckhbw => |a, b| unpack::<u8, N>(a, b, N / 2);
        Punpckhwd | Vpunpckhwd => |a, b| unpack::<u16, N>(a, b, N / 4);
        Punpckhdq | Vpunpckhdq => |a, b| unpack::<u32, N>(a, b, N / 8);
        Punpckhqdq | Vpunpckhqdq => |a, b| unpack::<u64, N>(a, b, N / 16);
        Unpcklps | Vunpcklps => |a, b| unpack::<u32, N>(a, b, 0);
        Unpcklpd | Vunpcklpd => |a, b| unpack::<u64, N>(a, b, 0);
        Unpckhps | Vunpckhps => |a, b| unpack::<u32, N>(a, b, N / 8);
        Unpckhpd | Vunpckhpd => |a, b| unpack::<u64, N>(a, b, N / 16);
        Packsswb | Vpacksswb => |a, b| pack(a, b, |x: i16| x.clamp(-128, 127) as i8);
        Packuswb | Vpackuswb => |a, b| pack(a, b, |x: i16| x.clamp(0, 255) as u8);
        Packssdw | Vpackssdw => |a, b| pack(a, b, |x: i32| x.clamp(-32768, 32767) as i16);
        Packusdw | Vpackusdw => |a, b| pack(a, b, |x: i32| x.clamp(0, 65535) as u16);
        Pshufb | Vpshufb => |a, b| pick(a, b);
    }
}

immediate_operations! { selected:
    Pshufw => |_a, b, imm| build(|n| u16::get(&b, select(imm, n)));
    Pshufd | Vpshufd => |_a, b, imm| build(|n| u32::get(&b, select(imm, n)));
    Pshuflw | Vpshuflw => |_a, b, imm| build(|n| u16::get(&b, if n < 4 { select(imm, n) } else { n }));
    Pshufhw | Vpshufhw => |_a, b, imm| build(|n| u16::get(&b, if n < 4 { n } else { 4 + select(imm, n - 4) }));
    Shufps | Vshufps => |a, b, imm| build(|n| u32::get(if n < 2 { &a } else { &b }, select(imm, n)));
    Shufpd | Vshufpd by 2 => |a, b, imm| build(|n| u64::get(if n == 0 { &a } else { &b }, usize::from(imm >> n & 1)));
    Palignr | Vpalignr => |a, b, imm| align(a, b, imm.into());
    Pblendw | Vpblendw => |a, b, imm| build(|n| u16::get(if imm >> n & 1 != 0 { &b } else { &a }, n));
    Blendps | Vblendps by 4 => |a, b, imm| build(|n| u32::get(if imm >> n & 1 != 0 { &b } else { &a }, n));
    Blendpd | Vblendpd by 2 => |a, b, imm| build(|n| u64::get(if imm >> n & 1 != 0 { &b } else { &a }, n));
    Mpsadbw | Vmpsadbw by 3 => |a, b, imm| sums_of_differences(a, b, imm);
}

/// Two-bit selector number `n` of `imm`.
#[inline(always)]
fn select(imm: u8, n: usize) -> usize {
    usize::from(imm >> (2 * n) & 3)
}

/// Interleaves the lanes of `a` and `b` from lane `first` on.
#[inline(always)]
fn unpack<L: Lane, const N: usize>(a: [u8; N], b: [u8; N], first: usize) -> [u8; N] {
    build(|n| L::get(if n & 1 == 0 { &a } else { &b }, first + n / 2))
}

/// Lanes half as wide: first those of `a`, then those of `b`.
#[inline(always)]
fn pack<From: Lane, To: Lane, const N: usize>(a: [u8; N], b: [u8; N], saturate: impl Fn(From) -> To) -> [u8; N] {
    let half = N / From::BYTES;
    build(|n| saturate(if n < half { From::get(&a, n) } else { From::get(&b, n - half) }))
}

/// Bytes of `a` by the indices in `b`; zero where the index is negative.
#[inline(always)]
fn pick<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N] {
    build(|n| if b[n] & 0x80 != 0 { 0 } else { a[usize::from(b[n]) & (N - 1)] })
}

/// The bytes of `a:b` from byte `shift` on.
#[inline(always)]
fn align<const N: usize>(a: [u8; N], b: [u8; N], shift: usize) -> [u8; N] {
    build(|n| match n + shift {
        at if at < N => b[at],
        at if at < 2 * N => a[at - N],
        _ => 0u8,
    })
}

/// Eight sums of four absolute differences: a group of `b` against each place of a window of `a` (MPSADBW).
#[inline(always)]
fn sums_of_differences<const N: usize>(a: [u8; N], b: [u8; N], imm: u8) -> [u8; N] {
    let (window, group) = (usize::from(imm >> 2 & 1) * 4, usize::from(imm & 3) * 4);
    build(|n| (0..4).map(|k| u16::from(a[(window + n + k) % N].abs_diff(b[(group + k) % N]))).sum::<u16>())
}

/// Lanes of the source where the top bit of the lane of the mask is set.
fn variable_blend<L: Lane, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let mask = cpu.ymm(S::Encoding::mask(uop));
    let result = halves::<S>(|half| {
        let (a, b, mask) = (a[half].to_le_bytes(), b[half].to_le_bytes(), mask[half].to_le_bytes());
        let chosen = build::<L, 16>(|n| L::get(if mask[(n + 1) * L::BYTES - 1] & 0x80 != 0 { &b } else { &a }, n));
        u128::from_le_bytes(chosen)
    });
    S::put(cpu, uop.reg[0], result);
    Ok(())
}
