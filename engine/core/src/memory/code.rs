//! Which host pages hold translated code of some core of a VM, so that a store of any core to them reaches all who translated from them
//! (self- and cross-modifying code: SDM vol. 3, 9.1.3).
//!
//! The rule of the house: no core's TLB lets a store through unchecked to a page that is in here and settled. A core claims a page, makes
//! the others drop their write tags for it, and only then reads its bytes.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PAGE_SIZE;

/// Locks that the pages are spread over.
const SHARDS: usize = 64;
/// Counters of the filter in front of them.
const COUNTERS: usize = 1 << 15;

/// Multiplicative hashing: keys are addresses, and not the guest's choice alone.
#[derive(Default)]
pub struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u8(*byte);
        }
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 32;
    }
}

/// A map from addresses.
pub type AddressMap<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// One page.
#[derive(Default)]
struct Page {
    /// Cores that hold code of it.
    cores: u32,
    /// No core has write tags for it any more.
    settled: bool,
}

/// The pages of one VM.
pub struct CodePages {
    shards: [Mutex<AddressMap<u64, Page>>; SHARDS],
    /// How many pages of the set hash to each counter: zero means that the page is not in it. Whoever reads a zero while another core
    /// claims the page is a core that the claim waits for.
    filter: Box<[AtomicU32]>,
}

impl Default for CodePages {
    fn default() -> Self {
        CodePages { shards: std::array::from_fn(|_| Mutex::default()), filter: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect() }
    }
}

impl CodePages {
    /// Whether some core holds code of `page`, a host address.
    #[inline]
    pub fn contains(&self, page: u64) -> bool {
        self.counter(page).load(Ordering::SeqCst) != 0 && self.shard(page).contains_key(&page)
    }

    /// Counts one more core that holds code of `page`. False when cores may have write tags for it; the caller sees to it that they drop
    /// them, and calls [`CodePages::settle`].
    pub fn claim(&self, page: u64) -> bool {
        let mut shard = self.shard(page);
        let entry = shard.entry(page).or_default();
        if entry.cores == 0 {
            self.counter(page).fetch_add(1, Ordering::SeqCst);
        }
        entry.cores += 1;
        entry.settled
    }

    /// Every core has dropped its write tags for `page`, which the caller has claimed.
    pub fn settle(&self, page: u64) {
        if let Some(entry) = self.shard(page).get_mut(&page) {
            entry.settled = true;
        }
    }

    /// Takes back one claim.
    pub fn release(&self, page: u64) {
        let mut shard = self.shard(page);
        if let Some(entry) = shard.get_mut(&page) {
            entry.cores -= 1;
            if entry.cores == 0 {
                shard.remove(&page);
                self.counter(page).fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    fn counter(&self, page: u64) -> &AtomicU32 {
        &self.filter[(page / PAGE_SIZE).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> (usize::BITS - COUNTERS.ilog2())]
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, AddressMap<u64, Page>> {
        self.shards[(page / PAGE_SIZE) as usize % SHARDS].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_code_until_its_last_core_lets_go() {
        let pages = CodePages::default();
        assert!(!pages.claim(0x1000), "write tags may exist");
        assert!(!pages.claim(0x1000), "and still may");
        pages.settle(0x1000);
        assert!(pages.claim(0x1000), "none may be made while the page is in the set");
        pages.release(0x1000);
        pages.release(0x1000);
        assert!(pages.contains(0x1000));
        pages.release(0x1000);
        assert!(!pages.contains(0x1000));
        assert!(!pages.claim(0x1000), "stores went unchecked in between");
    }
}
