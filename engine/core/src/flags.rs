//! Arithmetic flags, kept as the result and the carries of the last instruction and computed when somebody reads them.
//!
//! `result` is sign-extended from the operand size, so ZF and SF need no size. `aux` holds the carry chain: bit 63 is the carry out of
//! the top bit (CF), bit 62 the carry into it (OF is their difference), bit 3 the carry out of bit 3 (AF). Bits 0 and 15:8 of `aux`
//! correct SF and PF where a flag image (POPF, SAHF) cannot be told by any result.

use crate::state::rflags::{AF, CF, OF, PF, SF, ZF};
use crate::word::Word;

const CARRY: u64 = 1 << 63;
const CARRY_IN: u64 = 1 << 62;
const HALF: u64 = 1 << 3;
const SIGN_FIX: u64 = 1;
const PARITY_SHIFT: u32 = 8;

/// The six arithmetic flags in lazy form.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flags {
    result: u64,
    aux: u64,
}

impl Flags {
    /// Flags of a logical operation: CF, OF and AF clear.
    #[inline(always)]
    pub fn logic<W: Word>(result: W) -> Self {
        Flags { result: result.sign_extend(), aux: 0 }
    }

    /// Flags of an addition with carry vector `carries`: bit n is the carry out of bit n.
    #[inline(always)]
    fn chain<W: Word>(result: W, carries: W) -> Self {
        let carries = carries.zero_extend();
        let top = carries << (64 - W::BITS);
        Flags { result: result.sign_extend(), aux: top & (CARRY | CARRY_IN) | carries & HALF }
    }

    /// Flags of `result = a + b (+ carry)`.
    #[inline(always)]
    pub fn add<W: Word>(a: W, b: W, result: W) -> Self {
        Self::chain(result, (a & b) | ((a | b) & !result))
    }

    /// Flags of `result = a - b (- borrow)`.
    #[inline(always)]
    pub fn sub<W: Word>(a: W, b: W, result: W) -> Self {
        Self::chain(result, (!a & b) | (!(a ^ b) & result))
    }

    /// Flags of an operation that leaves CF as it was: `new`'s others with `self`'s CF.
    #[inline(always)]
    pub fn with_carry_of(self, old: Flags) -> Self {
        let overflow = (self.aux ^ self.aux << 1) & CARRY;
        let carry = old.aux & CARRY;
        let aux = self.aux & !(CARRY | CARRY_IN) | carry | (carry ^ overflow) >> 1;
        Flags { result: self.result, aux }
    }

    /// ZF, SF and PF from `result`; CF and OF as given; AF clear.
    #[inline(always)]
    pub fn shift<W: Word>(result: W, carry: bool, overflow: bool) -> Self {
        let aux = (carry as u64) << 63 | ((carry ^ overflow) as u64) << 62;
        Flags { result: result.sign_extend(), aux }
    }

    /// The same flags with CF and OF replaced.
    #[inline(always)]
    pub fn with_carry_overflow(self, carry: bool, overflow: bool) -> Self {
        let aux = self.aux & !(CARRY | CARRY_IN) | (carry as u64) << 63 | ((carry ^ overflow) as u64) << 62;
        Flags { result: self.result, aux }
    }

    /// The same flags with CF replaced and OF kept.
    #[inline(always)]
    pub fn with_carry(self, carry: bool) -> Self {
        let overflow = self.of();
        self.with_carry_overflow(carry, overflow)
    }

    /// The same flags with AF replaced.
    #[inline(always)]
    pub fn with_half_carry(self, half: bool) -> Self {
        Flags { result: self.result, aux: self.aux & !HALF | (half as u64) << 3 }
    }

    /// The same flags with ZF replaced (as CMPXCHG8B, LAR or VERR do).
    #[inline]
    pub fn with_zero(self, zero: bool) -> Self {
        Self::from_bits(self.bits() & !ZF | if zero { ZF } else { 0 })
    }

    /// Flags from an image of RFLAGS.
    #[inline]
    pub fn from_bits(image: u64) -> Self {
        // A zero result has even parity and no sign; any other result that we choose (1 << 8) has the same.
        let result = if image & ZF != 0 { 0 } else { 1 << 8 };
        let mut aux = 0;
        if image & SF != 0 {
            aux |= SIGN_FIX;
        }
        if image & PF == 0 {
            aux |= 1 << PARITY_SHIFT;
        }
        if image & AF != 0 {
            aux |= HALF;
        }
        Flags { result, aux }.with_carry_overflow(image & CF != 0, image & OF != 0)
    }

    /// The flags as bits of RFLAGS.
    #[inline]
    pub fn bits(self) -> u64 {
        let mut image = 0;
        for (set, bit) in [(self.cf(), CF), (self.pf(), PF), (self.af(), AF), (self.zf(), ZF), (self.sf(), SF), (self.of(), OF)] {
            if set {
                image |= bit;
            }
        }
        image
    }

    #[inline(always)]
    pub fn cf(self) -> bool {
        self.aux & CARRY != 0
    }
    #[inline(always)]
    pub fn of(self) -> bool {
        (self.aux ^ self.aux << 1) & CARRY != 0
    }
    #[inline(always)]
    pub fn af(self) -> bool {
        self.aux & HALF != 0
    }
    #[inline(always)]
    pub fn zf(self) -> bool {
        self.result == 0
    }
    #[inline(always)]
    pub fn sf(self) -> bool {
        (self.result >> 63 ^ self.aux & SIGN_FIX) != 0
    }
    #[inline(always)]
    pub fn pf(self) -> bool {
        let byte = self.result as u8 ^ (self.aux >> PARITY_SHIFT) as u8;
        byte.count_ones() & 1 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_image_survives() {
        for n in 0..64u64 {
            let image = [CF, PF, AF, ZF, SF, OF].iter().enumerate().map(|(i, f)| if n >> i & 1 != 0 { *f } else { 0 }).sum();
            assert_eq!(Flags::from_bits(image).bits(), image);
        }
    }

    #[test]
    fn byte_arithmetic_matches_the_definition() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let (sum, carry) = a.overflowing_add(b);
                let f = Flags::add(a, b, sum);
                let overflow = (a as i8).overflowing_add(b as i8).1;
                assert_eq!((f.cf(), f.of(), f.zf(), f.sf()), (carry, overflow, sum == 0, sum > 127));
                assert_eq!(f.af(), (a & 15) + (b & 15) > 15);
                let (difference, borrow) = a.overflowing_sub(b);
                let f = Flags::sub(a, b, difference);
                let overflow = (a as i8).overflowing_sub(b as i8).1;
                assert_eq!((f.cf(), f.of(), f.zf(), f.sf()), (borrow, overflow, difference == 0, difference > 127));
                assert_eq!(f.af(), a & 15 < b & 15);
                assert_eq!(f.pf(), difference.count_ones() & 1 == 0);
            }
        }
    }

    #[test]
    fn increment_keeps_carry() {
        let old = Flags::from_bits(CF);
        let f = Flags::add(0x7fu8, 1, 0x80).with_carry_of(old);
        assert!(f.cf() && f.of() && f.sf());
        let f = Flags::add(0xffu8, 1, 0).with_carry_of(Flags::default());
        assert!(!f.cf() && !f.of() && f.zf() && f.af());
    }
}
