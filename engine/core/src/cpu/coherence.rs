//! What the cores of a VM do for each other: drop translations and code that are no longer true, and stand still while one of them makes
//! an access that no host instruction makes atomic (SDM vol. 3, 9.1.2 bus locking, 9.1.3 self- and cross-modifying code).
//!
//! A core acts on requests between instructions (`shoot_down`). Where it waits for others in the middle of one, it has changed nothing
//! yet, and serves whoever waits for it (`serve`), so cores never wait for each other in a circle.

use std::sync::{Arc, TryLockError};

use super::signal::{attention, Signal, EVERY_PAGE};
use super::Cpu;
use crate::decode::cache::line_mask;
use crate::memory::PAGE_OFFSET;

impl Cpu {
    /// Drops what others ask to be dropped, and stands still while they ask for that. No instruction is under way.
    pub fn shoot_down(&mut self) {
        self.serve();
        let asked = self.signal.take(attention::NESTED | attention::CODE);
        if asked & attention::NESTED != 0 {
            self.flush_nested();
        }
        if asked & attention::CODE != 0 {
            self.drop_written_code();
        }
    }

    /// Forgets the code that was made from what others have written.
    fn drop_written_code(&mut self) {
        let written = self.signal.take_written();
        if written.contains_key(&EVERY_PAGE) {
            return self.code.clear(&self.npt.code);
        }
        for (page, lines) in written {
            self.code.written(page, lines, &self.npt.code);
        }
    }

    /// Does what other cores wait for; the translation that an instruction has just made stays good.
    pub(crate) fn serve(&mut self) {
        if self.signal.take(attention::PROTECT) != 0 {
            self.protect_code();
        }
        self.signal.stand_still();
    }

    /// Drops the write tags for pages that others translate code from.
    fn protect_code(&mut self) {
        let signal = self.signal.clone();
        signal.protect_with(|protect| {
            if protect.all {
                self.tlb.flush();
                self.refresh_table();
            } else {
                protect.pages.iter().for_each(|page| self.tlb.protect_host_page(*page));
            }
        });
    }

    /// Drops what depends on the nested page table, and tells whoever changed it.
    pub fn flush_nested(&mut self) {
        let generation = self.npt.generation();
        self.frames.clear();
        self.tlb.flush();
        self.refresh_table();
        self.nested_generation = generation;
        self.signal.set_nested_seen(generation);
    }

    /// Makes every store to the page of `host`, by any core, one that is noticed, before code is read from it.
    pub fn claim_code(&mut self, host: u64) {
        let page = host & !PAGE_OFFSET;
        if self.code.claim(page, &self.npt.code) {
            return;
        }
        self.tlb.protect_host_page(page);
        let others = self.npt.cores_except(Some(&self.signal));
        let requests: Vec<u64> = others.iter().map(|core| core.protect(page)).collect();
        for (core, request) in others.iter().zip(requests) {
            while !core.has_protected(request) {
                self.serve();
                std::thread::yield_now();
            }
        }
        self.npt.code.settle(page);
    }

    /// A host page that may hold translated code, of this core or of others, was written at `host`.
    pub fn note_code_write(&mut self, host: *mut u8, bytes: usize) {
        let (at, page) = (host as u64, host as u64 & !PAGE_OFFSET);
        if self.npt.code.contains(page) {
            self.code.store(page, line_mask(at & PAGE_OFFSET, bytes as u64), &self.npt.code);
            self.npt.wrote_host(at, bytes as u64, Some(&self.signal));
        }
    }

    /// Calls `access` while no other core of the VM runs: the bus lock.
    #[cold]
    pub fn with_bus_lock<T>(&mut self, access: impl FnOnce(&mut Cpu) -> T) -> T {
        let npt = self.npt.clone();
        let _bus = loop {
            match npt.bus.try_lock() {
                Ok(guard) => break guard,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => {
                    self.serve();
                    std::thread::yield_now();
                }
            }
        };
        let others = Stopped(npt.cores_except(Some(&self.signal)));
        others.0.iter().for_each(|core| core.stop());
        while !others.0.iter().all(|core| core.stands_still()) {
            std::thread::yield_now();
        }
        access(self)
    }
}

/// Cores that stand still until this is dropped.
struct Stopped(Vec<Arc<Signal>>);

impl Drop for Stopped {
    fn drop(&mut self) {
        self.0.iter().for_each(|core| core.go());
    }
}
