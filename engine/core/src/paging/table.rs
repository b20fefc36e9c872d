//! One direct-mapped table of translations, from linear page to host address.
//!
//! A tag is the linear address of a page when the access it stands for needs no further check, and has its low bits set otherwise, so one
//! compare decides. A table knows which of its slots are in use, so that emptying it costs what it holds.
//!
//! Host code keeps copies of translations (see `jit/access.rs`), each with the epoch of the table that it came from, and marks what it
//! copies. Whatever takes a marked translation away from a table begins another epoch of it, so a copy of the current epoch is what the
//! table has.

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
    /// The last epoch in which host code copied what was in the slot then.
    pub copied: [u64; ENTRIES],
    /// Another one, which no table has or had, whenever something that host code may have a copy of is not here any more.
    pub epoch: u64,
}

impl Entries {
    /// Nothing, in the first epoch of table `number`.
    const fn empty(number: u64) -> Self {
        let invalid = [INVALID; ENTRIES];
        Entries { read: invalid, write: invalid, fetch: invalid, addend: [0; ENTRIES], copied: [0; ENTRIES], epoch: TABLES | number }
    }

    fn get(&self, slot: usize) -> Entry {
        Entry { read: self.read[slot], write: self.write[slot], fetch: self.fetch[slot], addend: self.addend[slot] }
    }

    fn set(&mut self, slot: usize, entry: Entry) {
        (self.read[slot], self.write[slot], self.fetch[slot], self.addend[slot]) = (entry.read, entry.write, entry.fetch, entry.addend);
    }

    /// What was in the slot is not there any more, or lets less through.
    fn lose(&mut self, slot: usize) {
        if self.copied[slot] == self.epoch {
            self.epoch += TABLES;
        }
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
            self.entries.lose(slot);
        }
        self.entries.set(slot, entry);
        self.used.set(slot, true);
        self.local.set(slot, !global);
    }

    /// Removes the page of `la`.
    pub fn remove(&mut self, la: u64) {
        if self.entries.get(slot(la)).page() == Some(la & !PAGE_OFFSET) {
            self.entries.set(slot(la), Entry::EMPTY);
            self.entries.lose(slot(la));
        }
    }

    /// Removes the pages that have the bits of `mask` in common with `la`.
    pub fn remove_region(&mut self, la: u64, mask: u64) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| {
            if entries.get(slot).page().is_some_and(|page| (page ^ la) & mask == 0) {
                entries.set(slot, Entry::EMPTY);
                entries.lose(slot);
            }
        });
    }

    /// Removes every translation.
    pub fn clear(&mut self) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| {
            entries.set(slot, Entry::EMPTY);
            entries.lose(slot);
        });
        (self.used, self.local) = (Slots::NONE, Slots::NONE);
    }

    /// Removes every translation that is not global.
    pub fn clear_local(&mut self) {
        let Table { entries, used, local } = self;
        local.for_each(|slot| {
            entries.set(slot, Entry::EMPTY);
            entries.lose(slot);
            used.set(slot, false);
        });
        *local = Slots::NONE;
    }

    /// Takes the right to write without a check from every translation of the host page at `host`.
    pub fn protect_host_page(&mut self, host: u64) {
        let entries = &mut self.entries;
        self.used.for_each(|slot| {
            let entry = entries.get(slot);
            if entry.write != INVALID && entry.addend.wrapping_add(entry.write) == host {
                entries.set(slot, Entry { write: INVALID, ..entry });
                entries.lose(slot);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LA: u64 = 0x40_0000;
    /// Another page in the same slot.
    const ALIAS: u64 = LA + ((ENTRIES as u64) << 12);

    fn entry(la: u64, host: u64, write: bool) -> Entry {
        Entry::new(la, host, true, write, false)
    }

    #[test]
    fn an_epoch_ends_with_what_was_copied_in_it() {
        type Change = fn(&mut Table);
        let changes: [(&str, bool, Change); 9] = [
            ("removed", true, |table| table.remove(LA)),
            ("another page is removed", false, |table| table.remove(ALIAS)),
            ("removed with its region", true, |table| table.remove_region(LA + 0x5000, !0 << 22)),
            ("all removed", true, Table::clear),
            ("what is not global is removed", true, Table::clear_local),
            ("write-protected", true, |table| table.protect_host_page(0x7000)),
            ("evicted", true, |table| table.insert(ALIAS, entry(ALIAS, 0x9000, true), false)),
            ("filled again", false, |table| table.insert(LA, entry(LA, 0x7000, true), false)),
            ("filled again, elsewhere", true, |table| table.insert(LA, entry(LA, 0x9000, true), false)),
        ];
        for (name, ends, change) in changes {
            for copied in [true, false] {
                let mut table = Table::new(3);
                table.insert(LA, entry(LA, 0x7000, true), false);
                let epoch = table.entries.epoch;
                table.entries.copied[slot(LA)] = if copied { epoch } else { 0 };
                change(&mut table);
                assert_eq!(table.entries.epoch != epoch, ends && copied, "{name}");
            }
        }
    }

    #[test]
    fn tables_have_no_epoch_in_common() {
        let mut epochs = std::collections::HashSet::new();
        for number in 0..3 {
            let mut table = Table::new(number);
            for _ in 0..3 {
                assert!(epochs.insert(table.entries.epoch));
                table.insert(LA, entry(LA, 0x7000, true), true);
                table.entries.copied[slot(LA)] = table.entries.epoch;
                table.clear();
            }
        }
        // SAFETY: a static table.
        assert!(epochs.insert(unsafe { (*never()).epoch }) && epochs.insert(0));
    }
}
