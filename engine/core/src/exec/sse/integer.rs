//! Packed integer arithmetic and comparison, MMX to SSE4.2 (SDM vol. 2: PADDB and its siblings).

use super::form::operations;
use super::lanes::{build, map, zip, Lane};

/// All ones where `condition` holds.
#[inline(always)]
fn ones<const N: usize, L: Lane>(a: [u8; N], b: [u8; N], condition: impl Fn(&L, &L) -> bool, yes: L, no: L) -> [u8; N] {
    zip(a, b, |x: L, y: L| if condition(&x, &y) { yes } else { no })
}

/// Rounded average of two bytes or words.
#[inline(always)]
fn average(x: u32, y: u32) -> u32 {
    (x + y + 1) >> 1
}

/// Sum of the absolute differences of each group of eight bytes, as a 64-bit lane.
#[inline(always)]
fn sad<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N] {
    build(|group| (0..8).map(|n| u64::from(a[8 * group + n].abs_diff(b[8 * group + n]))).sum::<u64>())
}

/// Each 32-bit lane: the sum of the products of its two signed words.
#[inline(always)]
fn multiply_add_words<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N] {
    let product = |n| i32::from(i16::get(&a, n)) * i32::from(i16::get(&b, n));
    build(|n| product(2 * n).wrapping_add(product(2 * n + 1)))
}

/// Each word: the saturated sum of two products of an unsigned byte of `a` and a signed byte of `b`.
#[inline(always)]
fn multiply_add_bytes<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N] {
    let product = |n: usize| i32::from(a[n]) * i32::from(b[n] as i8);
    build(|n| (product(2 * n) + product(2 * n + 1)).clamp(i16::MIN.into(), i16::MAX.into()) as i16)
}

/// Lane `n` is `f` of a pair of neighbours: first the pairs of `a`, then those of `b`.
#[inline(always)]
fn horizontal<L: Lane, const N: usize>(a: [u8; N], b: [u8; N], f: impl Fn(L, L) -> L) -> [u8; N] {
    let half = N / L::BYTES / 2;
    build(|n| {
        let (from, at) = if n < half { (&a, 2 * n) } else { (&b, 2 * (n - half)) };
        f(L::get(from, at), L::get(from, at + 1))
    })
}

/// `x` with the sign of `y`: negated where `y` is negative, zero where it is zero.
macro_rules! sign {
    ($x:ident, $y:ident) => {
        match $y.signum() {
            0 => 0,
            1 => $x,
            _ => $x.wrapping_neg(),
        }
    };
}

/// Minimum of the eight words of `b`, and its place (PHMINPOSUW).
#[inline(always)]
fn minimum_position<const N: usize>(b: [u8; N]) -> [u8; N] {
    let mut result = [0; N];
    let (at, value) = (0..N / 2).map(|n| (n, u16::get(&b, n))).min_by_key(|pair| pair.1).unwrap_or_default();
    value.put(&mut result, 0);
    (at as u16).put(&mut result, 1);
    result
}

operations! {
    Paddb | Vpaddb => |a, b| zip(a, b, u8::wrapping_add);
    Paddw | Vpaddw => |a, b| zip(a, b, u16::wrapping_add);
    Paddd | Vpaddd => |a, b| zip(a, b, u32::wrapping_add);
    Paddq | Vpaddq => |a, b| zip(a, b, u64::wrapping_add);
    Psubb | Vpsubb => |a, b| zip(a, b, u8::wrapping_sub);
    Psubw | Vpsubw => |a, b| zip(a, b, u16::wrapping_sub);
    Psubd | Vpsubd => |a, b| zip(a, b, u32::wrapping_sub);
    Psubq | Vpsubq => |a, b| zip(a, b, u64::wrapping_sub);
    Paddsb | Vpaddsb => |a, b| zip(a, b, i8::saturating_add);
    Paddsw | Vpaddsw => |a, b| zip(a, b, i16::saturating_add);
    Paddusb | Vpaddusb => |a, b| zip(a, b, u8::saturating_add);
    Paddusw | Vpaddusw => |a, b| zip(a, b, u16::saturating_add);
    Psubsb | Vpsubsb => |a, b| zip(a, b, i8::saturating_sub);
    Psubsw | Vpsubsw => |a, b| zip(a, b, i16::saturating_sub);
    Psubusb | Vpsubusb => |a, b| zip(a, b, u8::saturating_sub);
    Psubusw | Vpsubusw => |a, b| zip(a, b, u16::saturating_sub);

    Pmullw | Vpmullw => |a, b| zip(a, b, u16::wrapping_mul);
    Pmulld | Vpmulld => |a, b| zip(a, b, u32::wrapping_mul);
    Pmulhw | Vpmulhw => |a, b| zip(a, b, |x: i16, y: i16| ((i32::from(x) * i32::from(y)) >> 16) as i16);
    Pmulhuw | Vpmulhuw => |a, b| zip(a, b, |x: u16, y: u16| ((u32::from(x) * u32::from(y)) >> 16) as u16);
    Pmulhrsw | Vpmulhrsw => |a, b| zip(a, b, |x: i16, y: i16| ((((i32::from(x) * i32::from(y)) >> 14) + 1) >> 1) as i16);
    Pmuludq | Vpmuludq => |a, b| zip(a, b, |x: u64, y: u64| (x & 0xffff_ffff) * (y & 0xffff_ffff));
    Pmuldq | Vpmuldq => |a, b| zip(a, b, |x: i64, y: i64| i64::from(x as i32) * i64::from(y as i32));
    Pmaddwd | Vpmaddwd => |a, b| multiply_add_words(a, b);
    Pmaddubsw | Vpmaddubsw => |a, b| multiply_add_bytes(a, b);
    Psadbw | Vpsadbw => |a, b| sad(a, b);
    Pavgb | Vpavgb => |a, b| zip(a, b, |x: u8, y: u8| average(x.into(), y.into()) as u8);
    Pavgw | Vpavgw => |a, b| zip(a, b, |x: u16, y: u16| average(x.into(), y.into()) as u16);

    Pminub | Vpminub => |a, b| zip(a, b, <u8 as Ord>::min);
    Pminuw | Vpminuw => |a, b| zip(a, b, <u16 as Ord>::min);
    Pminud | Vpminud => |a, b| zip(a, b, <u32 as Ord>::min);
    Pminsb | Vpminsb => |a, b| zip(a, b, <i8 as Ord>::min);
    Pminsw | Vpminsw => |a, b| zip(a, b, <i16 as Ord>::min);
    Pminsd | Vpminsd => |a, b| zip(a, b, <i32 as Ord>::min);
    Pmaxub | Vpmaxub => |a, b| zip(a, b, <u8 as Ord>::max);
    Pmaxuw | Vpmaxuw => |a, b| zip(a, b, <u16 as Ord>::max);
    Pmaxud | Vpmaxud => |a, b| zip(a, b, <u32 as Ord>::max);
    Pmaxsb | Vpmaxsb => |a, b| zip(a, b, <i8 as Ord>::max);
    Pmaxsw | Vpmaxsw => |a, b| zip(a, b, <i16 as Ord>::max);
    Pmaxsd | Vpmaxsd => |a, b| zip(a, b, <i32 as Ord>::max);
    Phminposuw | Vphminposuw => |_a, b| minimum_position(b);

    Pcmpeqb | Vpcmpeqb => |a, b| ones(a, b, u8::eq, u8::MAX, 0);
    Pcmpeqw | Vpcmpeqw => |a, b| ones(a, b, u16::eq, u16::MAX, 0);
    Pcmpeqd | Vpcmpeqd => |a, b| ones(a, b, u32::eq, u32::MAX, 0);
    Pcmpeqq | Vpcmpeqq => |a, b| ones(a, b, u64::eq, u64::MAX, 0);
    Pcmpgtb | Vpcmpgtb => |a, b| ones(a, b, i8::gt, -1, 0);
    Pcmpgtw | Vpcmpgtw => |a, b| ones(a, b, i16::gt, -1, 0);
    Pcmpgtd | Vpcmpgtd => |a, b| ones(a, b, i32::gt, -1, 0);
    Pcmpgtq | Vpcmpgtq => |a, b| ones(a, b, i64::gt, -1, 0);

    Pabsb | Vpabsb => |_a, b| map(b, i8::wrapping_abs);
    Pabsw | Vpabsw => |_a, b| map(b, i16::wrapping_abs);
    Pabsd | Vpabsd => |_a, b| map(b, i32::wrapping_abs);
    Psignb | Vpsignb => |a, b| zip(a, b, |x: i8, y: i8| sign!(x, y));
    Psignw | Vpsignw => |a, b| zip(a, b, |x: i16, y: i16| sign!(x, y));
    Psignd | Vpsignd => |a, b| zip(a, b, |x: i32, y: i32| sign!(x, y));

    Phaddw | Vphaddw => |a, b| horizontal(a, b, i16::wrapping_add);
    Phaddd | Vphaddd => |a, b| horizontal(a, b, i32::wrapping_add);
    Phaddsw | Vphaddsw => |a, b| horizontal(a, b, i16::saturating_add);
    Phsubw | Vphsubw => |a, b| horizontal(a, b, i16::wrapping_sub);
    Phsubd | Vphsubd => |a, b| horizontal(a, b, i32::wrapping_sub);
    Phsubsw | Vphsubsw => |a, b| horizontal(a, b, i16::saturating_sub);
}
