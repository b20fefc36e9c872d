//! x87 stores: a register as a shorter number, as an integer, as digits (SDM vol. 1, 8.3.3).

use super::number::{Number, Rounding};
use super::value::{Format, Nan, Value, DOUBLE, SINGLE};
use super::x87::{unpack, Operand, Unit};
use super::{decimal, escape::Source};
use crate::exec::float::frame::Frame;
use crate::exec::x87::status::{INVALID, OVERFLOW, UNDERFLOW};

impl Unit {
    /// A register in a shorter format. What an unmasked exception keeps from being stored is not rounded either.
    fn shorten(&mut self, operand: Operand, format: Format) -> u64 {
        let Some((value, _)) = operand else {
            self.raise(INVALID);
            return format.nan(Nan::DEFAULT);
        };
        match value {
            Value::Zero { negative } => format.zero(negative),
            Value::Infinity { negative } => format.infinity(negative),
            Value::Nan(nan) => {
                self.status |= if nan.is_signaling() { INVALID } else { 0 };
                format.nan(nan.quieted())
            }
            Value::Finite(number) => self.shorten_number(number, format),
        }
    }

    fn shorten_number(&mut self, number: Number, format: Format) -> u64 {
        let negative = number.negative;
        let rounded = number.round(format.precision, self.rounding);
        if rounded.exponent > format.greatest() {
            let infinite = self.rounding == Rounding::Nearest || self.rounding.is_away(negative);
            if self.raise(OVERFLOW) {
                self.note(true, infinite);
            }
            return if infinite { format.infinity(negative) } else { format.maximum(negative) };
        }
        if rounded.exponent >= format.least() {
            self.note(rounded.inexact, rounded.away);
            return format.pack(negative, rounded.significand, rounded.exponent);
        }
        let denormal = number.round_above(format.least(), format.precision, self.rounding);
        if !self.is_masked(UNDERFLOW) {
            self.raise(UNDERFLOW);
        } else {
            self.note(denormal.inexact, denormal.away);
            self.status |= if denormal.inexact { UNDERFLOW } else { 0 };
        }
        format.pack(negative, denormal.significand, denormal.exponent)
    }

    /// A register as a signed integer of `width` bits; the one farthest below zero stands for what is none.
    fn integer(&mut self, operand: Operand, width: u32, rounding: Rounding) -> u64 {
        let limit = 1 << (width - 1);
        let (negative, found) = match operand {
            Some((Value::Zero { .. }, _)) => return 0,
            Some((Value::Finite(number), _)) => (number.negative, number.integer(rounding)),
            _ => (false, None),
        };
        match found.filter(|found| found.significand < limit + u64::from(negative)) {
            Some(found) => {
                self.note(found.inexact, found.away);
                let integer = if negative { found.significand.wrapping_neg() } else { found.significand };
                integer & u64::MAX >> (64 - width)
            }
            None => {
                self.raise(INVALID);
                limit
            }
        }
    }

    pub fn store(&mut self, frame: &mut Frame, to: Source, rounding: Rounding) {
        let operand = unpack(frame.st0);
        let bytes = match to {
            Source::Single => self.shorten(operand, SINGLE).into(),
            Source::Double => self.shorten(operand, DOUBLE).into(),
            Source::Integer(width) => self.integer(operand, width, rounding).into(),
            Source::Decimal => {
                let found = match operand {
                    Some((Value::Finite(number), _)) => number.integer(rounding).filter(|found| found.significand <= decimal::GREATEST),
                    _ => None,
                };
                match (operand, found) {
                    (Some((Value::Zero { negative }, _)), _) => decimal::store(negative, 0),
                    (Some((value, _)), Some(found)) => {
                        self.note(found.inexact, found.away);
                        decimal::store(value.is_negative(), found.significand)
                    }
                    _ => {
                        self.raise(INVALID);
                        decimal::INDEFINITE
                    }
                }
            }
            Source::Register => return,
        };
        frame.memory = bytes.to_le_bytes();
    }
}
