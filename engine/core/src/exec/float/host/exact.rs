//! The precision flag behind unmasked overflow and underflow (SDM vol. 1, 4.9.1.4, 4.9.1.5 and 11.5.2.4 to 11.5.2.6).
//!
//! An unmasked overflow or underflow is found on the result rounded to its precision with an exponent that has no bounds, and the precision
//! flag tells whether that rounding lost something. The host, on which everything is masked, tells it of the result with bounds. So lanes
//! that overflow or underflow unmasked are looked at again one by one, as integers: a result is exact if its bits, from the first to the
//! last that is set, are not more than the precision.

use crate::exec::float::mxcsr;

/// Whether `flags` have an overflow or underflow that is unmasked under `guest`.
#[inline(always)]
pub fn traps(guest: u32, flags: u32) -> bool {
    flags & !(guest >> mxcsr::MASK_SHIFT) & (mxcsr::OVERFLOW | mxcsr::UNDERFLOW) != 0
}

/// The flags of the instruction called `op`, which raises those that `raise` tells on its operands, under a guest's MXCSR.
#[cold]
pub fn settle<const N: usize>(op: &str, guest: u32, operands: [u128; N], raise: impl Fn([u128; N]) -> u32) -> u32 {
    let Some(shape) = Shape::of(op) else { return raise(operands) };
    let lane = |n: u32| {
        let flags = raise(operands.map(|operand| shape.isolate(operand, n)));
        if !traps(guest, flags) {
            return flags;
        }
        let numbers = operands.map(|operand| Number::of(shape.lane(operand, n), shape.source, guest & mxcsr::DAZ != 0));
        let inexact = !shape.is_exact(op, n, &numbers);
        flags & !mxcsr::PRECISION | if inexact { mxcsr::PRECISION } else { 0 }
    };
    (0..shape.lanes).map(lane).fold(0, |all, flags| all | flags)
}

/// A binary floating-point format.
#[derive(Clone, Copy)]
struct Format {
    width: u32,
    /// Bits of the fraction.
    fraction: u32,
    /// The number 1.
    one: u64,
}

const SINGLE: Format = Format { width: 32, fraction: 23, one: 0x3f80_0000 };
const DOUBLE: Format = Format { width: 64, fraction: 52, one: 0x3ff0_0000_0000_0000 };
const HALF_PRECISION: u32 = 11;

/// What an instruction works on.
struct Shape {
    source: Format,
    lanes: u32,
    /// Bits of a result's significand.
    precision: u32,
}

impl Shape {
    /// The shape of the instruction called `op`; `None` for those that neither overflow nor underflow.
    fn of(op: &str) -> Option<Shape> {
        let arithmetic = ["add", "sub", "mul", "div", "vfm", "vfnm"].iter().any(|name| op.starts_with(name));
        if !arithmetic && !["cvtpd2ps", "cvtsd2ss", "vcvtps2ph"].contains(&op) {
            return None;
        }
        let source = if op.starts_with("cvt") || op.ends_with('d') { DOUBLE } else { SINGLE };
        let scalar = op.ends_with("ss") || op.ends_with("sd");
        let precision = match op {
            "vcvtps2ph" => HALF_PRECISION,
            _ if op.ends_with('d') => DOUBLE.fraction + 1,
            _ => SINGLE.fraction + 1,
        };
        Some(Shape { source, lanes: if scalar { 1 } else { 128 / source.width }, precision })
    }

    fn lane(&self, operand: u128, n: u32) -> u64 {
        (operand >> (n * self.source.width)) as u64 & (u64::MAX >> (64 - self.source.width))
    }

    /// `operand` with 1 in all lanes but lane `n`: nothing is raised for them.
    fn isolate(&self, operand: u128, n: u32) -> u128 {
        (0..128 / self.source.width).fold(0, |all, lane| {
            let value = if lane == n { self.lane(operand, n) } else { self.source.one };
            all | u128::from(value) << (lane * self.source.width)
        })
    }

    /// Whether lane `n` of the result is exact with any exponent.
    fn is_exact(&self, op: &str, n: u32, operands: &[Number]) -> bool {
        let fits = |number: Option<Number>| number.is_some_and(|number| number.bits() <= self.precision);
        match *operands {
            [a, b] if op.starts_with("add") => fits(a.plus(b)),
            [a, b] if op.starts_with("sub") => fits(a.plus(b.negated())),
            [a, b] if op.starts_with("mul") => fits(Some(a.times(b))),
            [a, b] if op.starts_with("div") => a.significand % b.significand.max(1) == 0,
            [a, b, c] => {
                let (x, y, z) = if op.contains("132") {
                    (a, c, b)
                } else if op.contains("213") {
                    (b, a, c)
                } else {
                    (b, c, a)
                };
                let product = if op.starts_with("vfn") { x.times(y).negated() } else { x.times(y) };
                let odd = n % 2 != 0;
                let subtracts = match op.trim_start_matches("vfn").trim_start_matches("vf") {
                    op if op.starts_with("maddsub") => !odd,
                    op if op.starts_with("msubadd") => odd,
                    op => op.starts_with("msub"),
                };
                fits(product.plus(if subtracts { z.negated() } else { z }))
            }
            _ => fits(operands.last().copied()),
        }
    }
}

/// `significand * 2^exponent`, negative or not, with an odd significand, or zero.
#[derive(Clone, Copy)]
struct Number {
    negative: bool,
    significand: u128,
    exponent: i32,
}

impl Number {
    fn new(negative: bool, significand: u128, exponent: i32) -> Self {
        let zeros = if significand == 0 { 0 } else { significand.trailing_zeros() };
        Number { negative, significand: significand >> zeros, exponent: exponent + zeros as i32 }
    }

    /// A finite number by its bits.
    fn of(bits: u64, format: Format, denormals_are_zeros: bool) -> Self {
        let fraction = bits & ((1 << format.fraction) - 1);
        let negative = bits >> (format.width - 1) != 0;
        let exponent = (bits >> format.fraction) as i32 & ((1 << (format.width - 1 - format.fraction)) - 1);
        let last = exponent.max(1) - (format.one >> format.fraction) as i32 - format.fraction as i32;
        match exponent {
            0 if denormals_are_zeros => Number::new(negative, 0, last),
            0 => Number::new(negative, fraction.into(), last),
            _ => Number::new(negative, (fraction | 1 << format.fraction).into(), last),
        }
    }

    fn bits(self) -> u32 {
        u128::BITS - self.significand.leading_zeros()
    }

    fn negated(self) -> Self {
        Number { negative: !self.negative, ..self }
    }

    fn times(self, other: Self) -> Self {
        Number::new(self.negative != other.negative, self.significand * other.significand, self.exponent + other.exponent)
    }

    /// The sum, if it has at most 126 bits.
    fn plus(self, other: Self) -> Option<Self> {
        if self.significand == 0 || other.significand == 0 {
            return Some(if self.significand == 0 { other } else { self });
        }
        let (high, low) = if self.exponent >= other.exponent { (self, other) } else { (other, self) };
        let distance = (high.exponent - low.exponent) as u32;
        if high.bits() + distance > 126 {
            return None; // the low one's last bit is too far from the sum's first
        }
        let signed = |number: Number, shift| {
            let value = (number.significand << shift) as i128;
            if number.negative {
                -value
            } else {
                value
            }
        };
        let sum = signed(high, distance) + signed(low, 0);
        Some(Number::new(sum < 0, sum.unsigned_abs(), low.exponent))
    }
}

#[cfg(test)]
mod tests {
    use crate::exec::float::host::sse::{simd, simd_ternary};
    use crate::exec::float::mxcsr;

    /// MXCSR with overflow and underflow unmasked.
    const GUEST: u32 = mxcsr::MASKS & !((mxcsr::OVERFLOW | mxcsr::UNDERFLOW) << mxcsr::MASK_SHIFT);

    fn double(value: f64) -> u128 {
        value.to_bits().into()
    }

    #[test]
    fn an_exact_result_out_of_range_is_not_inexact() {
        let (huge, tiny) = (f64::MAX, f64::MIN_POSITIVE);
        let flags = |(_, flags): (u128, u32)| flags;
        assert_eq!(flags(simd!(GUEST, "mulsd", double(huge), double(2.0))), mxcsr::OVERFLOW);
        assert_eq!(flags(simd!(GUEST, "mulsd", double(huge), double(3.0))), mxcsr::OVERFLOW | mxcsr::PRECISION);
        assert_eq!(flags(simd!(GUEST, "divsd", double(tiny), double(4.0))), mxcsr::UNDERFLOW);
        assert_eq!(flags(simd!(GUEST, "divsd", double(tiny), double(3.0))), mxcsr::UNDERFLOW | mxcsr::PRECISION);
        assert_eq!(flags(simd!(GUEST, "addsd", double(huge), double(huge))), mxcsr::OVERFLOW);
        assert_eq!(flags(simd!(GUEST, "cvtsd2ss", 0, double(1e300))), mxcsr::OVERFLOW | mxcsr::PRECISION);
        assert_eq!(flags(simd!(GUEST, "cvtsd2ss", 0, double(2f64.powi(200)))), mxcsr::OVERFLOW);
    }

    #[test]
    fn a_fused_result_is_looked_at_before_it_is_rounded() {
        let flags = |(_, flags): (u128, u32)| flags;
        if !std::arch::is_x86_feature_detected!("fma") {
            return;
        }
        let (huge, two) = (double(f64::MAX), double(2.0));
        // 231: the first operand is what is added.
        assert_eq!(flags(simd_ternary!(GUEST, "vfmadd231sd", huge, huge, two)), mxcsr::OVERFLOW | mxcsr::PRECISION);
        assert_eq!(flags(simd_ternary!(GUEST, "vfmsub231sd", double(-2f64.powi(971)), huge, two)), mxcsr::OVERFLOW | mxcsr::PRECISION);
        assert_eq!(flags(simd_ternary!(GUEST, "vfmadd231sd", 0, huge, two)), mxcsr::OVERFLOW);
    }

    #[test]
    fn lanes_in_range_keep_their_own_flags() {
        let lanes = |low: f64, high: f64| double(high) << 64 | double(low);
        let (_, both) = simd!(GUEST, "mulpd", lanes(f64::MAX, 1.0 / 3.0), lanes(2.0, 1.0 / 3.0));
        assert_eq!(both, mxcsr::OVERFLOW | mxcsr::PRECISION);
        let (_, first) = simd!(GUEST, "mulpd", lanes(f64::MAX, 3.0), lanes(2.0, 3.0));
        assert_eq!(first, mxcsr::OVERFLOW);
    }
}
