//! How other threads reach a core: interrupts that make it leave the guest, and shoot-downs of what it cached.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::decode::cache::line_mask;
use crate::memory::code::AddressMap;
use crate::memory::PAGE_OFFSET;

/// Bits of `Signal::attention`.
pub mod attention {
    /// A host interrupt: leave the guest.
    pub const KICK: u32 = 1;
    /// The nested page table changed: drop every cached translation.
    pub const NESTED: u32 = 2;
    /// Somebody else wrote to guest RAM: drop the code that was made from it.
    pub const CODE: u32 = 4;
    /// Somebody else translates code: let no store to its page go unchecked.
    pub const PROTECT: u32 = 8;
    /// Another core holds the bus lock: stand still.
    pub const STOP: u32 = 16;
    /// An interrupt was posted to the guest.
    pub const POSTED: u32 = 32;
    /// What `Cpu::shoot_down` acts on.
    pub const SHOOT_DOWN: u32 = NESTED | CODE | PROTECT | STOP;
}

/// Pages that wait to be protected one by one; beyond that a flush of the TLB does for all.
const PROTECT_MAX: usize = 64;

/// Pages for which a core shall drop its write tags.
#[derive(Default)]
pub struct Protect {
    pub pages: Vec<u64>,
    /// More came than `pages` takes.
    pub all: bool,
    /// Requests so far.
    requests: u64,
}

/// In the place of a written page: more were written than are told apart, because the core has not looked for long.
pub const EVERY_PAGE: u64 = u64::MAX;
const WRITTEN_MAX: usize = 256;

/// The part of a core that any thread may touch.
#[derive(Default)]
pub struct Signal {
    attention: AtomicU32,
    running: AtomicBool,
    nested_seen: AtomicU64,
    /// Host pages that others wrote, each with its written lines.
    written: Mutex<AddressMap<u64, u64>>,
    protect: Mutex<Protect>,
    /// Requests of `protect` that are done.
    protected: AtomicU64,
    standing: AtomicBool,
}

impl Signal {
    /// Makes the core leave the guest, or refuse its next entry at once.
    pub fn kick(&self) {
        self.attention.fetch_or(attention::KICK, Ordering::SeqCst);
    }

    /// The notification of a posted interrupt: a running guest takes it without an exit.
    pub fn notify(&self) {
        self.attention.fetch_or(attention::POSTED, Ordering::SeqCst);
    }

    /// Pending attention bits; cheap enough for every block.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.attention.load(Ordering::Relaxed)
    }

    /// Address of the pending bits, for host code; it stays as long as the core.
    pub fn pending_address(&self) -> *const u32 {
        self.attention.as_ptr()
    }

    /// Takes the pending bits of `mask`, and leaves the others.
    pub fn take(&self, mask: u32) -> u32 {
        self.attention.fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// Returns when the core no longer uses translations older than `generation` of the nested page table.
    pub fn flush_nested(&self, generation: u64) {
        self.attention.fetch_or(attention::NESTED, Ordering::SeqCst);
        while self.running.load(Ordering::SeqCst) && self.nested_seen.load(Ordering::SeqCst) < generation {
            std::thread::yield_now();
        }
    }

    /// Tells the core that `[host, host + bytes)`, which lies in one page, was written behind its back.
    pub fn wrote(&self, host: u64, bytes: u64) {
        let page = host & !PAGE_OFFSET;
        let mut written = lock(&self.written);
        let told_apart = written.len() < WRITTEN_MAX || written.contains_key(&page);
        *written.entry(if told_apart { page } else { EVERY_PAGE }).or_default() |= line_mask(host & PAGE_OFFSET, bytes);
        drop(written);
        self.attention.fetch_or(attention::CODE, Ordering::SeqCst);
    }

    /// The core's own: the pages that were written since the last call, and which of their lines.
    pub fn take_written(&self) -> AddressMap<u64, u64> {
        std::mem::take(&mut *lock(&self.written))
    }

    /// Asks the core to drop its write tags for the host page `page`; returns the number of the request.
    pub fn protect(&self, page: u64) -> u64 {
        let mut protect = lock(&self.protect);
        if protect.pages.len() < PROTECT_MAX {
            protect.pages.push(page);
        } else {
            protect.all = true;
        }
        protect.requests += 1;
        self.attention.fetch_or(attention::PROTECT, Ordering::SeqCst);
        protect.requests
    }

    /// Whether the core makes no unchecked stores to the page of `request` any more. A core that does not run will see to it first thing.
    pub fn has_protected(&self, request: u64) -> bool {
        self.protected.load(Ordering::SeqCst) >= request || !self.running.load(Ordering::SeqCst)
    }

    /// The core's own: hands the pages to protect to `act`.
    pub fn protect_with(&self, act: impl FnOnce(&Protect)) {
        let taken = {
            let mut protect = lock(&self.protect);
            let requests = protect.requests;
            std::mem::replace(&mut *protect, Protect { requests, ..Protect::default() })
        };
        act(&taken);
        self.protected.store(taken.requests, Ordering::SeqCst);
    }

    /// Asks the core to stand still until [`Signal::go`]. The caller holds the bus lock.
    pub fn stop(&self) {
        self.attention.fetch_or(attention::STOP, Ordering::SeqCst);
    }

    /// Whether a core that was asked to stop does nothing. One that does not run stops before it does anything.
    pub fn stands_still(&self) -> bool {
        self.standing.load(Ordering::SeqCst) || !self.running.load(Ordering::SeqCst)
    }

    /// Ends [`Signal::stop`].
    pub fn go(&self) {
        self.attention.fetch_and(!attention::STOP, Ordering::SeqCst);
    }

    /// The core's own: waits as long as it is asked to stand still.
    pub fn stand_still(&self) {
        let stopped = || self.attention.load(Ordering::SeqCst) & attention::STOP != 0;
        while stopped() {
            self.standing.store(true, Ordering::SeqCst);
            while stopped() {
                std::thread::yield_now();
            }
            self.standing.store(false, Ordering::SeqCst);
        }
    }

    /// The core's own: says whether it may hold translations, and of which generation.
    pub fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::SeqCst);
    }

    /// The core's own: nothing older than `generation` is cached any more.
    pub fn set_nested_seen(&self, generation: u64) {
        self.nested_seen.store(generation, Ordering::SeqCst);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_that_does_not_look_costs_no_memory() {
        let signal = Signal::default();
        (0..10_000).for_each(|page| signal.wrote(page << 12, 64));
        let written = signal.take_written();
        assert_eq!(written.len(), WRITTEN_MAX + 1);
        assert!(written.contains_key(&EVERY_PAGE));
        signal.wrote(0x1040, 8);
        assert_eq!(signal.take_written().into_iter().collect::<Vec<_>>(), [(0x1000, 2)]);
    }

    #[test]
    fn many_pages_to_protect_become_all() {
        let signal = Signal::default();
        signal.set_running(true);
        let last = (1..=100).map(|n| signal.protect(n * 0x1000)).last();
        assert!(!signal.has_protected(last.unwrap()));
        signal.protect_with(|protect| assert!(protect.all && protect.pages.len() == PROTECT_MAX));
        assert!(signal.has_protected(last.unwrap()));
    }
}
