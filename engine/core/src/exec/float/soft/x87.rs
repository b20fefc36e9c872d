//! The x87 unit under a control word (SDM vol. 1, ch. 8).

use std::cmp::Ordering;

use super::escape::{Constant, Escape, Source};
use super::number::{Number, Rounding};
use super::value::{self, compare, Nan, Special, Value, DOUBLE, SINGLE};
use super::{decimal, elementary, x87_function};
use crate::exec::float::frame::{float80, Float80, Frame, INDEFINITE};
use crate::exec::x87::status::{C0, C1, C2, C3, DENORMAL, EXCEPTIONS, INVALID, OVERFLOW, TOP, UNDERFLOW, ZERO_DIVIDE};

const PRECISION: u16 = 1 << 5;

/// The greatest exponent of a register, and its bias.
pub const GREATEST: i32 = 0x3fff;
/// The least exponent of a normal register.
pub const LEAST: i32 = 1 - GREATEST;
/// What is taken off the exponent on unmasked overflow, and put on it on unmasked underflow (SDM vol. 1, 8.5.4).
const WRAP: i32 = 3 << 13;

/// An operand: a value, and whether it is denormal; `None` for what the unit does not support (SDM vol. 1, table 8-3).
pub type Operand = Option<(Value, bool)>;

/// The unit while it runs one instruction.
pub struct Unit {
    masks: u16,
    pub rounding: Rounding,
    /// Bits of precision that arithmetic rounds to.
    pub precision: u32,
    pub status: u16,
}

/// The value of a register.
pub fn unpack(register: Float80) -> Operand {
    let bits = u128::from_le_bytes(register);
    let (significand, field) = (bits as u64, (bits >> 64) as i32 & 0x7fff);
    let negative = bits >> 79 & 1 != 0;
    let leading = significand >> 63 != 0;
    match field {
        0x7fff if significand == 1 << 63 => Some((Value::Infinity { negative }, false)),
        0x7fff if leading => Some((Value::Nan(Nan { negative, significand }), false)),
        0 => {
            let number = Number::new(negative, significand.into(), LEAST - 63);
            Some(number.map_or((Value::Zero { negative }, false), |number| (Value::Finite(number), true)))
        }
        1..=0x7ffe if leading => {
            Number::new(negative, significand.into(), field - GREATEST - 63).map(|number| (Value::Finite(number), false))
        }
        _ => None,
    }
}

/// A register with a number: `significand * 2^(exponent - 63)`.
fn pack(negative: bool, significand: u64, exponent: i32) -> Float80 {
    let field = if significand >> 63 != 0 { (exponent + GREATEST) as u16 } else { 0 };
    float80(u16::from(negative) << 15 | field, significand)
}

pub fn zero(negative: bool) -> Float80 {
    float80(u16::from(negative) << 15, 0)
}

pub fn infinity(negative: bool) -> Float80 {
    float80(u16::from(negative) << 15 | 0x7fff, 1 << 63)
}

fn not_a_number(nan: Nan) -> Float80 {
    float80(u16::from(nan.negative) << 15 | 0x7fff, nan.significand)
}

/// The operand that is not ST(0).
fn second(frame: &Frame, source: Source) -> Operand {
    let memory = u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| frame.memory[n]));
    match source {
        Source::Register => unpack(frame.st1),
        Source::Single => Some(SINGLE.unpack(memory)),
        Source::Double => Some(DOUBLE.unpack(memory)),
        Source::Integer(width) => {
            let integer = (memory as i64) << (64 - width) >> (64 - width);
            Some((Value::integer(integer < 0, integer.unsigned_abs()), false))
        }
        Source::Decimal => Some((decimal::load(&frame.memory), false)),
    }
}

impl Unit {
    fn new(control: u16) -> Self {
        let precision = match control >> 8 & 3 {
            0 => 24,
            2 => 53,
            _ => 64,
        };
        Unit { masks: control & EXCEPTIONS, rounding: Rounding::of(u32::from(control) >> 10), precision, status: 0 }
    }

    pub fn is_masked(&self, exception: u16) -> bool {
        self.masks & exception != 0
    }

    /// Notes an exception; true if it is masked.
    pub fn raise(&mut self, exception: u16) -> bool {
        self.status |= exception;
        self.is_masked(exception)
    }

    /// An invalid operation: the default NaN if it is masked.
    pub fn invalid(&mut self) -> Option<Float80> {
        self.raise(INVALID).then_some(INDEFINITE)
    }

    /// Notes a denormal operand; `None` if that is unmasked.
    pub fn admit(&mut self, denormal: bool) -> Option<()> {
        (!denormal || self.raise(DENORMAL)).then_some(())
    }

    /// The result where an operand is a NaN: a quiet one wins over a signaling one, then the one with the greater significand, then the
    /// positive one (SDM vol. 1, table 4-7).
    fn propagate(&mut self, nans: &[Nan]) -> Option<Float80> {
        if nans.iter().any(|nan| nan.is_signaling()) && !self.raise(INVALID) {
            return None;
        }
        nans.iter().copied().max_by_key(|nan| (!nan.is_signaling(), nan.significand, !nan.negative)).map(|nan| not_a_number(nan.quieted()))
    }

    /// The result of `exact` on one operand, rounded to `bits`.
    pub fn unary(&mut self, operand: Operand, bits: u32, exact: impl FnOnce(Value) -> Result<Value, Special>) -> Option<Float80> {
        self.binary(operand, Some((Value::Zero { negative: false }, false)), bits, |value, _| exact(value))
    }

    /// The result of `exact` on two operands, rounded to `bits`: unless an unmasked exception is found before.
    pub fn binary(
        &mut self,
        a: Operand,
        b: Operand,
        bits: u32,
        exact: impl FnOnce(Value, Value) -> Result<Value, Special>,
    ) -> Option<Float80> {
        let (Some((a, a_denormal)), Some((b, b_denormal))) = (a, b) else { return self.invalid() };
        match (a.nan(), b.nan()) {
            (Some(a), Some(b)) => return self.propagate(&[a, b]),
            (Some(nan), None) | (None, Some(nan)) => return self.propagate(&[nan]),
            (None, None) => {}
        }
        match exact(a, b) {
            Err(Special::Invalid) => self.invalid(),
            Err(Special::DivisionByZero { negative }) => self.raise(ZERO_DIVIDE).then(|| infinity(negative)),
            Ok(value) => {
                self.admit(a_denormal || b_denormal)?;
                Some(self.settle(value, bits))
            }
        }
    }

    /// A value in a register.
    pub fn settle(&mut self, value: Value, bits: u32) -> Float80 {
        match value {
            Value::Zero { negative } => zero(negative),
            Value::Infinity { negative } => infinity(negative),
            Value::Nan(nan) => not_a_number(nan),
            Value::Finite(number) => self.round(number, bits),
        }
    }

    /// Notes whether a result is inexact, and farther from zero.
    pub fn note(&mut self, inexact: bool, away: bool) {
        self.status |= if inexact { PRECISION } else { 0 } | if away { C1 } else { 0 };
    }

    /// A number in a register, rounded to `bits`.
    pub fn round(&mut self, number: Number, bits: u32) -> Float80 {
        let negative = number.negative;
        let rounded = number.round(bits, self.rounding);
        let whole = |significand: u64| significand << (64 - bits);
        if rounded.exponent > GREATEST && self.raise(OVERFLOW) {
            let infinite = self.rounding == Rounding::Nearest || self.rounding.is_away(negative);
            self.note(true, infinite);
            let greatest = float80(u16::from(negative) << 15 | 0x7ffe, whole(u64::MAX >> (64 - bits)));
            return if infinite { infinity(negative) } else { greatest };
        }
        if rounded.exponent < LEAST && self.is_masked(UNDERFLOW) {
            let denormal = number.round_above(LEAST, bits, self.rounding);
            self.note(denormal.inexact, denormal.away);
            self.status |= if denormal.inexact { UNDERFLOW } else { 0 };
            return pack(negative, whole(denormal.significand), denormal.exponent);
        }
        self.note(rounded.inexact, rounded.away);
        match rounded.exponent {
            exponent if exponent > GREATEST => self.wrapped(negative, whole(rounded.significand), exponent - WRAP),
            exponent if exponent < LEAST => {
                self.status |= UNDERFLOW;
                self.wrapped(negative, whole(rounded.significand), exponent + WRAP)
            }
            exponent => pack(negative, whole(rounded.significand), exponent),
        }
    }

    /// A number whose exponent was wrapped; FSCALE makes some that are out of range even so.
    fn wrapped(&mut self, negative: bool, significand: u64, exponent: i32) -> Float80 {
        match exponent {
            _ if exponent > GREATEST => {
                self.note(true, true);
                infinity(negative)
            }
            _ if exponent < LEAST => {
                self.note(true, false);
                zero(negative)
            }
            _ => pack(negative, significand, exponent),
        }
    }

    /// The condition bits of a comparison.
    fn compare(&mut self, a: Operand, b: Operand, ordered: bool) {
        let relation = match (a, b) {
            (Some((a, a_denormal)), Some((b, b_denormal))) => {
                let mut nans = [a.nan(), b.nan()].into_iter().flatten().peekable();
                if nans.peek().is_some() {
                    if ordered || nans.any(Nan::is_signaling) {
                        self.raise(INVALID);
                    }
                } else if a_denormal || b_denormal {
                    self.raise(DENORMAL);
                }
                compare(a, b)
            }
            _ => {
                self.raise(INVALID);
                None
            }
        };
        self.status |= match relation {
            None => C0 | C2 | C3,
            Some(Ordering::Less) => C0,
            Some(Ordering::Equal) => C3,
            Some(Ordering::Greater) => 0,
        };
    }

    /// FXAM.
    fn examine(&mut self, register: Float80) {
        let sign = if register[9] & 0x80 != 0 { C1 } else { 0 };
        self.status |= sign
            | match unpack(register) {
                None => 0,
                Some((Value::Nan(_), _)) => C0,
                Some((Value::Finite(_), false)) => C2,
                Some((Value::Infinity { .. }, _)) => C0 | C2,
                Some((Value::Zero { .. }, _)) => C3,
                Some((Value::Finite(_), true)) => C2 | C3,
            };
    }

    /// What a load makes of its operand: unmasked, an invalid operation alone keeps it from the register.
    fn load(&mut self, operand: Operand) -> Option<Float80> {
        let (value, denormal) = operand?;
        if let Some(nan) = value.nan() {
            return self.propagate(&[nan]);
        }
        self.status |= if denormal { DENORMAL } else { 0 };
        Some(self.settle(value, 64))
    }

    /// A constant, rounded as the control word says; nothing is reported.
    fn constant(&mut self, constant: Constant) -> Float80 {
        let number = match constant {
            Constant::One => Number::ONE,
            Constant::Log2Of10 => elementary::LOG2_10,
            Constant::Log2OfE => elementary::LOG2_E,
            Constant::Pi => elementary::PI,
            Constant::Log10Of2 => elementary::LOG10_2,
            Constant::LogEOf2 => elementary::LN_2,
        };
        let rounded = number.round(64, self.rounding);
        pack(false, rounded.significand, rounded.exponent)
    }
}

/// Runs an instruction on a frame.
pub fn run(escape: Escape, frame: &mut Frame) {
    let mut unit = Unit::new(frame.control);
    let top = unpack(frame.st0);
    let bits = unit.precision;
    let rounding = unit.rounding;
    let mut pushed = 0;
    let result = match escape {
        Escape::Add(source) => unit.binary(top, second(frame, source), bits, |a, b| value::add(a, b, rounding)),
        Escape::Subtract(source) => unit.binary(top, second(frame, source), bits, |a, b| value::add(a, b.negated(), rounding)),
        Escape::SubtractFrom(source) => unit.binary(top, second(frame, source), bits, |a, b| value::add(b, a.negated(), rounding)),
        Escape::Multiply(source) => unit.binary(top, second(frame, source), bits, value::multiply),
        Escape::Divide(source) => unit.binary(top, second(frame, source), bits, value::divide),
        Escape::DivideInto(source) => unit.binary(top, second(frame, source), bits, |a, b| value::divide(b, a)),
        Escape::Root => unit.unary(top, bits, value::root),
        Escape::Compare { source, ordered } => {
            unit.compare(top, second(frame, source), ordered);
            None
        }
        Escape::Test => {
            unit.compare(top, Some((Value::Zero { negative: false }, false)), true);
            None
        }
        Escape::Examine => {
            unit.examine(frame.st0);
            None
        }
        Escape::Load(source) => unit.load(second(frame, source)),
        Escape::LoadConstant(constant) => Some(unit.constant(constant)),
        Escape::Store(to) => {
            unit.store(frame, to, rounding);
            None
        }
        Escape::Truncate(to) => {
            unit.store(frame, to, Rounding::Zero);
            None
        }
        Escape::ChangeSign => {
            frame.st0[9] ^= 0x80;
            None
        }
        Escape::Absolute => {
            frame.st0[9] &= 0x7f;
            None
        }
        function => {
            pushed = x87_function::run(function, &mut unit, frame);
            None
        }
    };
    if let Some(register) = result {
        frame.st0 = register;
    }
    const TOP_OF_TWO: i32 = 6;
    frame.status = unit.status | ((TOP_OF_TWO - pushed) << 11) as u16 & TOP;
}
