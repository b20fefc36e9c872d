//! Guest RAM in the order in which the guest's processors promise each other to see it (SDM vol. 3, 9.2): loads and stores in program
//! order, but for a load that passes an earlier store.
//!
//! A host that promises the same reads and writes plainly. Any other acquires with each load and releases with each store, which is that
//! promise; what no atomic instruction of its does at once gets a fence instead.

use crate::word::Plain;

/// Reads guest RAM at any alignment.
///
/// # Safety
/// `at` must be mapped guest RAM.
#[inline(always)]
pub unsafe fn load<T: Plain>(at: *const T) -> T {
    // SAFETY: by the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        return at.read_unaligned();
        #[cfg(not(target_arch = "x86_64"))]
        return weak::load(at);
    }
}

/// Writes guest RAM at any alignment.
///
/// # Safety
/// `at` must be mapped guest RAM.
#[inline(always)]
pub unsafe fn store<T: Plain>(at: *mut T, value: T) {
    // SAFETY: by the caller's promise.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        at.write_unaligned(value);
        #[cfg(not(target_arch = "x86_64"))]
        weak::store(at, value);
    }
}

/// Orders accesses without an order of their own, and locked ones, with all that come before and behind.
#[inline(always)]
pub fn settle() {
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(any(test, not(target_arch = "x86_64")))]
mod weak {
    use std::mem::{size_of, transmute_copy};
    use std::sync::atomic::{fence, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

    use crate::word::Plain;

    /// # Safety
    /// As [`super::load`]'s.
    #[inline(always)]
    pub unsafe fn load<T: Plain>(at: *const T) -> T {
        macro_rules! atomically {
            ($($bytes:literal $atomic:ty;)*) => {
                match size_of::<T>() {
                    // SAFETY: by the caller's promise, aligned as the guard found, and `T` has that many bytes, which are all valid.
                    $($bytes if at.cast::<$atomic>().is_aligned() => unsafe {
                        transmute_copy(&<$atomic>::from_ptr(at.cast_mut().cast()).load(Ordering::Acquire))
                    },)*
                    _ => {
                        // SAFETY: by the caller's promise.
                        let value = unsafe { at.read_unaligned() };
                        fence(Ordering::Acquire);
                        value
                    }
                }
            };
        }
        atomically! { 1 AtomicU8; 2 AtomicU16; 4 AtomicU32; 8 AtomicU64; }
    }

    /// # Safety
    /// As [`super::store`]'s.
    #[inline(always)]
    pub unsafe fn store<T: Plain>(at: *mut T, value: T) {
        macro_rules! atomically {
            ($($bytes:literal $atomic:ty;)*) => {
                match size_of::<T>() {
                    // SAFETY: as in `load`.
                    $($bytes if at.cast::<$atomic>().is_aligned() => unsafe {
                        <$atomic>::from_ptr(at.cast()).store(transmute_copy(&value), Ordering::Release)
                    },)*
                    _ => {
                        fence(Ordering::Release);
                        // SAFETY: by the caller's promise.
                        unsafe { at.write_unaligned(value) }
                    }
                }
            };
        }
        atomically! { 1 AtomicU8; 2 AtomicU16; 4 AtomicU32; 8 AtomicU64; }
    }
}

#[cfg(test)]
mod tests {
    use super::weak;

    #[test]
    fn weak_hosts_read_what_they_wrote_at_every_alignment() {
        let mut ram = [0u8; 64];
        for at in 0..32 {
            let place = ram.as_mut_ptr().wrapping_add(at);
            // SAFETY: all within `ram`.
            unsafe {
                weak::store(place.cast(), 0x0123_4567_89ab_cdef_u64);
                assert_eq!(weak::load::<u64>(place.cast()), 0x0123_4567_89ab_cdef);
                assert_eq!(weak::load::<u32>(place.cast()), 0x89ab_cdef);
                weak::store(place.cast(), u128::MAX / 3);
                assert_eq!(weak::load::<u128>(place.cast()), u128::MAX / 3);
                weak::store(place.cast(), [1u8, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
                assert_eq!(weak::load::<[u8; 10]>(place.cast())[9], 10);
            }
        }
    }
}
