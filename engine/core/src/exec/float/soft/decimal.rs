//! Packed decimal integers (SDM vol. 1, 4.7): 18 digits, two in each byte, and a sign.

use super::value::Value;

/// The greatest integer of 18 digits.
pub const GREATEST: u64 = 999_999_999_999_999_999;

/// What stands for an integer that has more digits.
pub const INDEFINITE: u128 = 0xffff_c000_0000_0000_0000;

/// The value of a packed integer; what its digits mean that are more than nine is not defined, and they count as they are.
pub fn load(bytes: &[u8; 16]) -> Value {
    let magnitude = bytes[..9].iter().rev().fold(0u64, |sum, byte| sum * 100 + u64::from(byte >> 4) * 10 + u64::from(byte & 15));
    let negative = bytes[9] & 0x80 != 0;
    match Value::integer(negative, magnitude) {
        Value::Zero { .. } => Value::Zero { negative },
        value => value,
    }
}

/// The packed integer of a magnitude of at most 18 digits.
pub fn store(negative: bool, magnitude: u64) -> u128 {
    let (packed, _) = (0..18).fold((0u128, magnitude), |(packed, rest), digit| (packed | u128::from(rest % 10) << (4 * digit), rest / 10));
    packed | u128::from(negative) << 79
}
