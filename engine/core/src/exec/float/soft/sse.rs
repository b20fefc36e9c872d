//! SSE, FMA and F16C instructions under an MXCSR (SDM vol. 1, 10.2.3, 11.5.2 and ch. 14).

use std::cmp::Ordering;

use super::name::{Comparison, Fused, General, Lane, Simd};
use super::number::{Number, Rounding};
use super::value::{self, compare, Format, Nan, Special, Value, HALF, SINGLE};
use crate::exec::float::mxcsr::{self, DAZ, DENORMAL, DIVIDE_BY_ZERO, INVALID, OVERFLOW, PRECISION, UNDERFLOW};

/// The result of one lane, and the flags raised.
type Found = (u64, u32);

/// The direction of rounding.
fn rounding(control: u32) -> Rounding {
    Rounding::of(control >> mxcsr::ROUNDING_SHIFT)
}

/// Operand of a lane with denormals as MXCSR wants them; the flag if it is one.
fn operand(control: u32, format: Format, bits: u64) -> (Value, u32) {
    match format.unpack(bits) {
        (number, true) if control & DAZ != 0 => (Value::Zero { negative: number.is_negative() }, 0),
        (number, denormal) => (number, if denormal { DENORMAL } else { 0 }),
    }
}

/// The first NaN of `operands`, quiet, and the flag for signaling ones.
fn propagate<const N: usize>(operands: [Value; N]) -> Option<(Nan, u32)> {
    let nans = || operands.iter().filter_map(|operand| operand.nan());
    let flags = if nans().any(Nan::is_signaling) { INVALID } else { 0 };
    nans().next().map(|nan| (nan.quieted(), flags))
}

/// Whether tiny results are zeros: flush-to-zero works on masked underflow only (SDM vol. 1, 10.2.3.3).
fn flushes(control: u32) -> bool {
    control & mxcsr::FLUSH != 0 && !mxcsr::traps_underflow(control)
}

/// A number in a format, and the flags of that. Unmasked exceptions are found on a result with an exponent without bounds.
fn round(control: u32, format: Format, number: Number) -> Found {
    let rounding = rounding(control);
    let negative = number.negative;
    let unbounded = number.round(format.precision, rounding);
    let inexact = if unbounded.inexact { PRECISION } else { 0 };
    if unbounded.exponent > format.greatest() {
        let precision = if mxcsr::traps_overflow(control) { inexact } else { PRECISION };
        let infinite = rounding == Rounding::Nearest || rounding.is_away(negative);
        return (if infinite { format.infinity(negative) } else { format.maximum(negative) }, OVERFLOW | precision);
    }
    if unbounded.exponent >= format.least() {
        return (format.pack(negative, unbounded.significand, unbounded.exponent), inexact);
    }
    if flushes(control) {
        return (format.zero(negative), UNDERFLOW | PRECISION);
    }
    let denormal = number.round_above(format.least(), format.precision, rounding);
    let flags = match (mxcsr::traps_underflow(control), denormal.inexact) {
        (true, _) => UNDERFLOW | inexact,
        (false, true) => UNDERFLOW | PRECISION,
        (false, false) => 0,
    };
    (format.pack(negative, denormal.significand, denormal.exponent), flags)
}

/// An exact result in a format; `denormal` is the flag of the operands, which nothing invalid has.
fn settle(control: u32, format: Format, exact: Result<Value, Special>, denormal: u32) -> Found {
    match exact {
        Ok(Value::Zero { negative }) => (format.zero(negative), denormal),
        Ok(Value::Infinity { negative }) => (format.infinity(negative), denormal),
        Ok(Value::Nan(nan)) => (format.nan(nan), denormal),
        Ok(Value::Finite(number)) => {
            let (bits, flags) = round(control, format, number);
            (bits, flags | denormal)
        }
        Err(Special::Invalid) => (format.nan(Nan::DEFAULT), INVALID),
        Err(Special::DivisionByZero { negative }) => (format.infinity(negative), DIVIDE_BY_ZERO),
    }
}

/// Runs an instruction on one or two registers: the first register's new value, and the flags raised.
pub fn binary(op: Simd, control: u32, a: u128, b: u128, immediate: u8) -> (u128, u32) {
    match op {
        Simd::Lanes { lane, format, scalar } => {
            let count = if scalar { 1 } else { 128 / format.width };
            let of = |register: u128, n: u32| (register >> (n * format.width)) as u64;
            lanes(a, format.width, count, |n| self::lane(lane, control, format, of(a, n), of(b, n), immediate))
        }
        Simd::FromIntegers { to, count } => lanes(0, to.width, count, |n| {
            let integer = (b >> (32 * n)) as i32;
            settle(control, to, Ok(Value::integer(integer < 0, integer.unsigned_abs().into())), 0)
        }),
        Simd::ToIntegers { from, count, truncates } => {
            lanes(0, 32, count, |n| to_integer(control, from, (b >> (n * from.width)) as u64, 32, truncates))
        }
        Simd::Between { from, to, count } => {
            let kept = if count == 1 { a } else { 0 };
            lanes(kept, to.width, count, |n| between(control, from, to, (b >> (n * from.width)) as u64))
        }
        // The instruction ignores DAZ, and reports no denormal operands.
        Simd::FromHalf => lanes(0, SINGLE.width, 4, |n| {
            let (single, flags) = between(control & !DAZ, HALF, SINGLE, (b >> (16 * n)) as u64);
            (single, flags & !DENORMAL)
        }),
    }
}

/// `kept` with lanes 0 to `count` replaced, and the flags of all of them.
fn lanes(kept: u128, width: u32, count: u32, lane: impl Fn(u32) -> Found) -> (u128, u32) {
    (0..count).fold((kept, 0), |(register, flags), n| {
        let (bits, raised) = lane(n);
        let mask = u128::from(u64::MAX >> (64 - width)) << (n * width);
        (register & !mask | u128::from(bits) << (n * width), flags | raised)
    })
}

fn lane(op: Lane, control: u32, format: Format, a: u64, b: u64, immediate: u8) -> Found {
    let (second, second_denormal) = operand(control, format, b);
    let alone = |exact: fn(Value) -> Result<Value, Special>| match propagate([second]) {
        Some((nan, flags)) => (format.nan(nan), flags),
        None => settle(control, format, exact(second), second_denormal),
    };
    let (first, first_denormal) = operand(control, format, a);
    let denormal = first_denormal | second_denormal;
    let both = |exact: fn(Value, Value, Rounding) -> Result<Value, Special>| match propagate([first, second]) {
        Some((nan, flags)) => (format.nan(nan), flags),
        None => settle(control, format, exact(first, second, rounding(control)), denormal),
    };
    match op {
        Lane::Add => both(value::add),
        Lane::Subtract => both(|a, b, rounding| value::add(a, b.negated(), rounding)),
        Lane::Multiply => both(|a, b, _| value::multiply(a, b)),
        Lane::Divide => both(|a, b, _| value::divide(a, b)),
        Lane::Root => alone(value::root),
        Lane::Reciprocal => approximate(format, second, |number| Some(Number::ONE.over(number))),
        Lane::ReciprocalRoot => match second {
            Value::Infinity { negative: true } => (format.nan(Nan::DEFAULT), 0),
            _ => approximate(format, second, |number| (!number.negative).then(|| Number::ONE.over(number.root()))),
        },
        Lane::Minimum => select(format, (first, second), denormal, Ordering::Less),
        Lane::Maximum => select(format, (first, second), denormal, Ordering::Greater),
        Lane::Compare => {
            let (relation, flags) = relate(first, second, denormal, matches!(immediate & 3, 1 | 2));
            let holds = match immediate & 3 {
                0 => relation == Some(Ordering::Equal),
                1 => relation == Some(Ordering::Less),
                2 => matches!(relation, Some(Ordering::Less | Ordering::Equal)),
                _ => relation.is_none(),
            };
            (if holds != (immediate & 4 != 0) { u64::MAX >> (64 - format.width) } else { 0 }, flags)
        }
    }
}

/// An operand in its own format.
fn exactly(format: Format, value: Value) -> u64 {
    match value {
        Value::Nan(nan) => format.nan(nan),
        value => settle(mxcsr::MASKS, format, Ok(value), 0).0,
    }
}

/// The first operand if it compares as `wanted` with the second one, and otherwise the second one. Every NaN is invalid.
fn select(format: Format, (first, second): (Value, Value), denormal: u32, wanted: Ordering) -> Found {
    let (relation, flags) = relate(first, second, denormal, true);
    (exactly(format, if relation == Some(wanted) { first } else { second }), flags)
}

/// How two operands compare, and the flags of that.
fn relate(first: Value, second: Value, denormal: u32, signals: bool) -> (Option<Ordering>, u32) {
    let flags = match propagate([first, second]) {
        Some((_, flags)) => flags | if signals { INVALID } else { 0 },
        None => denormal,
    };
    (compare(first, second), flags)
}

/// RCPPS and RSQRTPS, whose error is bounded by `1.5 * 2^-12` (SDM vol. 2): here the first 12 bits of what `of` makes of the operand, or
/// the default NaN. Denormal operands and results are zeros, and nothing is reported.
fn approximate(format: Format, operand: Value, of: impl Fn(Number) -> Option<Number>) -> Found {
    let result = match operand {
        Value::Nan(nan) => return (format.nan(nan.quieted()), 0),
        Value::Finite(number) if number.exponent >= format.least() => of(number),
        Value::Zero { negative } | Value::Finite(Number { negative, .. }) => return (format.infinity(negative), 0),
        Value::Infinity { negative } => return (format.zero(negative), 0),
    };
    let Some(result) = result else { return (format.nan(Nan::DEFAULT), 0) };
    const PRECISION: u32 = 12;
    let rounded = result.round(PRECISION, Rounding::Nearest);
    if rounded.exponent < format.least() {
        return (format.zero(result.negative), 0);
    }
    (format.pack(result.negative, rounded.significand << (format.precision - PRECISION), rounded.exponent), 0)
}

/// A number of one format in another.
fn between(control: u32, from: Format, to: Format, bits: u64) -> Found {
    let (value, denormal) = operand(control, from, bits);
    match propagate([value]) {
        Some((nan, flags)) => (to.nan(nan), flags),
        None => settle(control, to, Ok(value), denormal),
    }
}

/// A number as an integer of `width` bits; the integer that is farthest below zero stands for what is none.
fn to_integer(control: u32, from: Format, bits: u64, width: u32, truncates: bool) -> Found {
    let rounding = if truncates { Rounding::Zero } else { rounding(control) };
    let (value, _) = operand(control, from, bits);
    let limit = 1 << (width - 1);
    let integer = match value {
        Value::Zero { .. } => return (0, 0),
        Value::Finite(number) => number.integer(rounding).filter(|found| found.significand < limit + u64::from(number.negative)),
        Value::Infinity { .. } | Value::Nan(_) => None,
    };
    let Some(found) = integer else { return (limit, INVALID) };
    let bits = if value.is_negative() { found.significand.wrapping_neg() } else { found.significand };
    (bits & u64::MAX >> (64 - width), if found.inexact { PRECISION } else { 0 })
}

/// The low lane of a register as an integer, and the flags raised.
pub fn to_general(op: General, control: u32, b: u128) -> (u64, u32) {
    to_integer(control, op.format, b as u64, op.width, op.truncates)
}

/// An integer in the low lane of a register, and the flags raised.
pub fn from_general(op: General, control: u32, a: u128, b: u64) -> (u128, u32) {
    let integer = if op.width == 32 { i64::from(b as i32) } else { b as i64 };
    lanes(a, op.format.width, 1, |_| settle(control, op.format, Ok(Value::integer(integer < 0, integer.unsigned_abs())), 0))
}

/// A comparison of the low lanes: CF, PF and ZF, and the flags raised.
pub fn compare_low(op: Comparison, control: u32, a: u128, b: u128) -> (u64, u32) {
    use crate::state::rflags::{CF, PF, ZF};
    let (first, first_denormal) = operand(control, op.format, a as u64);
    let (second, second_denormal) = operand(control, op.format, b as u64);
    let (relation, flags) = relate(first, second, first_denormal | second_denormal, op.ordered);
    let image = match relation {
        None => ZF | PF | CF,
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
    };
    (image, flags)
}

/// Four single-precision numbers as half-precision ones, and the flags raised. The instruction ignores flush-to-zero.
pub fn halve(control: u32, source: u128) -> (u128, u32) {
    lanes(0, HALF.width, 4, |n| between(control & !mxcsr::FLUSH, SINGLE, HALF, (source >> (32 * n)) as u64))
}

/// Runs a fused multiply-add on its operands: the first register's new value, and the flags raised.
pub fn fused(op: Fused, control: u32, operands: [u128; 3]) -> (u128, u32) {
    let format = op.format;
    let count = if op.scalar { 1 } else { 128 / format.width };
    lanes(operands[0], format.width, count, |n| {
        let values = operands.map(|register| operand(control, format, (register >> (n * format.width)) as u64));
        let [x, y, z] = op.order.map(|index| values[index].0);
        if let Some((nan, flags)) = propagate([x, y, z]) {
            return (format.nan(nan), flags);
        }
        let denormal = values.iter().fold(0, |flags, (_, denormal)| flags | denormal);
        let exact = value::multiply(x, y).and_then(|product| {
            let product = if op.negates_product { product.negated() } else { product };
            let z = if op.subtracts[n as usize % 2] { z.negated() } else { z };
            value::add(product, z, rounding(control))
        });
        settle(control, format, exact, denormal)
    })
}
