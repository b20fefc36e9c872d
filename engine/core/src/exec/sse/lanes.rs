//! Vectors as lanes: byte arrays in memory order, read and written as integers of any width.

/// An integer that a vector is made of.
pub trait Lane: Copy {
    const BYTES: usize;
    /// Lane `n` of `bytes`.
    fn get(bytes: &[u8], n: usize) -> Self;
    /// Replaces lane `n` of `bytes`.
    fn put(self, bytes: &mut [u8], n: usize);
}

macro_rules! lane {
    ($($t:ty)*) => {$(
        impl Lane for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn get(bytes: &[u8], n: usize) -> Self {
                let mut lane = [0; size_of::<$t>()];
                lane.copy_from_slice(&bytes[n * Self::BYTES..][..Self::BYTES]);
                <$t>::from_le_bytes(lane)
            }
            #[inline(always)]
            fn put(self, bytes: &mut [u8], n: usize) {
                bytes[n * Self::BYTES..][..Self::BYTES].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
lane!(u8 i8 u16 i16 u32 i32 u64 i64);

/// A vector whose lane `n` is `lane(n)`.
#[inline(always)]
pub fn build<L: Lane, const N: usize>(lane: impl Fn(usize) -> L) -> [u8; N] {
    let mut result = [0; N];
    for n in 0..N / L::BYTES {
        lane(n).put(&mut result, n);
    }
    result
}

/// `f` of each lane of `a`.
#[inline(always)]
pub fn map<L: Lane, const N: usize>(a: [u8; N], f: impl Fn(L) -> L) -> [u8; N] {
    build(|n| f(L::get(&a, n)))
}

/// `f` of each pair of lanes of `a` and `b`.
#[inline(always)]
pub fn zip<L: Lane, const N: usize>(a: [u8; N], b: [u8; N], f: impl Fn(L, L) -> L) -> [u8; N] {
    build(|n| f(L::get(&a, n), L::get(&b, n)))
}
