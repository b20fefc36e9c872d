//! One table of translations, from linear page to host address, of two ways: a page has one place in each.
//!
//! A tag is the linear address of a page when the access it stands for needs no further check, and has its low bits set otherwise, so one
//! compare decides. The last translation of a place is in the first way, where everybody looks. That which it took the place of goes to
//! the second: two pages that are accessed by turns keep theirs. A table knows which of its slots are in use, so that emptying it costs
//! what it holds.
//!
//! Host code keeps copies of translations (see `jit/access.rs`), each with the epoch of the table that it came from, and marks what it
//! copies. Whatever takes a marked translation away from a table begins another epoch of it, so a copy of the current epoch is what the
//! table has.

use crate::memory::PAGE_OFFSET;

/// Slots of one way.
pub const SLOTS: usize = 1 << 12;
/// Slots of both.
const ENTRIES: usize = 2 * SLOTS;
const INVALID: u64 = 1;
/// Tables whose epochs differ.
const TABLES: u64 = 1 << 8;

/// One translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// What was in the slot is not in the table any more, or lets less through.
    fn lose(&mut self, slot: usize) {
        if self.copied[slot] == self.epoch {
            self.epoch += TABLES;
        }
    }
}

/// Slot of linear address `la` in the first way of a table.
#[inline(always)]
pub const fn slot(la: u64) -> usize {
    (la >> 12) as usize & (SLOTS - 1)
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
    fn has(&self, slot: usize) -> bool {
        self.0[slot / 64] >> (slot % 64) & 1 != 0
    }

    #[inline(always)]
    fn set(&mut self, slot: usize, member: bool) {
        let (word, bit) = (&mut self.0[slot / 64], 1 << (slot % 64));
        *word = if member { *word | bit } else { *word & !bit };
    }

    fn swap(&mut self, one: usize, other: usize) {
        let members = (self.has(one), self.has(other));
        self.set(one, members.1);
        self.set(other, members.0);
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

    /// Where the page of `la` is.
    #[inline]
    fn place(&self, la: u64) -> Option<usize> {
        let first = slot(la);
        [first, first + SLOTS].into_iter().find(|slot| self.entries.get(*slot).page() == Some(la & !PAGE_OFFSET))
    }

    /// The translation of the page of `la`, if the table has one, and whether it is global.
    pub fn find(&self, la: u64) -> Option<(Entry, bool)> {
        self.place(la).map(|slot| (self.entries.get(slot), !self.local.has(slot)))
    }

    /// Puts what is in the second way for the page of `la` in the first. Tells whether there is something.
    pub fn promote(&mut self, la: u64) -> bool {
        let second = self.place(la).filter(|slot| *slot >= SLOTS);
        second.into_iter().for_each(|slot| self.swap_ways(slot - SLOTS));
        second.is_some()
    }

    /// Exchanges what is in `slot` of the first way and in its place in the second.
    fn swap_ways(&mut self, slot: usize) {
        let (entries, second) = (&mut self.entries, slot + SLOTS);
        let entry = entries.get(slot);
        entries.set(slot, entries.get(second));
        entries.set(second, entry);
        entries.copied.swap(slot, second);
        self.used.swap(slot, second);
        self.local.swap(slot, second);
    }

    pub fn insert(&mut self, la: u64, entry: Entry, global: bool) {
        let (slot, place) = (slot(la), self.place(la));
        if place != Some(slot) && (place.is_some() || self.entries.get(slot).page().is_some()) {
            self.swap_ways(slot);
        }
        if !entry.covers(&self.entries.get(slot)) {
            self.entries.lose(slot);
        }
        self.entries.set(slot, entry);
        self.used.set(slot, true);
        self.local.set(slot, !global);
    }

    /// Removes the page of `la`.
    pub fn remove(&mut self, la: u64) {
        if let Some(slot) = self.place(la) {
            self.entries.set(slot, Entry::EMPTY);
            self.entries.lose(slot);
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
    /// Other pages of the same slot.
    const ALIAS: u64 = LA + ((SLOTS as u64) << 12);
    const THIRD: u64 = ALIAS + ((SLOTS as u64) << 12);

    fn entry(la: u64, host: u64, write: bool) -> Entry {
        Entry::new(la, host, true, write, false)
    }

    #[test]
    fn an_epoch_ends_with_what_was_copied_in_it() {
        type Change = fn(&mut Table);
        let changes: [(&str, bool, Change); 12] = [
            ("removed", true, |table| table.remove(LA)),
            ("another page is removed", false, |table| table.remove(ALIAS)),
            ("removed with its region", true, |table| table.remove_region(LA + 0x5000, !0 << 22)),
            ("all removed", true, Table::clear),
            ("what is not global is removed", true, Table::clear_local),
            ("write-protected", true, |table| table.protect_host_page(0x7000)),
            ("moved to the second way", false, |table| table.insert(ALIAS, entry(ALIAS, 0x9000, true), false)),
            ("moved there and back", false, |table| {
                table.insert(ALIAS, entry(ALIAS, 0x9000, true), false);
                assert!(table.promote(LA) && !table.promote(LA));
            }),
            ("evicted", true, |table| [ALIAS, THIRD].into_iter().for_each(|la| table.insert(la, entry(la, 0x9000, true), false))),
            ("removed from the second way", true, |table| {
                table.insert(ALIAS, entry(ALIAS, 0x9000, true), false);
                table.remove(LA);
            }),
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
    fn two_pages_of_a_slot_stay() {
        let mut table = Table::new(3);
        let has = |table: &Table| [LA, ALIAS, THIRD].map(|la| table.find(la).is_some());
        [LA, ALIAS].into_iter().for_each(|la| table.insert(la, entry(la, 0x7000, true), la == LA));
        assert_eq!(has(&table), [true, true, false]);
        assert_eq!([LA, ALIAS].map(|la| table.find(la).map(|(_, global)| global)), [Some(true), Some(false)]);
        assert_eq!(table.entries.write[slot(LA)], ALIAS, "the last one is in the first way");
        table.insert(LA, entry(LA, 0x7000, false), true);
        assert_eq!((has(&table), table.find(LA)), ([true, true, false], Some((entry(LA, 0x7000, false), true))));
        table.insert(THIRD, entry(THIRD, 0x7000, true), false);
        assert_eq!(has(&table), [true, false, true]);
        table.clear_local();
        assert_eq!(has(&table), [true, false, false]);
        table.insert(ALIAS, entry(ALIAS, 0x7000, true), false);
        table.clear();
        assert_eq!(has(&table), [false; 3]);
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
