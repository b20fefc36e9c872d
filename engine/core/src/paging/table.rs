//! One direct-mapped table of translations, from linear page to host address.
//!
//! A tag is the linear address of a page when the access it stands for needs no further check, and has its low bits set otherwise, so one
//! compare decides. A table knows which of its slots are in use, so that emptying it costs what it holds.

use crate::memory::PAGE_OFFSET;

/// Entries of a table.
pub const ENTRIES: usize = 1 << 12;
const INVALID: u64 = 1;

/// One translation.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    pub fetch: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

impl Entry {
    const EMPTY: Entry = Entry { read: INVALID, write: INVALID, fetch: INVALID, addend: 0 };

    /// The translation of the page of `la`, with a tag for each access that is allowed.
    pub fn new(la: u64, host: u64, read: bool, write: bool, fetch: bool) -> Self {
        let page = la & !PAGE_OFFSET;
        let tag = |allowed: bool| if allowed { page } else { INVALID };
        Entry { read: tag(read), write: tag(write), fetch: tag(fetch), addend: host.wrapping_sub(la) }
    }

    /// The linear page, if the entry is in use.
    fn page(&self) -> Option<u64> {
        [self.read, self.write, self.fetch].into_iter().find(|tag| *tag != INVALID)
    }

    /// The same translation without the right to fetch code.
    pub fn for_data(self) -> Self {
        Entry { fetch: INVALID, ..self }
    }
}

/// Slot of linear address `la` in a table.
#[inline(always)]
pub const fn slot(la: u64) -> usize {
    (la >> 12) as usize & (ENTRIES - 1)
}

/// A table that knows nothing, for code whose every access takes the long way.
pub fn never() -> *const Entry {
    static NEVER: [Entry; ENTRIES] = [Entry::EMPTY; ENTRIES];
    NEVER.as_ptr()
}

/// A set of slots.
#[derive(Clone)]
struct Slots([u64; ENTRIES / 64]);

impl Slots {
    const NONE: Slots = Slots([0; ENTRIES / 64]);

    #[inline(always)]
    fn set(&mut self, slot: usize, member: bool) {
        let (word, bit) = (&mut self.0[slot / 64], 1 << (slot % 64));
        *word = if member { *word | bit } else { *word & !bit };
    }

    fn for_each(&self, mut act: impl FnMut(usize)) {
        for (n, word) in self.0.iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                act(n * 64 + left.trailing_zeros() as usize);
                left &= left - 1;
            }
        }
    }
}

/// One direct-mapped table. Its entries never move.
pub struct Table {
    entries: Box<[Entry; ENTRIES]>,
    used: Slots,
    /// Slots whose translation is not global.
    local: Slots,
}

impl Default for Table {
    fn default() -> Self {
        Table { entries: Box::new([Entry::EMPTY; ENTRIES]), used: Slots::NONE, local: Slots::NONE }
    }
}

impl Table {
    pub fn as_ptr(&self) -> *const Entry {
        self.entries.as_ptr()
    }

    /// The translation of the page of `la`, if the table has one.
    pub fn find(&self, la: u64) -> Option<(Entry, bool)> {
        let slot = slot(la);
        let entry = self.entries[slot];
        let global = self.local.0[slot / 64] >> (slot % 64) & 1 == 0;
        (entry.page() == Some(la & !PAGE_OFFSET)).then_some((entry, global))
    }

    pub fn insert(&mut self, la: u64, entry: Entry, global: bool) {
        let slot = slot(la);
        self.entries[slot] = entry;
        self.used.set(slot, true);
        self.local.set(slot, !global);
    }

    /// Removes the page of `la`.
    pub fn remove(&mut self, la: u64) {
        let entry = &mut self.entries[slot(la)];
        if entry.page() == Some(la & !PAGE_OFFSET) {
            *entry = Entry::EMPTY;
        }
    }

    /// Removes the pages that have the bits of `mask` in common with `la`.
    pub fn remove_region(&mut self, la: u64, mask: u64) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| {
            if entries[slot].page().is_some_and(|page| (page ^ la) & mask == 0) {
                entries[slot] = Entry::EMPTY;
            }
        });
    }

    /// Removes every translation.
    pub fn clear(&mut self) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| entries[slot] = Entry::EMPTY);
        (self.used, self.local) = (Slots::NONE, Slots::NONE);
    }

    /// Removes every translation that is not global.
    pub fn clear_local(&mut self) {
        let Table { entries, used, local } = self;
        local.for_each(|slot| {
            entries[slot] = Entry::EMPTY;
            used.set(slot, false);
        });
        *local = Slots::NONE;
    }

    /// Takes the right to write without a check from every translation of the host page at `host`.
    pub fn protect_host_page(&mut self, host: u64) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| {
            let entry = &mut entries[slot];
            if entry.write != INVALID && entry.addend.wrapping_add(entry.write) == host {
                entry.write = INVALID;
            }
        });
    }
}
