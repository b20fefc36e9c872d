//! Operand widths: the unsigned integers that instructions work on, so that one generic function serves 8 to 64 bits.

use core::ops::{BitAnd, BitOr, BitXor, Not, Shl, Shr};

/// Plain data that guest memory can hold at any address.
///
/// # Safety
/// Every bit pattern must be a valid value, and the type must have no padding.
pub unsafe trait Plain: Copy + Default + 'static {}

// SAFETY: integers and byte arrays have no invalid bit patterns and no padding.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for u128 {}
// SAFETY: as above.
unsafe impl<const N: usize> Plain for [u8; N] where [u8; N]: Default {}

/// An operand of 8, 16, 32 or 64 bits.
pub trait Word:
    Plain
    + Ord
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitXor<Output = Self>
    + Not<Output = Self>
    + Shl<u32, Output = Self>
    + Shr<u32, Output = Self>
{
    const BITS: u32;
    const BYTES: u64 = Self::BITS as u64 / 8;
    const ZERO: Self;
    const ONE: Self;
    fn truncate(value: u64) -> Self;
    fn zero_extend(self) -> u64;
    fn sign_extend(self) -> u64;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn top_bit(self) -> bool;
    /// Compare-and-exchange on memory that other threads may use; returns the value found.
    ///
    /// # Safety
    /// `at` must be valid for atomic access and aligned to the size of the word.
    unsafe fn compare_exchange(at: *mut Self, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! word {
    ($u:ty, $i:ty, $atomic:ty) => {
        impl Word for $u {
            const BITS: u32 = <$u>::BITS;
            const ZERO: Self = 0;
            const ONE: Self = 1;
            #[inline(always)]
            fn truncate(value: u64) -> Self {
                value as $u
            }
            #[inline(always)]
            fn zero_extend(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $i as i64 as u64
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn top_bit(self) -> bool {
                (self as $i) < 0
            }
            #[inline(always)]
            unsafe fn compare_exchange(at: *mut Self, old: Self, new: Self) -> Result<Self, Self> {
                use core::sync::atomic::Ordering::SeqCst;
                // SAFETY: the caller promises a valid, aligned address.
                unsafe { <$atomic>::from_ptr(at) }.compare_exchange(old, new, SeqCst, SeqCst)
            }
        }
    };
}

word!(u8, i8, core::sync::atomic::AtomicU8);
word!(u16, i16, core::sync::atomic::AtomicU16);
word!(u32, i32, core::sync::atomic::AtomicU32);
word!(u64, i64, core::sync::atomic::AtomicU64);
