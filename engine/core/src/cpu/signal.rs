//! How other threads reach a core: interrupts that make it leave the guest, and shoot-downs of what it cached.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::Mutex;

/// Bits of `Signal::attention`.
pub mod attention {
    /// A host interrupt: leave the guest.
    pub const KICK: u32 = 1;
    /// The nested page table changed: drop every cached translation.
    pub const NESTED: u32 = 2;
    /// Somebody else wrote to guest RAM: drop the code that was made from it.
    pub const CODE: u32 = 4;
}

/// In the place of a range that was written: more was than the list holds, because the core has not looked for long.
pub const EVERYWHERE: (u64, u64) = (0, u64::MAX);
const WRITTEN_MAX: usize = 256;

/// The part of a core that any thread may touch.
#[derive(Default)]
pub struct Signal {
    attention: AtomicU32,
    running: AtomicBool,
    nested_seen: AtomicU64,
    /// Host address ranges that devices or the hypervisor wrote.
    written: Mutex<Vec<(u64, u64)>>,
}

impl Signal {
    /// Makes the core leave the guest, or refuse its next entry at once.
    pub fn kick(&self) {
        self.attention.fetch_or(attention::KICK, Ordering::SeqCst);
    }

    /// Pending attention bits; cheap enough for every block.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.attention.load(Ordering::Relaxed)
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

    /// Tells the core that `[host, host + bytes)` was written behind its back.
    pub fn wrote(&self, host: u64, bytes: u64) {
        let mut written = self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if written.len() < WRITTEN_MAX {
            written.push((host, bytes));
        } else {
            *written.last_mut().expect("the list is full") = EVERYWHERE;
        }
        drop(written);
        self.attention.fetch_or(attention::CODE, Ordering::SeqCst);
    }

    /// The core's own: the ranges that were written since the last call.
    pub fn take_written(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_that_does_not_look_costs_no_memory() {
        let signal = Signal::default();
        (0..10_000).for_each(|n| signal.wrote(n * 64, 64));
        let written = signal.take_written();
        assert_eq!((written.len(), written.last()), (WRITTEN_MAX, Some(&EVERYWHERE)));
        signal.wrote(64, 8);
        assert_eq!(signal.take_written(), [(64, 8)]);
    }
}
