//! The translation look-aside buffer: every translation that a core has cached, and what else depends on them (SDM vol. 3, 4.10).
//!
//! Supervisor translations live in one table, of which a change of address space drops those that are not global; those of user and AC-set
//! accesses live in a bank per PCID, so that a switch of address space is a change of bank.
//!
//! Blocks of code are found by linear address too. What is remembered about that (jump cache, links between blocks) is as old as a
//! generation: one for supervisor code, whatever the address space, and one per bank for user code. A generation ends only when a page
//! that code was found at is invalidated.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;

use super::table::Table;
pub use super::table::{never, slot, Entries, Entry, SLOTS};
use super::{AccessKind, Privilege};
use crate::memory::code::AddressHasher;
use crate::memory::PAGE_OFFSET;

/// PCIDs whose translations are kept at the same time.
const BANKS: usize = 8;
/// Members of an [`AddressSet`].
const SET_MAX: usize = 1 << 13;

/// Bits of an address that tell apart the regions in which translations of large pages are remembered: 4 MB for the smaller sizes, 1 GB for
/// the largest.
const LARGE_REGION: u64 = !0 << 22;
const HUGE_REGION: u64 = !0 << 30;

type AddressSet = HashSet<u64, BuildHasherDefault<AddressHasher>>;

/// Where code was found through translations of one kind.
#[derive(Default)]
struct CodeView {
    generation: u64,
    /// Linear pages.
    pages: AddressSet,
}

impl CodeView {
    fn has(&self, la: u64) -> bool {
        self.pages.contains(&(la & !PAGE_OFFSET))
    }

    fn has_any_of(&self, la: u64, mask: u64) -> bool {
        self.pages.iter().any(|page| (page ^ la) & mask == 0)
    }

    /// Begins another generation, in which nothing has been found yet.
    fn end(&mut self, next: &mut u64) {
        *next += 1;
        self.generation = *next;
        self.pages.clear();
    }
}

/// Translations of one address space.
struct Bank {
    pcid: u16,
    /// Larger is more recent.
    used: u64,
    user: Table,
    supervisor_ac: Table,
    code: CodeView,
    /// `supervisor_ac` may have code that is not global.
    local_code: bool,
}

impl Bank {
    /// The bank of this index, for no address space yet.
    fn new(index: usize) -> Self {
        let [user, supervisor_ac] = [1, 2].map(|number| Table::new(2 * index + number));
        Bank { pcid: 0, used: 0, user, supervisor_ac, code: CodeView::default(), local_code: false }
    }

    fn remove(&mut self, la: u64) {
        self.user.remove(la);
        self.supervisor_ac.remove(la);
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
    supervisor_code: CodeView,
    /// `supervisor` may have code that is not global.
    local_code: bool,
    /// At most [`BANKS`].
    banks: Vec<Bank>,
    current: usize,
    clock: u64,
    /// The last generation of any code.
    last_generation: u64,
    /// Regions with translations that came from large pages since the last flush.
    large: AddressSet,
    huge: AddressSet,
    /// There were more than the sets take.
    large_everywhere: bool,
    /// Whether banks may hold global pages of the lower and of the upper half of addresses.
    globals: [bool; 2],
    pub fills: u64,
    pub flushes: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb {
            supervisor: Table::new(0),
            supervisor_code: CodeView::default(),
            local_code: false,
            banks: vec![Bank { used: 1, ..Bank::new(0) }],
            current: 0,
            clock: 1,
            last_generation: 0,
            large: AddressSet::default(),
            huge: AddressSet::default(),
            large_everywhere: false,
            globals: [false; 2],
            fills: 0,
            flushes: 0,
        }
    }
}

/// Number of the half of addresses that `la` is in.
const fn half(la: u64) -> usize {
    (la >> 63) as usize
}

impl Tlb {
    /// The table for accesses of `privilege` in the current address space. The pointer stays valid as long as the TLB: tables are never
    /// reallocated.
    #[inline(always)]
    pub fn table(&self, privilege: Privilege) -> *const Entries {
        match privilege {
            Privilege::Supervisor => self.supervisor.as_ptr(),
            Privilege::SupervisorAc => self.banks[self.current].supervisor_ac.as_ptr(),
            Privilege::User => self.banks[self.current].user.as_ptr(),
        }
    }

    /// Caches a translation.
    pub fn fill(&mut self, privilege: Privilege, fill: Fill) {
        self.fills += 1;
        self.note_large(&fill);
        let local_code = fill.fetch && !fill.global;
        let bank = &mut self.banks[self.current];
        let table = match privilege {
            Privilege::Supervisor => {
                self.local_code |= local_code;
                &mut self.supervisor
            }
            Privilege::SupervisorAc => {
                bank.local_code |= local_code;
                &mut bank.supervisor_ac
            }
            Privilege::User => &mut bank.user,
        };
        table.insert(fill.la, Entry::new(fill.la, fill.host, fill.read, fill.write, fill.fetch), fill.global);
        self.globals[half(fill.la)] |= fill.global && privilege != Privilege::Supervisor;
    }

    fn note_large(&mut self, fill: &Fill) {
        let (set, mask) = match fill.page_shift {
            ..=12 => return,
            13..=22 => (&mut self.large, LARGE_REGION),
            _ => (&mut self.huge, HUGE_REGION),
        };
        if set.len() < SET_MAX {
            set.insert(fill.la & mask);
        } else {
            self.large_everywhere |= !set.contains(&(fill.la & mask));
        }
    }

    /// Makes a translation for accesses of `privilege` to `la` that is known, but not where they look, one that they find. Tells whether
    /// there is one.
    pub fn recall(&mut self, privilege: Privilege, la: u64, kind: AccessKind) -> bool {
        let bank = &mut self.banks[self.current];
        match privilege {
            Privilege::Supervisor => self.supervisor.promote(la),
            Privilege::User => bank.user.promote(la),
            Privilege::SupervisorAc => bank.supervisor_ac.promote(la) || kind != AccessKind::Fetch && self.share_with_ac(la),
        }
    }

    /// Data at `la` that accesses with EFLAGS.AC set have not met yet: what other supervisor accesses or the user may do there, they may
    /// do too.
    fn share_with_ac(&mut self, la: u64) -> bool {
        let bank = &mut self.banks[self.current];
        let Some((entry, global)) = self.supervisor.find(la).or_else(|| bank.user.find(la)) else { return false };
        bank.supervisor_ac.insert(la, entry.for_data(), global);
        self.globals[half(la)] |= global;
        true
    }

    // ---- what was found by address ------------------------------------------------------------------------------------------------------

    /// Changes whenever a translation of code of the current address space may have become wrong.
    #[inline(always)]
    pub fn generation(&self, user: bool) -> u64 {
        if user {
            self.banks[self.current].code.generation
        } else {
            self.supervisor_code.generation
        }
    }

    /// Notes that a block was found at these linear addresses, with whose translations the generation ends. That may be now.
    pub fn note_code(&mut self, user: bool, first: u64, second: Option<u64>) {
        let view = if user { &mut self.banks[self.current].code } else { &mut self.supervisor_code };
        if view.pages.len() + 2 > SET_MAX {
            view.end(&mut self.last_generation);
        }
        view.pages.extend([first, second.unwrap_or(first)].map(|la| la & !PAGE_OFFSET));
    }

    /// Ends every generation.
    pub fn forget_code(&mut self) {
        let views = self.banks.iter_mut().map(|bank| &mut bank.code).chain([&mut self.supervisor_code]);
        views.for_each(|view| view.end(&mut self.last_generation));
    }

    // ---- invalidation -----------------------------------------------------------------------------------------------------------------

    /// A new address space (MOV to CR3): `keep` leaves the translations of `pcid` in place.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.drop_local();
        if self.banks[self.current].local_code {
            self.supervisor_code.end(&mut self.last_generation);
        }
        self.clock += 1;
        let found = self.banks.iter().position(|bank| bank.pcid == pcid);
        let index = found.unwrap_or_else(|| self.spare_bank());
        if found.is_none() || !keep {
            self.clear_bank(index);
        }
        self.banks[index].pcid = pcid;
        self.banks[index].used = self.clock;
        self.current = index;
    }

    /// A bank for another address space: a new one, or that which was used longest ago.
    fn spare_bank(&mut self) -> usize {
        if self.banks.len() < BANKS {
            self.banks.push(Bank::new(self.banks.len()));
            return self.banks.len() - 1;
        }
        let oldest = self.banks.iter().enumerate().min_by_key(|(_, bank)| bank.used);
        oldest.map_or(0, |(index, _)| index)
    }

    /// Drops everything, global translations included.
    pub fn flush(&mut self) {
        self.flushes += 1;
        self.supervisor.clear();
        self.local_code = false;
        self.supervisor_code.end(&mut self.last_generation);
        (0..self.banks.len()).for_each(|index| self.clear_bank(index));
        self.large.clear();
        self.huge.clear();
        self.large_everywhere = false;
        self.globals = [false; 2];
    }

    /// Drops the translations of one PCID that are not global; those of the current one are among them when `pcid` is current.
    pub fn flush_pcid(&mut self, pcid: u16) {
        self.drop_local();
        for index in 0..self.banks.len() {
            if self.banks[index].pcid == pcid {
                self.clear_bank(index);
            }
        }
    }

    /// Drops every translation that is not global.
    pub fn flush_local(&mut self) {
        self.drop_local();
        (0..self.banks.len()).for_each(|index| self.clear_bank(index));
    }

    /// Drops the translations of the page of `la` in the current address space, and global ones (INVLPG). Large pages are cached in 4 KB
    /// pieces, of which any may belong to the one that software names, so where there was one its whole region goes.
    pub fn invalidate(&mut self, la: u64) {
        if self.large_everywhere {
            return self.flush();
        }
        if self.huge.contains(&(la & HUGE_REGION)) {
            return self.invalidate_region(la, HUGE_REGION);
        }
        if self.large.contains(&(la & LARGE_REGION)) {
            return self.invalidate_region(la, LARGE_REGION);
        }
        self.supervisor.remove(la);
        if self.supervisor_code.has(la) {
            self.supervisor_code.end(&mut self.last_generation);
        }
        let (current, everywhere) = (self.current, self.globals[half(la)]);
        for (_, bank) in self.banks.iter_mut().enumerate().filter(|(index, _)| everywhere || *index == current) {
            bank.remove(la);
            if bank.code.has(la) {
                bank.code.end(&mut self.last_generation);
            }
        }
    }

    /// [`Tlb::invalidate`] for all pages that have the bits of `mask` in common with `la`.
    fn invalidate_region(&mut self, la: u64, mask: u64) {
        self.supervisor.remove_region(la, mask);
        if self.supervisor_code.has_any_of(la, mask) {
            self.supervisor_code.end(&mut self.last_generation);
        }
        for bank in &mut self.banks {
            bank.user.remove_region(la, mask);
            bank.supervisor_ac.remove_region(la, mask);
            if bank.code.has_any_of(la, mask) {
                bank.code.end(&mut self.last_generation);
            }
        }
    }

    /// Drops the translations of the page of `la` in the address space `pcid` (INVPCID).
    pub fn invalidate_in(&mut self, pcid: u16, la: u64) {
        if self.banks[self.current].pcid == pcid {
            self.invalidate(la);
        } else {
            self.flush_pcid(pcid);
        }
    }

    /// Takes the right to write without a check from every translation of the host page at `host`.
    pub fn protect_host_page(&mut self, host: u64) {
        let tables = self.banks.iter_mut().flat_map(|bank| [&mut bank.user, &mut bank.supervisor_ac]);
        tables.chain([&mut self.supervisor]).for_each(|table| table.protect_host_page(host));
    }

    fn clear_bank(&mut self, index: usize) {
        let bank = &mut self.banks[index];
        bank.user.clear();
        bank.supervisor_ac.clear();
        bank.code.end(&mut self.last_generation);
        if std::mem::take(&mut bank.local_code) {
            self.supervisor_code.end(&mut self.last_generation);
        }
    }

    fn drop_local(&mut self) {
        self.supervisor.clear_local();
        if std::mem::take(&mut self.local_code) {
            self.supervisor_code.end(&mut self.last_generation);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(la: u64, page_shift: u32, fetch: bool) -> Fill {
        Fill { la, host: 0x7000_0000, read: true, write: true, fetch, global: false, page_shift }
    }

    fn reads(tlb: &Tlb, privilege: Privilege, la: u64) -> bool {
        // SAFETY: tables live as long as the TLB.
        unsafe { (*tlb.table(privilege)).read[slot(la)] == la }
    }

    #[test]
    fn invalidating_a_small_page_keeps_the_others() {
        let mut tlb = Tlb::default();
        tlb.fill(Privilege::Supervisor, fill(0x40_0000, 12, false));
        tlb.fill(Privilege::Supervisor, fill(0x40_1000, 12, false));
        tlb.invalidate(0x40_0123);
        assert!(!reads(&tlb, Privilege::Supervisor, 0x40_0000) && reads(&tlb, Privilege::Supervisor, 0x40_1000));
    }

    #[test]
    fn invalidating_in_a_large_page_drops_all_its_pieces() {
        let mut tlb = Tlb::default();
        for shift in [21, 30] {
            tlb.fill(Privilege::Supervisor, fill(0x4000_1000, shift, false));
            tlb.invalidate(0x4000_5000);
            assert!(!reads(&tlb, Privilege::Supervisor, 0x4000_1000), "page shift {shift}");
        }
    }

    #[test]
    fn only_pages_where_code_was_found_end_a_generation() {
        let mut tlb = Tlb::default();
        tlb.fill(Privilege::User, fill(0x1000, 12, true));
        let before = tlb.generation(true);
        tlb.invalidate(0x1000);
        assert_eq!(tlb.generation(true), before);
        tlb.note_code(true, 0x1234, None);
        tlb.invalidate(0x2000);
        assert_eq!(tlb.generation(true), before);
        tlb.invalidate(0x1000);
        assert_ne!(tlb.generation(true), before);
    }

    #[test]
    fn supervisor_code_outlives_a_change_of_address_space_only_where_it_is_global() {
        let mut tlb = Tlb::default();
        tlb.fill(Privilege::Supervisor, Fill { global: true, ..fill(0x1000, 12, true) });
        tlb.note_code(false, 0x1000, None);
        let before = tlb.generation(false);
        tlb.switch(1, true);
        assert_eq!(tlb.generation(false), before);
        tlb.fill(Privilege::SupervisorAc, fill(0x2000, 12, true));
        tlb.switch(0, true);
        let after = tlb.generation(false);
        assert_ne!(after, before);
        tlb.switch(1, true);
        tlb.switch(0, true);
        assert_ne!(tlb.generation(false), after, "the bank of 1 still has code of its own");
    }

    #[test]
    fn user_code_has_a_generation_for_each_address_space() {
        let mut tlb = Tlb::default();
        tlb.switch(1, false);
        let first = tlb.generation(true);
        tlb.switch(2, false);
        assert_ne!(tlb.generation(true), first);
        tlb.switch(1, true);
        assert_eq!(tlb.generation(true), first);
        tlb.switch(1, false);
        assert_ne!(tlb.generation(true), first);
    }

    #[test]
    fn global_pages_are_invalidated_in_every_bank() {
        let recall = |tlb: &mut Tlb, la| tlb.recall(Privilege::SupervisorAc, la, AccessKind::Read);
        let mut tlb = Tlb::default();
        let kernel = 0xffff_8000_0000_1000;
        tlb.fill(Privilege::Supervisor, Fill { global: true, ..fill(kernel, 12, false) });
        assert!(recall(&mut tlb, kernel) && reads(&tlb, Privilege::SupervisorAc, kernel));
        tlb.fill(Privilege::User, fill(0x1000, 12, false));
        assert!(recall(&mut tlb, 0x1000) && !recall(&mut tlb, 0x2000));
        tlb.switch(1, true);
        assert!(!reads(&tlb, Privilege::SupervisorAc, kernel), "a bank of its own");
        tlb.invalidate(kernel);
        tlb.invalidate(0x1000);
        tlb.switch(0, true);
        assert!(!reads(&tlb, Privilege::SupervisorAc, kernel) && !reads(&tlb, Privilege::Supervisor, kernel));
        assert!(reads(&tlb, Privilege::SupervisorAc, 0x1000), "another address space's");
    }

    #[test]
    fn more_large_regions_than_are_told_apart() {
        let mut tlb = Tlb::default();
        (0..=SET_MAX as u64).for_each(|n| tlb.fill(Privilege::Supervisor, fill(n << 22, 21, false)));
        tlb.fill(Privilege::Supervisor, fill((SET_MAX as u64) << 22, 21, false));
        tlb.invalidate((SET_MAX as u64) << 22 | 0x5000);
        assert!(!reads(&tlb, Privilege::Supervisor, (SET_MAX as u64) << 22));
    }
}
