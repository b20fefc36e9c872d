//! Instructions by their names in the assembler, as the host's implementation knows them. A name that is not known does not compile.

use super::value::{Format, DOUBLE, SINGLE};

/// What an SSE instruction does in each lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    Add,
    Subtract,
    Multiply,
    Divide,
    Minimum,
    Maximum,
    Root,
    Reciprocal,
    ReciprocalRoot,
    Compare,
}

/// An SSE instruction on one or two registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Simd {
    /// The same in one lane or in all.
    Lanes { lane: Lane, format: Format, scalar: bool },
    /// `count` integers of 32 bits to numbers of a format.
    FromIntegers { to: Format, count: u32 },
    /// `count` numbers of a format to integers of 32 bits.
    ToIntegers { from: Format, count: u32, truncates: bool },
    /// `count` numbers of one format to another; a single one keeps the rest of the first register.
    Between { from: Format, to: Format, count: u32 },
    /// Four half-precision numbers to single-precision ones.
    FromHalf,
}

/// Whether two names are equal.
const fn is(a: &[u8], b: &str) -> bool {
    let b = b.as_bytes();
    if a.len() != b.len() {
        return false;
    }
    let mut n = 0;
    while n < a.len() {
        if a[n] != b[n] {
            return false;
        }
        n += 1;
    }
    true
}

/// A name without its last two letters, and what they say: the format, and whether the instruction works on one lane.
const fn suffix(name: &str) -> (&[u8], Format, bool) {
    let name = name.as_bytes();
    let (stem, suffix) = name.split_at(name.len() - 2);
    let format = if suffix[1] == b's' { SINGLE } else { DOUBLE };
    (stem, format, suffix[0] == b's')
}

impl Simd {
    /// The instruction called `name`.
    pub const fn of(name: &str) -> Self {
        const CONVERSIONS: [(&str, Simd); 11] = [
            ("cvtdq2ps", Simd::FromIntegers { to: SINGLE, count: 4 }),
            ("cvtdq2pd", Simd::FromIntegers { to: DOUBLE, count: 2 }),
            ("cvtps2dq", Simd::ToIntegers { from: SINGLE, count: 4, truncates: false }),
            ("cvttps2dq", Simd::ToIntegers { from: SINGLE, count: 4, truncates: true }),
            ("cvtpd2dq", Simd::ToIntegers { from: DOUBLE, count: 2, truncates: false }),
            ("cvttpd2dq", Simd::ToIntegers { from: DOUBLE, count: 2, truncates: true }),
            ("cvtps2pd", Simd::Between { from: SINGLE, to: DOUBLE, count: 2 }),
            ("cvtpd2ps", Simd::Between { from: DOUBLE, to: SINGLE, count: 2 }),
            ("cvtss2sd", Simd::Between { from: SINGLE, to: DOUBLE, count: 1 }),
            ("cvtsd2ss", Simd::Between { from: DOUBLE, to: SINGLE, count: 1 }),
            ("vcvtph2ps", Simd::FromHalf),
        ];
        let mut n = 0;
        while n < CONVERSIONS.len() {
            if is(name.as_bytes(), CONVERSIONS[n].0) {
                return CONVERSIONS[n].1;
            }
            n += 1;
        }
        const LANES: [(&str, Lane); 10] = [
            ("add", Lane::Add),
            ("sub", Lane::Subtract),
            ("mul", Lane::Multiply),
            ("div", Lane::Divide),
            ("min", Lane::Minimum),
            ("max", Lane::Maximum),
            ("sqrt", Lane::Root),
            ("rcp", Lane::Reciprocal),
            ("rsqrt", Lane::ReciprocalRoot),
            ("cmp", Lane::Compare),
        ];
        let (stem, format, scalar) = suffix(name);
        let mut n = 0;
        while n < LANES.len() {
            if is(stem, LANES[n].0) {
                return Simd::Lanes { lane: LANES[n].1, format, scalar };
            }
            n += 1;
        }
        panic!("not an SSE instruction of floating point")
    }
}

/// A fused multiply-add: `±(x * y) ± z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fused {
    pub format: Format,
    pub scalar: bool,
    /// Which operands are x, y and z.
    pub order: [usize; 3],
    pub negates_product: bool,
    /// Whether z is subtracted in even and in odd lanes.
    pub subtracts: [bool; 2],
}

impl Fused {
    /// The instruction called `name`.
    pub const fn of(name: &str) -> Self {
        let (stem, format, scalar) = suffix(name);
        let (kind, digits) = stem.split_at(stem.len() - 3);
        let order = match digits {
            b"132" => [0, 2, 1],
            b"213" => [1, 0, 2],
            b"231" => [1, 2, 0],
            _ => panic!("not a form of fused multiply-add"),
        };
        let (negates_product, subtracts) = match kind {
            b"vfmadd" => (false, [false, false]),
            b"vfmsub" => (false, [true, true]),
            b"vfnmadd" => (true, [false, false]),
            b"vfnmsub" => (true, [true, true]),
            b"vfmaddsub" => (false, [true, false]),
            b"vfmsubadd" => (false, [false, true]),
            _ => panic!("not a fused multiply-add"),
        };
        Fused { format, scalar, order, negates_product, subtracts }
    }
}

/// A conversion between a general register and the low lane of an XMM register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct General {
    pub format: Format,
    pub truncates: bool,
    /// Bits of the general register.
    pub width: u32,
}

impl General {
    /// The instruction called `name` whose general register has operand modifier `modifier` (`:e` or `:r`).
    pub const fn of(name: &str, modifier: &str) -> Self {
        let width = if is(modifier.as_bytes(), ":r") { 64 } else { 32 };
        let (format, truncates) = match name.as_bytes() {
            b"cvtsi2ss" | b"cvtss2si" => (SINGLE, false),
            b"cvtsi2sd" | b"cvtsd2si" => (DOUBLE, false),
            b"cvttss2si" => (SINGLE, true),
            b"cvttsd2si" => (DOUBLE, true),
            _ => panic!("not a conversion between registers"),
        };
        General { format, truncates, width }
    }
}

/// A comparison that answers in EFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    pub format: Format,
    /// Quiet NaNs are invalid, too.
    pub ordered: bool,
}

impl Comparison {
    /// The instruction called `name`.
    pub const fn of(name: &str) -> Self {
        let (stem, format, _) = suffix(name);
        match stem {
            b"comi" => Comparison { format, ordered: true },
            b"ucomi" => Comparison { format, ordered: false },
            _ => panic!("not a comparison into EFLAGS"),
        }
    }
}
