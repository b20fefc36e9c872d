//! Sine, cosine, tangent, arc tangent, logarithm and power of two, by series of 128 bits (SDM vol. 1, 8.3.6 and 8.3.7).
//!
//! A series is summed as a fixed-point number near one, by which the argument is multiplied in the end: so results near zero are as good
//! as others. About 120 of 128 bits are right, and rounding to 64 errs by little more than half a unit of the last place. The last bit
//! of the significand is set, because no result is exact.

use super::number::Number;

/// One as a fixed-point number with 127 bits of fraction.
const ONE: u128 = 1 << 127;

const fn constant(exponent: i32, significand: u128) -> Number {
    Number { negative: false, exponent, significand }
}
pub const PI: Number = constant(1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1);
pub const LN_2: Number = constant(-1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);
pub const LOG2_E: Number = constant(0, 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88);
pub const LOG2_10: Number = constant(1, 0xd49a_784b_cd1b_8afe_492b_f6ff_4daf_db4d);
pub const LOG10_2: Number = constant(-2, 0x9a20_9a84_fbcf_f798_8f89_59ac_0b7c_9178);

/// The product of two fixed-point numbers.
fn times(a: u128, b: u128) -> u128 {
    let (high, low) = product(a, b);
    high << 1 | low >> 127
}

/// The product of two integers, in two halves.
fn product(a: u128, b: u128) -> (u128, u128) {
    const LOW: u128 = u64::MAX as u128;
    let (a1, a0, b1, b0) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let (low, middle) = (a0 * b0, a1 * b0);
    let carried = middle + (low >> 64);
    let other = a0 * b1 + (carried & LOW);
    (a1 * b1 + (carried >> 64) + (other >> 64), other << 64 | low & LOW)
}

/// The product of two numbers of any length.
pub fn multiply(a: Number, b: Number) -> Number {
    let (high, low) = product(a.significand, b.significand);
    let carry = high >> 127;
    let significand = if carry == 0 { high << 1 | low >> 127 } else { high };
    Number { negative: a.negative != b.negative, exponent: a.exponent + b.exponent + carry as i32, significand: significand | 1 }
}

/// The quotient of two numbers of any length.
fn divide(a: Number, b: Number) -> Number {
    let smaller = a.significand < b.significand;
    let exponent = a.exponent - b.exponent - i32::from(smaller);
    // One bit of the quotient after the other; the rest stays below the divisor.
    let mut rest = if smaller { a.significand } else { a.significand - b.significand };
    let mut significand = u128::from(!smaller);
    for _ in 0..127 + u32::from(smaller) {
        let carry = rest >> 127 != 0;
        rest <<= 1;
        let fits = carry || rest >= b.significand;
        significand = significand << 1 | u128::from(fits);
        if fits {
            rest = rest.wrapping_sub(b.significand);
        }
    }
    Number { negative: a.negative != b.negative, exponent, significand: significand | 1 }
}

/// A number below one in fixed point.
fn fixed(number: Number) -> u128 {
    number.significand.checked_shr(number.exponent.unsigned_abs()).unwrap_or(0)
}

/// The square of a number below one in fixed point, and not zero.
fn square(number: Number) -> u128 {
    times(fixed(number), fixed(number)).max(1)
}

/// A fixed-point number below two.
fn unfixed(value: u128) -> Number {
    let zeros = value.leading_zeros();
    Number { negative: false, exponent: -(zeros as i32), significand: value << zeros }
}

/// The sum of two numbers, which is not zero.
fn sum(a: Number, b: Number) -> Number {
    a.plus(b).unwrap_or(Number { significand: ONE, exponent: a.exponent - 127, ..a })
}

/// `1 - x/(2*3) * (1 - x/(4*5) * ...)`, where the first divisor is `first * (first + 1)`; always below one.
fn circular(x: u128, first: u128) -> u128 {
    let series = (0..16).rev().fold(ONE, |sum, k| {
        let n = first + 2 * k;
        ONE - times(x, sum) / (n * (n + 1))
    });
    series.min(ONE - 1)
}

/// An angle as a number of right angles, modulo four, and a rest of at most half of one.
struct Angle {
    quadrant: u32,
    rest: Option<Number>,
}

impl Angle {
    /// Of an angle below 2^63. The unit's pi has 66 bits (SDM vol. 1, 8.3.8).
    fn of(angle: Number) -> Self {
        const RIGHT: u128 = 0x3_243f_6a88_85a3_08d3;
        const SCALE: i32 = 65;
        let shift = angle.exponent - 63 + SCALE;
        if shift < 0 {
            return Angle { quadrant: 0, rest: Some(angle) };
        }
        let (quotient, rest) = (0..shift).fold((0u32, u128::from(angle.high())), |(quotient, rest), _| {
            let (quotient, rest) = (quotient << 1, rest << 1);
            if rest >= RIGHT {
                (quotient | 1, rest - RIGHT)
            } else {
                (quotient, rest)
            }
        });
        let above = 2 * rest > RIGHT;
        let (quotient, rest) = if above { (quotient.wrapping_add(1), RIGHT - rest) } else { (quotient, rest) };
        let quadrant = if angle.negative { quotient.wrapping_neg() } else { quotient } & 3;
        Angle { quadrant, rest: Number::new(above != angle.negative, rest, -SCALE) }
    }

    /// Sine and cosine of the rest; zero is `None`.
    fn of_rest(&self) -> (Option<Number>, Number) {
        let Some(rest) = self.rest else { return (None, Number::ONE) };
        let square = square(rest);
        (Some(multiply(rest, unfixed(circular(square, 2)))), unfixed(circular(square, 1) | 1))
    }

    fn sine_and_cosine(&self) -> (Option<Number>, Option<Number>) {
        let (sine, cosine) = self.of_rest();
        let (sine, cosine) = if self.quadrant & 1 == 0 { (sine, Some(cosine)) } else { (Some(cosine), sine.map(Number::negated)) };
        let sign = |value: Option<Number>| if self.quadrant & 2 == 0 { value } else { value.map(Number::negated) };
        (sign(sine), sign(cosine))
    }
}

/// Sine and cosine of an angle below 2^63; `None` is zero.
pub fn sine_and_cosine(angle: Number) -> (Option<Number>, Option<Number>) {
    Angle::of(angle).sine_and_cosine()
}

/// Tangent of an angle below 2^63; `None` is zero. No angle of 64 bits is a multiple of a right one.
pub fn tangent(angle: Number) -> Option<Number> {
    let (sine, cosine) = Angle::of(angle).sine_and_cosine();
    Some(divide(sine?, cosine?))
}

/// `2^x - 1` for x between -1 and 1.
pub fn power_minus_one(x: Number) -> Number {
    let exponent = multiply(x, LN_2);
    let magnitude = fixed(exponent);
    let series = (2..34).rev().fold(ONE, |sum, n| {
        let term = times(magnitude, sum) / n;
        if x.negative {
            ONE - term
        } else {
            ONE + term
        }
    });
    multiply(exponent, unfixed(series))
}

/// `log2((1 + z) / (1 - z))` for z up to 0.2 in magnitude.
fn logarithm_of_ratio(z: Number) -> Number {
    let square = square(z);
    let series = (0..28).rev().fold(0, |sum, k| ONE / (2 * k + 1) + times(square, sum));
    multiply(multiply(z.scaled(1), unfixed(series)), LOG2_E)
}

/// `log2(x)` of a positive number; `None` is zero.
pub fn logarithm(x: Number) -> Option<Number> {
    /// The square root of two.
    const ROOT: u128 = 0xb504_f333_f9de_6484_597d_89b3_754a_be9f;
    let above = x.significand > ROOT;
    let exponent = x.exponent + i32::from(above);
    let mantissa = Number { exponent: -i32::from(above), ..x };
    let whole = Number::new(exponent < 0, exponent.unsigned_abs().into(), 0);
    let Some(difference) = mantissa.plus(Number::ONE.negated()) else { return whole };
    let fraction = logarithm_of_ratio(divide(difference, sum(mantissa, Number::ONE)));
    Some(whole.map_or(fraction, |whole| sum(whole, fraction)))
}

/// `log2(1 + x)` for x above -1, also near zero; `None` is zero.
pub fn logarithm_plus_one(x: Number) -> Option<Number> {
    if x.exponent >= -2 {
        return logarithm(x.plus(Number::ONE)?);
    }
    Some(logarithm_of_ratio(divide(x, sum(x, Number::ONE.scaled(1)))))
}

/// The angle of the point (x, y).
pub fn angle(y: Number, x: Number) -> Number {
    let steep = y.magnitude_cmp(x).is_gt();
    let slope = if steep { divide(x.signed(false), y.signed(false)) } else { divide(y.signed(false), x.signed(false)) };
    let shallow = arc_tangent(slope);
    let right = PI.scaled(-1);
    let first = if steep { sum(right, shallow.negated()) } else { shallow };
    let magnitude = if x.negative { sum(PI, first.negated()) } else { first };
    magnitude.signed(y.negative)
}

/// Arc tangent of a number from 0 to 1.
fn arc_tangent(slope: Number) -> Number {
    /// 3/8: above it, the arc tangent of one is taken off.
    const MIDDLE: u128 = ONE / 8 * 3;
    if slope.exponent >= 0 || fixed(slope) > MIDDLE {
        let quarter = PI.scaled(-2);
        let Some(below) = slope.plus(Number::ONE.negated()) else { return quarter };
        return sum(quarter, arc_tangent_near_zero(divide(below, sum(slope, Number::ONE))));
    }
    arc_tangent_near_zero(slope)
}

/// Arc tangent of a number up to 0.46 in magnitude.
fn arc_tangent_near_zero(slope: Number) -> Number {
    let square = square(slope);
    let series = (0..56).rev().fold(0, |sum, k| ONE / (2 * k + 1) - times(square, sum));
    multiply(slope, unfixed(series))
}
