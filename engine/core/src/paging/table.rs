//! One direct-mapped table of translations, from linear page to host address.
//!
//! A tag is the linear address of a page when the access it stands for needs no further check, and has its low bits set otherwise, so one
//! compare decides. A table knows which of its slots are in use, so that emptying it costs what it holds.
//!
//! Host code keeps copies of translations (see `jit/access.rs`), each with the epoch of the table that it came from. Whatever takes
//! something away from a table begins another epoch of it, so a copy of the current epoch is what the table has.

use crate::memory::PAGE_OFFSET;

/// Entries of a table.
pub const ENTRIES: usize = 1 << 12;
const INVALID: u64 = 1;
/// Tables whose epochs differ.
const TABLES: u64 = 1 << 8;

/// One translation.
#[derive(Clone, Copy, PartialEq, Eq)]
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

    /// Whether everything that `other` lets through goes to the same place by this translation.
    fn covers(&self, other: &Entry) -> bool {
        let same = |own: u64, others: u64| others == INVALID || own == others && self.addend == other.addend;
        same(self.read, other.read) && same(self.write, other.write) && same(self.fetch, other.fetch)
    }
}

/// What a table holds, in columns: host code gets from the number of a slot to a tag or an addend by a scaled index.
#[repr(C)]
pub struct Entries {
    pub read: [u64; ENTRIES],
    pub write: [u64; ENTRIES],
    pub fetch: [u64; ENTRIES],
    pub addend: [u64; ENTRIES],
    /// Another one, which no table has or had, whenever something that was here is not here any more.
    pub epoch: u64,
}

impl Entries {
    /// Nothing, in the first epoch of table `number`.
    const fn empty(number: u64) -> Self {
        let invalid = [INVALID; ENTRIES];
        Entries { read: invalid, write: invalid, fetch: invalid, addend: [0; ENTRIES], epoch: TABLES | number }
    }

    fn get(&self, slot: usize) -> Entry {
        Entry { read: self.read[slot], write: self.write[slot], fetch: self.fetch[slot], addend: self.addend[slot] }
    }

    fn set(&mut self, slot: usize, entry: Entry) {
        (self.read[slot], self.write[slot], self.fetch[slot], self.addend[slot]) = (entry.read, entry.write, entry.fetch, entry.addend);
    }

    fn begin_epoch(&mut self) {
        self.epoch += TABLES;
    }
}

/// Slot of linear address `la` in a table.
#[inline(always)]
pub const fn slot(la: u64) -> usize {
    (la >> 12) as usize & (ENTRIES - 1)
}

/// A table that knows nothing, for code whose every access takes the long way.
pub fn never() -> *const Entries {
    static NEVER: Entries = Entries::empty(TABLES - 1);
    &raw const NEVER
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
    entries: Box<Entries>,
    used: Slots,
    /// Slots whose translation is not global.
    local: Slots,
}

impl Table {
    /// An empty table. No two of a core may have the same number.
    pub fn new(number: usize) -> Self {
        debug_assert!((number as u64) < TABLES - 1);
        Table { entries: Box::new(Entries::empty(number as u64)), used: Slots::NONE, local: Slots::NONE }
    }

    pub fn as_ptr(&self) -> *const Entries {
        &raw const *self.entries
    }

    /// The translation of the page of `la`, if the table has one.
    pub fn find(&self, la: u64) -> Option<(Entry, bool)> {
        let slot = slot(la);
        let entry = self.entries.get(slot);
        let global = self.local.0[slot / 64] >> (slot % 64) & 1 == 0;
        (entry.page() == Some(la & !PAGE_OFFSET)).then_some((entry, global))
    }

    pub fn insert(&mut self, la: u64, entry: Entry, global: bool) {
        let slot = slot(la);
        if !entry.covers(&self.entries.get(slot)) {
            self.entries.begin_epoch();
        }
        self.entries.set(slot, entry);
        self.used.set(slot, true);
        self.local.set(slot, !global);
    }

    /// Removes the page of `la`.
    pub fn remove(&mut self, la: u64) {
        if self.entries.get(slot(la)).page() == Some(la & !PAGE_OFFSET) {
            self.entries.set(slot(la), Entry::EMPTY);
            self.entries.begin_epoch();
        }
    }

    /// Removes the pages that have the bits of `mask` in common with `la`.
    pub fn remove_region(&mut self, la: u64, mask: u64) {
        let entries = &mut self.entries;
        let mut removed = false;
        self.used.for_each(|slot| {
            if entries.get(slot).page().is_some_and(|page| (page ^ la) & mask == 0) {
                entries.set(slot, Entry::EMPTY);
                removed = true;
            }
        });
        if removed {
            entries.begin_epoch();
        }
    }

    /// Removes every translation.
    pub fn clear(&mut self) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| entries.set(slot, Entry::EMPTY));
        entries.begin_epoch();
        (self.used, self.local) = (Slots::NONE, Slots::NONE);
    }

    /// Removes every translation that is not global.
    pub fn clear_local(&mut self) {
        let Table { entries, used, local } = self;
        let mut removed = false;
        local.for_each(|slot| {
            entries.set(slot, Entry::EMPTY);
            used.set(slot, false);
            removed = true;
        });
        if removed {
            entries.begin_epoch();
        }
        *local = Slots::NONE;
    }

    /// Takes the right to write without a check from every translation of the host page at `host`.
    pub fn protect_host_page(&mut self, host: u64) {
        let entries = &mut self.entries;
        let mut removed = false;
        self.used.for_each(|slot| {
            let entry = entries.get(slot);
            if entry.write != INVALID && entry.addend.wrapping_add(entry.write) == host {
                entries.set(slot, Entry { write: INVALID, ..entry });
                removed = true;
            }
        });
        if removed {
            entries.begin_epoch();
        }
    }
}
