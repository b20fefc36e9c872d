//! What an operand of a floating-point instruction is, and the operations on such values but for rounding: zeros, infinities and what is
//! invalid (IEEE 754; SDM vol. 1, 4.8.3 and table 4-7). Which of several NaNs is the result is the unit's own rule.

use std::cmp::Ordering;

use super::number::{Number, Rounding};

/// The bit of a NaN's significand that makes it a quiet one.
pub const QUIET: u64 = 1 << 62;

/// A floating-point value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    Zero { negative: bool },
    Finite(Number),
    Infinity { negative: bool },
    Nan(Nan),
}
use Value::{Finite, Infinity, Zero};

/// A NaN: its significand is as long as that of an 80-bit number, with the leading bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nan {
    pub negative: bool,
    pub significand: u64,
}

impl Nan {
    /// The answer to masked invalid operations.
    pub const DEFAULT: Nan = Nan { negative: true, significand: 3 << 62 };

    pub fn is_signaling(self) -> bool {
        self.significand & QUIET == 0
    }

    pub fn quieted(self) -> Self {
        Nan { significand: self.significand | QUIET, ..self }
    }
}

/// Why an operation has no finite result of finite operands, or none at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    Invalid,
    /// A finite number was divided by zero: the result is this infinity.
    DivisionByZero {
        negative: bool,
    },
}

type Exact = Result<Value, Special>;

impl Value {
    pub fn nan(self) -> Option<Nan> {
        match self {
            Value::Nan(nan) => Some(nan),
            _ => None,
        }
    }

    pub fn is_negative(self) -> bool {
        match self {
            Zero { negative } | Infinity { negative } => negative,
            Finite(number) => number.negative,
            Value::Nan(nan) => nan.negative,
        }
    }

    pub fn signed(self, negative: bool) -> Self {
        match self {
            Zero { .. } => Zero { negative },
            Finite(number) => Finite(number.signed(negative)),
            Infinity { .. } => Infinity { negative },
            Value::Nan(nan) => Value::Nan(Nan { negative, ..nan }),
        }
    }

    pub fn negated(self) -> Self {
        self.signed(!self.is_negative())
    }

    /// The integer `magnitude`, negative or not.
    pub fn integer(negative: bool, magnitude: u64) -> Self {
        Number::new(negative, magnitude.into(), 0).map_or(Zero { negative: false }, Finite)
    }
}

/// Sum of what are not NaNs. A sum of zero is negative when rounding down, unless both operands have the other sign.
pub fn add(a: Value, b: Value, rounding: Rounding) -> Exact {
    let cancelled = Zero { negative: rounding == Rounding::Down };
    match (a, b) {
        (Infinity { negative: x }, Infinity { negative: y }) if x != y => Err(Special::Invalid),
        (Infinity { .. }, _) => Ok(a),
        (_, Infinity { .. }) => Ok(b),
        (Zero { negative: x }, Zero { negative: y }) => Ok(if x == y { a } else { cancelled }),
        (Zero { .. }, _) => Ok(b),
        (_, Zero { .. }) => Ok(a),
        (Finite(x), Finite(y)) => Ok(x.plus(y).map_or(cancelled, Finite)),
        (Value::Nan(_), _) | (_, Value::Nan(_)) => Err(Special::Invalid),
    }
}

/// Product of what are not NaNs.
pub fn multiply(a: Value, b: Value) -> Exact {
    let negative = a.is_negative() != b.is_negative();
    match (a, b) {
        (Infinity { .. }, Zero { .. }) | (Zero { .. }, Infinity { .. }) => Err(Special::Invalid),
        (Infinity { .. }, _) | (_, Infinity { .. }) => Ok(Infinity { negative }),
        (Zero { .. }, _) | (_, Zero { .. }) => Ok(Zero { negative }),
        (Finite(x), Finite(y)) => Ok(Finite(x.times(y))),
        (Value::Nan(_), _) | (_, Value::Nan(_)) => Err(Special::Invalid),
    }
}

/// Quotient of what are not NaNs.
pub fn divide(a: Value, b: Value) -> Exact {
    let negative = a.is_negative() != b.is_negative();
    match (a, b) {
        (Infinity { .. }, Infinity { .. }) | (Zero { .. }, Zero { .. }) => Err(Special::Invalid),
        (Infinity { .. }, _) => Ok(Infinity { negative }),
        (_, Infinity { .. }) | (Zero { .. }, _) => Ok(Zero { negative }),
        (_, Zero { .. }) => Err(Special::DivisionByZero { negative }),
        (Finite(x), Finite(y)) => Ok(Finite(x.over(y))),
        (Value::Nan(_), _) | (_, Value::Nan(_)) => Err(Special::Invalid),
    }
}

/// Square root of what is not a NaN.
pub fn root(a: Value) -> Exact {
    match a {
        Zero { .. } | Infinity { negative: false } => Ok(a),
        Finite(number) if !number.negative => Ok(Finite(number.root())),
        _ => Err(Special::Invalid),
    }
}

/// How `a` compares with `b`; `None` for unordered.
pub fn compare(a: Value, b: Value) -> Option<Ordering> {
    let sign = |value: Value| match value {
        Zero { .. } => Ordering::Equal,
        other if other.is_negative() => Ordering::Less,
        _ => Ordering::Greater,
    };
    let by_magnitude = match (a, b) {
        (Value::Nan(_), _) | (_, Value::Nan(_)) => return None,
        (Finite(x), Finite(y)) => x.magnitude_cmp(y),
        (Infinity { .. }, Finite(_)) => Ordering::Greater,
        (Finite(_), Infinity { .. }) => Ordering::Less,
        _ => Ordering::Equal,
    };
    Some(sign(a).cmp(&sign(b)).then(if a.is_negative() { by_magnitude.reverse() } else { by_magnitude }))
}

/// A binary interchange format without an explicit leading bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    pub width: u32,
    /// Bits of the significand, the leading one included.
    pub precision: u32,
}

pub const HALF: Format = Format { width: 16, precision: 11 };
pub const SINGLE: Format = Format { width: 32, precision: 24 };
pub const DOUBLE: Format = Format { width: 64, precision: 53 };

impl Format {
    /// The greatest exponent of a finite number, and the bias.
    pub const fn greatest(self) -> i32 {
        (1 << (self.width - self.precision - 1)) - 1
    }

    /// The least exponent of a normal number.
    pub const fn least(self) -> i32 {
        1 - self.greatest()
    }

    /// The bits of a number, by the low ones of `bits`.
    const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.width)
    }

    const fn fraction(self) -> u64 {
        (1 << (self.precision - 1)) - 1
    }

    /// The value of the low bits of `bits`, and whether it is denormal.
    pub fn unpack(self, bits: u64) -> (Value, bool) {
        let bits = bits & self.mask();
        let negative = bits >> (self.width - 1) != 0;
        let fraction = bits & self.fraction();
        let field = (bits >> (self.precision - 1)) as i32 & (2 * self.greatest() + 1);
        let scale = |exponent| exponent - self.precision as i32 + 1;
        if field == 2 * self.greatest() + 1 {
            let significand = 1 << 63 | fraction << (64 - self.precision);
            let nan = Value::Nan(Nan { negative, significand });
            return (if fraction == 0 { Infinity { negative } } else { nan }, false);
        }
        let (significand, exponent) =
            if field == 0 { (fraction, self.least()) } else { (fraction | (self.fraction() + 1), field - self.greatest()) };
        match Number::new(negative, significand.into(), scale(exponent)) {
            Some(number) => (Finite(number), field == 0),
            None => (Zero { negative }, false),
        }
    }

    /// The bits of a number of the format: `significand * 2^(exponent - precision + 1)`.
    pub fn pack(self, negative: bool, significand: u64, exponent: i32) -> u64 {
        let field = if significand > self.fraction() { (exponent + self.greatest()) as u64 } else { 0 };
        u64::from(negative) << (self.width - 1) | field << (self.precision - 1) | significand & self.fraction()
    }

    pub fn zero(self, negative: bool) -> u64 {
        u64::from(negative) << (self.width - 1)
    }

    pub fn infinity(self, negative: bool) -> u64 {
        self.pack(negative, self.fraction() + 1, self.greatest() + 1)
    }

    /// The finite number that is farthest from zero.
    pub fn maximum(self, negative: bool) -> u64 {
        self.infinity(negative) - 1
    }

    /// The bits of a NaN, of whose significand the format has as much as it can.
    pub fn nan(self, nan: Nan) -> u64 {
        self.infinity(nan.negative) | nan.significand >> (64 - self.precision) & self.fraction()
    }
}
