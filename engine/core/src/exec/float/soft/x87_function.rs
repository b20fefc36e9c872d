//! x87 instructions that are more than an operation and a rounding: FRNDINT, FSCALE, FPREM, FXTRACT and the transcendental ones (SDM
//! vol. 1, 8.3.5 to 8.3.7; vol. 2 for their tables of special operands).

use super::elementary;
use super::escape::Escape;
use super::number::{Number, Rounding};
use super::value::{Special, Value};
use super::x87::{infinity, unpack, zero, Unit};
use crate::exec::float::frame::{Float80, Frame};
use crate::exec::x87::status::{C0, C1, C2, C3};
use Value::{Finite, Infinity, Zero};

/// Bits of a register's significand.
const BITS: u32 = 64;

/// Runs an instruction; returns how many registers it pushed.
pub fn run(escape: Escape, unit: &mut Unit, frame: &mut Frame) -> i32 {
    match escape {
        Escape::RoundToInteger => in_place(frame, |top, _| round_to_integer(unit, top)),
        Escape::Scale => in_place(frame, |top, second| scale(unit, top, second)),
        Escape::Remainder { nearest } => in_place(frame, |top, second| remainder(unit, top, second, nearest)),
        Escape::TwoToXMinusOne => in_place(frame, |top, _| power(unit, top)),
        Escape::Sine => in_place(frame, |top, _| circular(unit, top, sine)),
        Escape::Cosine => in_place(frame, |top, _| circular(unit, top, cosine)),
        Escape::Extract => extract(unit, frame),
        Escape::SineAndCosine => {
            let sine = circular(unit, frame.st0, sine);
            let cosine = circular(unit, frame.st0, cosine);
            push(frame, sine, cosine)
        }
        Escape::Tangent => {
            let tangent = circular(unit, frame.st0, tangent);
            let one = unit.settle(Finite(Number::ONE), BITS);
            // A NaN is its own tangent, and the second result too.
            let second = tangent.map(|tangent| if is_nan(tangent) { tangent } else { one });
            push(frame, tangent, second)
        }
        Escape::ArcTangent => into_second(frame, |top, second| unit.binary(unpack(second), unpack(top), BITS, arc_tangent)),
        Escape::Logarithm => into_second(frame, |top, second| unit.binary(unpack(second), unpack(top), BITS, logarithm)),
        Escape::LogarithmPlusOne => into_second(frame, |top, second| unit.binary(unpack(second), unpack(top), BITS, logarithm_plus_one)),
        _ => 0,
    }
}

/// `ST(0) = f(ST(0), ST(1))`.
fn in_place(frame: &mut Frame, f: impl FnOnce(Float80, Float80) -> Option<Float80>) -> i32 {
    if let Some(result) = f(frame.st0, frame.st1) {
        frame.st0 = result;
    }
    0
}

/// `ST(1) = f(ST(0), ST(1))`, and a pop.
fn into_second(frame: &mut Frame, f: impl FnOnce(Float80, Float80) -> Option<Float80>) -> i32 {
    match f(frame.st0, frame.st1) {
        Some(result) => {
            frame.st0 = result;
            -1
        }
        None => 0,
    }
}

/// `ST(0) = first`, and a push of `second`.
fn push(frame: &mut Frame, first: Option<Float80>, second: Option<Float80>) -> i32 {
    match (first, second) {
        (Some(first), Some(second)) => {
            (frame.st1, frame.st0) = (first, second);
            1
        }
        _ => 0,
    }
}

fn is_nan(register: Float80) -> bool {
    matches!(unpack(register), Some((Value::Nan(_), _)))
}

fn round_to_integer(unit: &mut Unit, top: Float80) -> Option<Float80> {
    let mut rounded = None;
    let rounding = unit.rounding;
    let result = unit.unary(unpack(top), BITS, |value| match value {
        Finite(number) if number.exponent < 63 => {
            let negative = number.negative;
            rounded = number.integer(rounding);
            Ok(rounded.and_then(|found| Number::new(negative, found.significand.into(), 0)).map_or(Zero { negative }, Finite))
        }
        value => Ok(value),
    });
    if let (Some(_), Some(rounded)) = (result, rounded) {
        unit.note(rounded.inexact, rounded.away);
    }
    result
}

/// FSCALE adds ST(1), without its fraction, to the exponent.
fn scale(unit: &mut Unit, top: Float80, second: Float80) -> Option<Float80> {
    /// More than any exponent can be off.
    const FAR: i32 = 1 << 17;
    unit.binary(unpack(top), unpack(second), BITS, |value, by| match (value, by) {
        (Zero { .. }, Infinity { negative: false }) | (Infinity { .. }, Infinity { negative: true }) => Err(Special::Invalid),
        (_, Infinity { negative: false }) => Ok(Infinity { negative: value.is_negative() }),
        (_, Infinity { negative: true }) => Ok(Zero { negative: value.is_negative() }),
        (Finite(number), Finite(by)) => {
            let magnitude = by.integer(Rounding::Zero).map_or(FAR, |whole| whole.significand.min(FAR as u64) as i32);
            Ok(Finite(number.scaled(if by.negative { -magnitude } else { magnitude })))
        }
        _ => Ok(value),
    })
}

/// FPREM and FPREM1: exact, in steps that take up to 63 bits off the exponent.
fn remainder(unit: &mut Unit, top: Float80, second: Float80, nearest: bool) -> Option<Float80> {
    let mut conditions = 0;
    let result = unit.binary(unpack(top), unpack(second), BITS, |a, b| match (a, b) {
        (Infinity { .. }, _) | (_, Zero { .. }) => Err(Special::Invalid),
        (Finite(a), Finite(b)) => {
            let (rest, found) = divide(a, b, nearest);
            conditions = found;
            Ok(rest.map_or(Zero { negative: a.negative }, Finite))
        }
        _ => Ok(a),
    });
    unit.status |= if result.is_some() { conditions } else { 0 };
    result
}

/// The rest of a division, and the condition bits: C2 for one that is not complete, and otherwise the quotient's low bits.
fn divide(a: Number, b: Number, nearest: bool) -> (Option<Number>, u16) {
    let distance = a.exponent - b.exponent;
    if distance < -1 {
        return (Some(a), 0);
    }
    // Below 64 all of the quotient is found at once; above, 32 to 63 bits of it, so that a multiple of 32 is left.
    let steps = if distance < 64 { distance } else { partial(distance) };
    let divisor = u128::from(b.high());
    let (mut quotient, mut rest) = (0u64, u128::from(a.high()));
    if steps < 0 {
        // Half the divisor is the unit.
        return complete(a, rest, divisor << 1, 0, b.exponent - 64, nearest);
    }
    for step in 0..=steps {
        rest = if step == 0 { rest } else { rest << 1 };
        quotient <<= 1;
        if rest >= divisor {
            rest -= divisor;
            quotient |= 1;
        }
    }
    if steps < distance {
        return (Number::new(a.negative, rest, a.exponent - steps - 63), C2);
    }
    complete(a, rest, divisor, quotient, b.exponent - 63, nearest)
}

/// Bits of the quotient that a division over `distance` finds in its first step.
fn partial(distance: i32) -> i32 {
    distance - (distance & !31) + 32
}

/// The end of a division that left `rest * 2^scale` of `a`.
fn complete(a: Number, rest: u128, divisor: u128, quotient: u64, scale: i32, nearest: bool) -> (Option<Number>, u16) {
    let up = nearest && (2 * rest > divisor || 2 * rest == divisor && quotient & 1 != 0);
    let (rest, quotient, negative) =
        if up { (divisor - rest, quotient.wrapping_add(1), !a.negative) } else { (rest, quotient, a.negative) };
    let conditions =
        [(1, C1), (2, C3), (4, C0)].into_iter().fold(0, |found, (bit, condition)| found | if quotient & bit != 0 { condition } else { 0 });
    (Number::new(negative, rest, scale), conditions)
}

/// FXTRACT: the exponent, and the significand with an exponent of zero.
fn extract(unit: &mut Unit, frame: &mut Frame) -> i32 {
    let top = unpack(frame.st0);
    let mut significand = None;
    let exponent = unit.unary(top, BITS, |value| match value {
        Zero { negative } => {
            significand = Some(zero(negative));
            Err(Special::DivisionByZero { negative: true })
        }
        Infinity { negative } => {
            significand = Some(infinity(negative));
            Ok(Infinity { negative: false })
        }
        Finite(number) => Ok(Value::integer(number.exponent < 0, number.exponent.unsigned_abs().into())),
        Value::Nan(_) => Err(Special::Invalid),
    });
    if let Some((Finite(number), _)) = top {
        significand = Some(unit.settle(Finite(Number { exponent: 0, ..number }), BITS));
    }
    push(frame, exponent, significand.or(exponent))
}

/// A circular function of an angle: one that is too great leaves everything as it is, and says so in C2.
fn circular(unit: &mut Unit, top: Float80, of: impl FnOnce(Value) -> Value) -> Option<Float80> {
    let operand = unpack(top);
    if let Some((Finite(angle), _)) = operand {
        if angle.exponent >= 63 {
            unit.status |= C2;
            return None;
        }
    }
    unit.unary(operand, BITS, |value| match value {
        Infinity { .. } => Err(Special::Invalid),
        value => Ok(of(value)),
    })
}

/// A result that is exactly zero, of an angle that is not.
const NOTHING: Value = Zero { negative: false };

fn sine(angle: Value) -> Value {
    match angle {
        Finite(number) => elementary::sine_and_cosine(number).0.map_or(NOTHING, Finite),
        zero => zero,
    }
}

fn cosine(angle: Value) -> Value {
    match angle {
        Finite(number) => elementary::sine_and_cosine(number).1.map_or(NOTHING, Finite),
        _ => Finite(Number::ONE),
    }
}

fn tangent(angle: Value) -> Value {
    match angle {
        Finite(number) => elementary::tangent(number).map_or(NOTHING, Finite),
        zero => zero,
    }
}

/// F2XM1; what it makes of operands beyond one is not defined, and here it is the operand.
fn power(unit: &mut Unit, top: Float80) -> Option<Float80> {
    unit.unary(unpack(top), BITS, |value| match value {
        Infinity { negative: true } => Ok(Finite(Number::ONE.negated())),
        Finite(x) if x.exponent == 0 && x.signed(false) == Number::ONE => Ok(Finite(if x.negative { x.scaled(-1) } else { x })),
        Finite(x) if x.exponent < 0 => Ok(Finite(elementary::power_minus_one(x))),
        value => Ok(value),
    })
}

/// The product of what may be without a result.
fn times(a: Value, b: Value) -> Result<Value, Special> {
    let negative = a.is_negative() != b.is_negative();
    match (a, b) {
        (Zero { .. }, Infinity { .. }) | (Infinity { .. }, Zero { .. }) => Err(Special::Invalid),
        (Infinity { .. }, _) | (_, Infinity { .. }) => Ok(Infinity { negative }),
        (Finite(a), Finite(b)) => Ok(Finite(if b.significand << 64 == 0 { a.times(b) } else { elementary::multiply(a, b) })),
        _ => Ok(Zero { negative }),
    }
}

/// FYL2X: `y * log2(x)`.
fn logarithm(y: Value, x: Value) -> Result<Value, Special> {
    match x {
        Zero { .. } => match y {
            Zero { .. } => Err(Special::Invalid),
            Infinity { negative } => Ok(Infinity { negative: !negative }),
            y => Err(Special::DivisionByZero { negative: !y.is_negative() }),
        },
        x if x.is_negative() => Err(Special::Invalid),
        Finite(number) => times(y, elementary::logarithm(number).map_or(Zero { negative: false }, Finite)),
        infinite => times(y, infinite),
    }
}

/// FYL2XP1: `y * log2(x + 1)`.
fn logarithm_plus_one(y: Value, x: Value) -> Result<Value, Special> {
    match x {
        Finite(number) if number.negative && number.exponent >= 0 => Err(Special::Invalid),
        Finite(number) => times(y, elementary::logarithm_plus_one(number).map_or(Zero { negative: false }, Finite)),
        Infinity { negative: true } => Err(Special::Invalid),
        x => times(y, x),
    }
}

/// FPATAN: the angle of the point (x, y), with the quadrants of infinities and zeros.
fn arc_tangent(y: Value, x: Value) -> Result<Value, Special> {
    let right = elementary::PI.scaled(-1);
    let quarter = elementary::PI.scaled(-2);
    let three_quarters = elementary::multiply(quarter, Number { exponent: 1, significand: 3 << 126, ..Number::ONE });
    let negative = y.is_negative();
    let found = match (y, x) {
        (Finite(y), Finite(x)) => elementary::angle(y, x),
        (Infinity { .. }, Infinity { negative: true }) => three_quarters,
        (Infinity { .. }, Infinity { negative: false }) => quarter,
        (Infinity { .. }, _) | (Finite(_), Zero { .. }) => right,
        (_, x) if x.is_negative() => elementary::PI,
        _ => return Ok(Zero { negative }),
    };
    Ok(Finite(found.signed(negative)))
}
