//! Numbers as they are before they are rounded: a significand of 128 bits, of which the last one stands for all that follow it, and an
//! exponent without bounds. Every operation is exact but for that last bit, so a result is rounded once, to whatever format and with
//! whatever exceptions the unit has (SDM vol. 1, 4.8 and 4.9).

use std::cmp::Ordering;

/// A direction of rounding, by its number in MXCSR and in the control word (SDM vol. 1, table 4-8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    Nearest,
    Down,
    Up,
    Zero,
}

impl Rounding {
    /// The direction that the low two bits of `field` name.
    pub const fn of(field: u32) -> Self {
        match field & 3 {
            0 => Rounding::Nearest,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        }
    }

    /// Whether a number that cannot be itself becomes the one farther from zero in a directed mode.
    pub fn is_away(self, negative: bool) -> bool {
        self == if negative { Rounding::Down } else { Rounding::Up }
    }
}

/// The leading bit of a significand.
const LEADING: u32 = u128::BITS - 1;

/// A number that is neither zero nor infinite: `significand / 2^127 * 2^exponent`, where the leading bit of the significand is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Number {
    pub negative: bool,
    pub exponent: i32,
    pub significand: u128,
}

/// A number in a format of `bits` of precision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounded {
    /// `significand * 2^(exponent - bits + 1)`; below `2^(bits - 1)` if the format has no normal number for it.
    pub significand: u64,
    pub exponent: i32,
    pub inexact: bool,
    /// It is farther from zero than the number was.
    pub away: bool,
}

/// `value` shifted right, its last bit set if one that is set was lost.
fn shift_right(value: u128, distance: u32) -> u128 {
    match distance {
        0 => value,
        1..=LEADING => value >> distance | u128::from(value << (u128::BITS - distance) != 0),
        _ => u128::from(value != 0),
    }
}

impl Number {
    pub const ONE: Number = Number { negative: false, exponent: 0, significand: 1 << LEADING };

    /// `significand * 2^scale`; `None` for zero.
    pub fn new(negative: bool, significand: u128, scale: i32) -> Option<Self> {
        let zeros = significand.leading_zeros();
        let exponent = scale + LEADING as i32 - zeros as i32;
        (significand != 0).then(|| Number { negative, exponent, significand: significand << zeros })
    }

    pub fn negated(self) -> Self {
        Number { negative: !self.negative, ..self }
    }

    /// The number with another sign.
    pub fn signed(self, negative: bool) -> Self {
        Number { negative, ..self }
    }

    /// The number times a power of two.
    pub fn scaled(self, power: i32) -> Self {
        Number { exponent: self.exponent + power, ..self }
    }

    /// The first 64 bits of the significand: all of it, in a number of one of the guest's formats.
    pub fn high(self) -> u64 {
        (self.significand >> 64) as u64
    }

    /// The product of two numbers of at most 64 bits.
    pub fn times(self, other: Self) -> Self {
        let product = u128::from(self.high()) * u128::from(other.high());
        let carry = product >> LEADING;
        Number {
            negative: self.negative != other.negative,
            exponent: self.exponent + other.exponent + carry as i32,
            significand: if carry == 0 { product << 1 } else { product },
        }
    }

    /// The quotient of two numbers of at most 64 bits.
    pub fn over(self, other: Self) -> Self {
        let divisor = u128::from(other.high());
        let dividend = u128::from(self.high()) << 63;
        let (first, rest) = (dividend / divisor, (dividend % divisor) << 64);
        let quotient = (first << 64) | (rest / divisor);
        let significand = quotient | u128::from(rest % divisor != 0);
        let zeros = significand.leading_zeros();
        Number {
            negative: self.negative != other.negative,
            // The first quotient has its leading bit at 63 if the dividend's significand is not the smaller one, and at 62 otherwise.
            exponent: self.exponent - other.exponent - zeros as i32,
            significand: significand << zeros,
        }
    }

    /// The sum; `None` for zero.
    pub fn plus(self, other: Self) -> Option<Self> {
        let (high, low) = if self.exponent >= other.exponent { (self, other) } else { (other, self) };
        let first = high.significand >> 1 | high.significand & 1;
        let second = shift_right(low.significand, (high.exponent - low.exponent) as u32 + 1);
        let scale = high.exponent - LEADING as i32 + 1;
        if high.negative == low.negative {
            return Number::new(high.negative, first + second, scale);
        }
        match first.cmp(&second) {
            Ordering::Less => Number::new(low.negative, second - first, scale),
            _ => Number::new(high.negative, first - second, scale),
        }
    }

    /// The square root of a positive number of at most 64 bits.
    pub fn root(self) -> Self {
        let odd = self.exponent & 1;
        // Two bits before the point if the exponent is odd: the root of `square * 2^-126` is in [1, 2).
        let square = self.significand >> (1 - odd);
        let root = square.isqrt();
        let rest = square - root * root;
        // Behind the root's 64 bits there is a half if `(root + 1/2)^2` is not more than the square, which is never equal to it.
        let half = u128::from(rest > root) << 63;
        Number { negative: false, exponent: (self.exponent - odd) / 2, significand: root << 64 | half | u128::from(rest != 0) }
    }

    /// The number rounded to `bits` bits, at most 64, with any exponent.
    pub fn round(self, bits: u32, rounding: Rounding) -> Rounded {
        let below = u128::BITS - bits;
        let lost = self.significand << bits;
        let truncated = (self.significand >> below) as u64;
        let half = 1 << LEADING;
        let away = match rounding {
            Rounding::Nearest => lost > half || lost == half && truncated & 1 != 0,
            directed => lost != 0 && directed.is_away(self.negative),
        };
        let inexact = lost != 0;
        match truncated.checked_add(u64::from(away)) {
            Some(significand) if bits == 64 || significand >> bits == 0 => Rounded { significand, exponent: self.exponent, inexact, away },
            _ => Rounded { significand: 1 << (bits - 1), exponent: self.exponent + 1, inexact, away },
        }
    }

    /// The number rounded to a format of `bits` of precision whose least normal exponent is `least`.
    pub fn round_above(self, least: i32, bits: u32, rounding: Rounding) -> Rounded {
        let missing = (least - self.exponent).clamp(0, bits as i32 + 1) as u32;
        Number { significand: shift_right(self.significand, missing), exponent: self.exponent.max(least), ..self }.round(bits, rounding)
    }

    /// The number rounded to an integer: its magnitude, if that has at most 64 bits.
    pub fn integer(self, rounding: Rounding) -> Option<Rounded> {
        match self.exponent {
            64.. => None,
            // The last of the first 64 bits becomes the unit.
            exponent => {
                let unit = Number { significand: shift_right(self.significand, (63 - exponent).min(128) as u32), exponent: 63, ..self };
                let rounded = unit.round(64, rounding);
                (rounded.exponent == 63).then_some(rounded)
            }
        }
    }

    /// Compares magnitudes.
    pub fn magnitude_cmp(self, other: Self) -> Ordering {
        (self.exponent, self.significand).cmp(&(other.exponent, other.significand))
    }
}
