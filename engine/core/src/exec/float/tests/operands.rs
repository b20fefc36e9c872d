//! Operands that are likely to matter.

/// A generator of numbers that are the same in each run (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// Bits in runs, as carries and roundings like them.
    pub fn runs(&mut self) -> u64 {
        let (a, b) = (self.below(64), self.below(64));
        match self.below(4) {
            0 => self.next(),
            1 => u64::MAX << a,
            2 => (1 << a) + (1 << b) - 1,
            _ => (u64::MAX >> a) & self.next() << b,
        }
    }

    /// A number with `fraction` bits of fraction and `exponent` bits of exponent: special, near the bounds of the format, near `near`, or
    /// any.
    pub fn number(&mut self, fraction: u32, exponent: u32, near: u64) -> u64 {
        let top = (1 << exponent) - 1;
        let bias = top >> 1;
        let field = match self.below(10) {
            0 => 0,
            1 => top,
            2 => self.below(3),
            3 => top - self.below(3),
            4 => bias + self.below(70) - 35,
            5 | 6 => near.wrapping_add(self.below(9)).wrapping_sub(4) & top,
            7 => bias / 2 + self.below(5),
            8 => bias + bias / 2 - self.below(5),
            _ => self.next() & top,
        };
        let bits = match self.below(4) {
            0 => 0,
            _ => self.runs() & ((1 << fraction) - 1),
        };
        let sign = self.below(2) << (fraction + exponent);
        sign | field << fraction | bits
    }

    /// An XMM register of numbers of `fraction` and `exponent` bits, lane by lane near those of `near`.
    pub fn register(&mut self, fraction: u32, exponent: u32, near: u128) -> u128 {
        let width = 1 + fraction + exponent;
        (0..128 / width).fold(0, |register, lane| {
            let near = (near >> (lane * width + fraction)) as u64 & ((1 << exponent) - 1);
            register | u128::from(self.number(fraction, exponent, near)) << (lane * width)
        })
    }
}
