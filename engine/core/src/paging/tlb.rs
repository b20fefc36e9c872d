//! The translation look-aside buffer: direct-mapped tables from linear page to host address.
//!
//! A tag is the linear address of a page when the access it stands for needs no further check, and has its low bits set otherwise, so one
//! compare decides. Supervisor translations live in one table; those of user and AC-set accesses in a bank per PCID, so that a switch of
//! address space is a change of bank.

use super::Privilege;
use crate::memory::PAGE_OFFSET;

/// Entries of one table.
pub const ENTRIES: usize = 1024;
/// PCIDs whose user translations are kept at the same time.
const BANKS: usize = 8;
/// Non-global supervisor entries remembered one by one; more of them flush the whole table.
const LOCAL_MAX: usize = 128;
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

    /// Host page of the entry, if it is in use.
    fn host_page(&self) -> Option<u64> {
        let tag = [self.read, self.write, self.fetch].into_iter().find(|tag| *tag != INVALID)?;
        Some(self.addend.wrapping_add(tag))
    }
}

/// One direct-mapped table.
pub type Table = Box<[Entry; ENTRIES]>;

fn empty_table() -> Table {
    Box::new([Entry::EMPTY; ENTRIES])
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

/// A set of addresses that may answer "in" for one that is not, in constant space.
struct Filter([u64; 16]);

impl Filter {
    const EMPTY: Filter = Filter([0; 16]);

    const fn bit(key: u64) -> (usize, u64) {
        let hash = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
        (hash as usize >> 6, 1 << (hash & 63))
    }
    fn insert(&mut self, key: u64) {
        let (word, bit) = Self::bit(key);
        self.0[word] |= bit;
    }
    fn may_contain(&self, key: u64) -> bool {
        let (word, bit) = Self::bit(key);
        self.0[word] & bit != 0
    }
}

/// Keys of the filter of large pages: by 4 MB for the smaller sizes, by 1 GB for the largest.
const fn large_key(la: u64) -> u64 {
    la >> 22
}
const fn huge_key(la: u64) -> u64 {
    la >> 30 | 1 << 63
}

struct Bank {
    pcid: u16,
    /// Larger is more recent.
    used: u64,
    user: Table,
    supervisor_ac: Table,
    /// Changes when the bank's translations change, so that whoever cached one can tell.
    generation: u32,
    dirty: bool,
}

impl Bank {
    fn clear(&mut self, generation: u32) {
        self.generation = generation;
        if self.dirty {
            self.user.fill(Entry::EMPTY);
            self.supervisor_ac.fill(Entry::EMPTY);
            self.dirty = false;
        }
    }
}

/// A translation that a walk found, ready to be cached.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub la: u64,
    /// Host address of the byte at `la`.
    pub host: u64,
    pub read: bool,
    pub write: bool,
    pub fetch: bool,
    pub global: bool,
    /// Bits of an address within the guest's page.
    pub page_shift: u32,
}

/// Every translation that a core has cached.
pub struct Tlb {
    supervisor: Table,
    /// Slots of `supervisor` that a change of address space must drop.
    local: Vec<u16>,
    banks: Vec<Bank>,
    current: usize,
    clock: u64,
    next_generation: u32,
    /// Regions with translations that came from large pages since the last flush.
    large: Filter,
    /// Pages that code may have been fetched from since the last flush.
    fetched: Filter,
    pub fills: u64,
    pub flushes: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        let bank = |n: u16| Bank {
            pcid: n,
            used: u64::from(n == 0),
            user: empty_table(),
            supervisor_ac: empty_table(),
            generation: n as u32,
            dirty: false,
        };
        Tlb {
            supervisor: empty_table(),
            local: Vec::with_capacity(LOCAL_MAX),
            banks: (0..BANKS as u16).map(bank).collect(),
            current: 0,
            clock: 1,
            next_generation: BANKS as u32,
            large: Filter::EMPTY,
            fetched: Filter::EMPTY,
            fills: 0,
            flushes: 0,
        }
    }
}

impl Tlb {
    /// The table for accesses of `privilege` in the current address space. The pointer stays valid as long as the TLB: tables are never
    /// reallocated.
    pub fn table(&self, privilege: Privilege) -> *const Entry {
        match privilege {
            Privilege::Supervisor => self.supervisor.as_ptr(),
            Privilege::SupervisorAc => self.banks[self.current].supervisor_ac.as_ptr(),
            Privilege::User => self.banks[self.current].user.as_ptr(),
        }
    }

    /// Changes whenever a cached translation of the current address space may have become wrong.
    #[inline(always)]
    pub fn generation(&self) -> u32 {
        self.banks[self.current].generation
    }

    /// Caches a translation.
    pub fn fill(&mut self, privilege: Privilege, fill: Fill) {
        self.fills += 1;
        let page = fill.la & !PAGE_OFFSET;
        if fill.page_shift > 12 {
            self.large.insert(if fill.page_shift > 22 { huge_key(page) } else { large_key(page) });
        }
        if fill.fetch {
            self.fetched.insert(page);
        }
        let tag = |allowed: bool| if allowed { page } else { INVALID };
        let entry = Entry { read: tag(fill.read), write: tag(fill.write), fetch: tag(fill.fetch), addend: fill.host.wrapping_sub(fill.la) };
        let slot = slot(page);
        match privilege {
            Privilege::Supervisor => {
                if !fill.global {
                    if self.local.len() == LOCAL_MAX {
                        self.supervisor.fill(Entry::EMPTY);
                        self.local.clear();
                    }
                    self.local.push(slot as u16);
                }
                self.supervisor[slot] = entry;
            }
            Privilege::SupervisorAc => self.banks[self.current].supervisor_ac[slot] = entry,
            Privilege::User => self.banks[self.current].user[slot] = entry,
        }
        if privilege != Privilege::Supervisor {
            self.banks[self.current].dirty = true;
        }
    }

    /// A new address space (MOV to CR3): `keep` leaves the translations of `pcid` in place.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.drop_local();
        self.clock += 1;
        let found = self.banks.iter().position(|bank| bank.pcid == pcid && bank.used > 0);
        let fresh = found.is_none() || !keep;
        let index = found.unwrap_or_else(|| {
            let oldest = self.banks.iter().enumerate().min_by_key(|(_, bank)| bank.used);
            oldest.map_or(0, |(index, _)| index)
        });
        if fresh {
            let generation = self.fresh_generation();
            self.banks[index].clear(generation);
        }
        self.banks[index].pcid = pcid;
        self.banks[index].used = self.clock;
        self.current = index;
    }

    /// Drops everything, global translations included.
    pub fn flush(&mut self) {
        self.flushes += 1;
        self.supervisor.fill(Entry::EMPTY);
        self.local.clear();
        (self.large, self.fetched) = (Filter::EMPTY, Filter::EMPTY);
        for index in 0..self.banks.len() {
            let generation = self.fresh_generation();
            self.banks[index].clear(generation);
        }
    }

    /// Drops the translations of one PCID that are not global; those of the current one are among them when `pcid` is current.
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.drop_local();
        for index in 0..self.banks.len() {
            if self.banks[index].pcid == pcid {
                let generation = self.fresh_generation();
                self.banks[index].clear(generation);
            }
        }
    }

    /// Drops every translation that is not global.
    pub fn flush_local(&mut self) {
        self.drop_local();
        for index in 0..self.banks.len() {
            let generation = self.fresh_generation();
            self.banks[index].clear(generation);
        }
    }

    /// Drops the translations of the page of `la` in every table (INVLPG). Large pages are cached in 4 KB pieces, of which any may
    /// belong to the one that software names, so where there was one everything goes.
    pub fn invalidate(&mut self, la: u64) {
        if self.large.may_contain(large_key(la)) || self.large.may_contain(huge_key(la)) {
            return self.flush();
        }
        let slot = slot(la);
        let code = self.fetched.may_contain(la & !PAGE_OFFSET);
        self.supervisor[slot] = Entry::EMPTY;
        for index in 0..self.banks.len() {
            self.banks[index].user[slot] = Entry::EMPTY;
            self.banks[index].supervisor_ac[slot] = Entry::EMPTY;
            if code {
                self.banks[index].generation = self.fresh_generation();
            }
        }
    }

    /// Takes the right to write without a check from every translation of the host page at `host`.
    pub fn protect_host_page(&mut self, host: u64) {
        let tables = self.banks.iter_mut().flat_map(|bank| [&mut bank.user, &mut bank.supervisor_ac]);
        for entry in tables.chain([&mut self.supervisor]).flat_map(|table| table.iter_mut()) {
            if entry.write != INVALID && entry.host_page() == Some(host) {
                entry.write = INVALID;
            }
        }
    }

    fn drop_local(&mut self) {
        for slot in self.local.drain(..) {
            self.supervisor[slot as usize] = Entry::EMPTY;
        }
    }

    fn fresh_generation(&mut self) -> u32 {
        self.next_generation = self.next_generation.wrapping_add(1);
        self.next_generation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(la: u64, page_shift: u32, fetch: bool) -> Fill {
        Fill { la, host: 0x7000_0000, read: true, write: true, fetch, global: false, page_shift }
    }

    fn reads(tlb: &Tlb, la: u64) -> bool {
        tlb.supervisor[slot(la)].read == la
    }

    #[test]
    fn invalidating_a_small_page_keeps_the_others() {
        let mut tlb = Tlb::default();
        tlb.fill(Privilege::Supervisor, fill(0x40_0000, 12, false));
        tlb.fill(Privilege::Supervisor, fill(0x40_1000, 12, false));
        tlb.invalidate(0x40_0123);
        assert!(!reads(&tlb, 0x40_0000) && reads(&tlb, 0x40_1000));
    }

    #[test]
    fn invalidating_in_a_large_page_drops_all_its_pieces() {
        let mut tlb = Tlb::default();
        for shift in [21, 30] {
            tlb.fill(Privilege::Supervisor, fill(0x4000_1000, shift, false));
            tlb.invalidate(0x4000_5000);
            assert!(!reads(&tlb, 0x4000_1000), "page shift {shift}");
        }
    }

    #[test]
    fn only_code_pages_change_the_generation() {
        let mut tlb = Tlb::default();
        tlb.fill(Privilege::User, fill(0x1000, 12, false));
        let before = tlb.generation();
        tlb.invalidate(0x1000);
        assert_eq!(tlb.generation(), before);
        tlb.fill(Privilege::User, fill(0x1000, 12, true));
        tlb.invalidate(0x1000);
        assert_ne!(tlb.generation(), before);
    }
}
