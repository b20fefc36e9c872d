//! The nested page table: guest-physical to host memory with rights per page, filled by the hypervisor (SDM vol. 3, 29.3).
//!
//! A radix tree with 2 MB and 4 KB leaves. Every change raises `generation` and waits until each core that runs on the table has dropped
//! what it cached, so a right that was taken away is gone when the call returns.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, Weak};

use super::breakpoints::Breakpoints;
use super::code::CodePages;
use super::region::Region;
use super::{PAGE_OFFSET, PAGE_SIZE};
use crate::cpu::signal::Signal;

/// Access rights of a guest-physical page, and the kinds of access.
pub mod right {
    pub const READ: u8 = 1;
    pub const WRITE: u8 = 2;
    pub const EXECUTE: u8 = 4;
    /// No right: a store that leaves memory as it is does not need `WRITE`. (For who locks pages and does not care for such stores.)
    pub const SAME: u8 = 8;
    /// No right and no memory: an instruction's access asks the hypervisor for the data at once, as an emulated one does. (What a
    /// hypervisor makes of misconfigured entries, which tell it that the page is a device's.)
    pub const DEVICE: u8 = 16;
}

/// Guest-physical addresses have this many bits.
pub const PHYSICAL_BITS: u32 = 46;
const LEVEL_BITS: u32 = 9;
const ENTRIES: usize = 1 << LEVEL_BITS;
const TOP_ENTRIES: usize = 1 << (PHYSICAL_BITS - 12 - 3 * LEVEL_BITS);
/// Bytes of a large leaf.
pub const LARGE: u64 = PAGE_SIZE << LEVEL_BITS;

/// Where a guest-physical page lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Host address of the page's first byte.
    pub host: u64,
    pub rights: u8,
}

enum Entry {
    Empty,
    Leaf(Leaf),
    Table(Box<[Entry]>),
}

fn table(entries: usize) -> Box<[Entry]> {
    (0..entries).map(|_| Entry::Empty).collect()
}

/// The tree itself.
pub struct Tree {
    root: Box<[Entry]>,
    /// Regions that leaves point into, kept alive by the table.
    regions: Vec<Arc<Region>>,
}

impl Tree {
    /// The leaf of `gpa`, adjusted to its 4 KB page.
    #[inline]
    pub fn lookup(&self, gpa: u64) -> Option<Leaf> {
        self.find(gpa).map(|(leaf, _)| leaf)
    }

    /// [`Tree::lookup`], and how many bytes the leaf maps.
    pub fn find(&self, gpa: u64) -> Option<(Leaf, u64)> {
        if gpa >> PHYSICAL_BITS != 0 {
            return None;
        }
        let mut entry = &self.root[(gpa >> (12 + 3 * LEVEL_BITS)) as usize];
        let mut shift = 12 + 3 * LEVEL_BITS;
        loop {
            match entry {
                Entry::Empty => return None,
                Entry::Leaf(leaf) => {
                    let within = gpa & ((1 << shift) - 1) & !PAGE_OFFSET;
                    return Some((Leaf { host: leaf.host + within, rights: leaf.rights }, 1 << shift));
                }
                Entry::Table(next) => {
                    shift -= LEVEL_BITS;
                    entry = &next[(gpa >> shift) as usize & (ENTRIES - 1)];
                }
            }
        }
    }

    /// The slot for a leaf of `size` bytes (4 KB or 2 MB) at `gpa`, splitting a large leaf in the way.
    fn slot(&mut self, gpa: u64, size: u64) -> &mut Entry {
        let mut shift = 12 + 3 * LEVEL_BITS;
        let mut entry = &mut self.root[(gpa >> shift) as usize];
        while 1u64 << shift > size {
            match entry {
                Entry::Table(_) => {}
                Entry::Empty => *entry = Entry::Table(table(ENTRIES)),
                Entry::Leaf(leaf) => {
                    let Leaf { host, rights } = *leaf;
                    let step = 1u64 << (shift - LEVEL_BITS);
                    *entry = Entry::Table((0..ENTRIES as u64).map(|n| Entry::Leaf(Leaf { host: host + n * step, rights })).collect());
                }
            }
            let Entry::Table(next) = entry else { unreachable!("made a table just now") };
            shift -= LEVEL_BITS;
            entry = &mut next[(gpa >> shift) as usize & (ENTRIES - 1)];
        }
        entry
    }
}

/// A change that the caller asked for does not fit the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedError {
    /// An address or size is not a multiple of the page size, or the size is zero.
    Unaligned,
    /// The range leaves guest-physical space or the region.
    OutOfRange,
}

/// A nested page table that any thread may change while cores run on it.
pub struct NestedPageTable {
    tree: RwLock<Tree>,
    generation: AtomicU64,
    cores: Mutex<Vec<Weak<Signal>>>,
    /// Pages with translated code of any core.
    pub code: CodePages,
    /// Where cores leave the guest before the instruction.
    pub breakpoints: Breakpoints,
    /// Held by the core that makes the others stand still.
    pub bus: Mutex<()>,
}

impl Default for NestedPageTable {
    fn default() -> Self {
        let tree = Tree { root: table(TOP_ENTRIES), regions: Vec::new() };
        NestedPageTable {
            tree: RwLock::new(tree),
            generation: AtomicU64::new(1),
            cores: Mutex::default(),
            code: CodePages::default(),
            breakpoints: Breakpoints::default(),
            bus: Mutex::default(),
        }
    }
}

impl NestedPageTable {
    /// Maps `[gpa, gpa + size)` to `region` from `offset` on, in 2 MB leaves where the addresses are aligned.
    pub fn map(&self, gpa: u64, size: u64, region: &Arc<Region>, offset: u64, rights: u8) -> Result<(), NestedError> {
        check_range(gpa, size)?;
        if offset & PAGE_OFFSET != 0 {
            return Err(NestedError::Unaligned);
        }
        if offset.checked_add(size).is_none_or(|end| end > region.size() as u64) {
            return Err(NestedError::OutOfRange);
        }
        let host = region.start() as u64 + offset;
        self.change(|tree| {
            if !tree.regions.iter().any(|r| Arc::ptr_eq(r, region)) {
                tree.regions.push(region.clone());
            }
            let mut replaced = false;
            for_each_leaf(gpa, size, |at, bytes| {
                let slot = tree.slot(at, bytes);
                replaced |= !matches!(slot, Entry::Empty);
                *slot = Entry::Leaf(Leaf { host: host + (at - gpa), rights });
            });
            replaced
        });
        Ok(())
    }

    /// Says that `[gpa, gpa + size)`, where nothing is mapped, belongs to a device ([`right::DEVICE`]).
    pub fn map_device(&self, gpa: u64, size: u64) -> Result<(), NestedError> {
        check_range(gpa, size)?;
        self.change(|tree| {
            for_each_leaf(gpa, size, |at, bytes| *tree.slot(at, bytes) = Entry::Leaf(Leaf { host: 0, rights: right::DEVICE }));
            true
        });
        Ok(())
    }

    /// Removes every leaf of `[gpa, gpa + size)`.
    pub fn unmap(&self, gpa: u64, size: u64) -> Result<(), NestedError> {
        check_range(gpa, size)?;
        self.change(|tree| {
            for_each_leaf(gpa, size, |at, bytes| *tree.slot(at, bytes) = Entry::Empty);
            true
        });
        Ok(())
    }

    /// Sets the rights of every page of `[gpa, gpa + size)` that is mapped to memory.
    pub fn protect(&self, gpa: u64, size: u64, rights: u8) -> Result<(), NestedError> {
        check_range(gpa, size)?;
        self.change(|tree| {
            for at in (gpa..gpa + size).step_by(PAGE_SIZE as usize) {
                if let Some(leaf) = tree.lookup(at).filter(|leaf| leaf.rights & right::DEVICE == 0) {
                    *tree.slot(at, PAGE_SIZE) = Entry::Leaf(Leaf { rights, ..leaf });
                }
            }
            true
        });
        Ok(())
    }

    /// Adds and removes hidden breakpoints, which every core obeys when the call returns.
    pub fn set_breakpoints(&self, add: &[u64], remove: &[u64]) {
        let stale = self.breakpoints.change(&self.tree(), add, remove);
        self.drop_code(&stale);
        self.shoot_down();
    }

    /// Tells the cores that code of these host pages is no longer right.
    fn drop_code(&self, pages: &[u64]) {
        pages.iter().for_each(|page| self.wrote_host(*page, PAGE_SIZE, None));
    }

    /// Tells the cores that a device or the hypervisor wrote `[gpa, gpa + size)`, so that they drop code made from it.
    pub fn wrote(&self, gpa: u64, size: u64) -> Result<(), NestedError> {
        let end = gpa.checked_add(size).filter(|end| *end <= 1 << PHYSICAL_BITS).ok_or(NestedError::OutOfRange)?;
        let mut at = gpa;
        while at < end {
            let bytes = (PAGE_SIZE - (at & PAGE_OFFSET)).min(end - at);
            if let Some(leaf) = self.lookup(at) {
                self.wrote_host(leaf.host + (at & PAGE_OFFSET), bytes, None);
            }
            at += bytes;
        }
        Ok(())
    }

    /// Tells all cores, except the one behind `writer`, that `[host, host + bytes)` of one page was written, if there is code in that page.
    pub fn wrote_host(&self, host: u64, bytes: u64, writer: Option<&Signal>) {
        if self.code.contains(host & !PAGE_OFFSET) {
            self.cores_except(writer).iter().for_each(|core| core.wrote(host, bytes));
        }
    }

    /// All cores on this table but the one behind `signal`.
    pub fn cores_except(&self, signal: Option<&Signal>) -> Vec<Arc<Signal>> {
        let mut cores = self.cores();
        cores.retain(|core| !signal.is_some_and(|own| std::ptr::eq(own, Arc::as_ptr(core))));
        cores
    }

    /// Where the page of `gpa` lives, if it is mapped.
    pub fn lookup(&self, gpa: u64) -> Option<Leaf> {
        self.tree().lookup(gpa)
    }

    /// The tree, locked for reading.
    #[inline]
    pub fn tree(&self) -> RwLockReadGuard<'_, Tree> {
        self.tree.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Rises with every change.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Makes changes of this table reach the core behind `signal`.
    pub fn attach(&self, signal: &Arc<Signal>) {
        let _bus = self.bus.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut cores = self.cores.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        cores.retain(|core| core.strong_count() > 0);
        if !cores.iter().any(|core| std::ptr::eq(core.as_ptr(), Arc::as_ptr(signal))) {
            cores.push(Arc::downgrade(signal));
        }
    }

    /// Edits the tree; `edit` tells whether it changed or took away what a core may have cached. (What was not mapped is not cached.)
    fn change(&self, edit: impl FnOnce(&mut Tree) -> bool) {
        let (stale, flush) = {
            let mut tree = self.tree.write().unwrap_or_else(|poisoned| poisoned.into_inner());
            let flush = edit(&mut tree);
            (self.breakpoints.follow(&tree), flush)
        };
        self.drop_code(&stale);
        if flush || !stale.is_empty() {
            self.shoot_down();
        }
    }

    /// Returns when every core has dropped what it cached before.
    fn shoot_down(&self) {
        let generation = self.generation.fetch_add(1, Ordering::AcqRel) + 1;
        for core in self.cores() {
            core.flush_nested(generation);
        }
    }

    fn cores(&self) -> Vec<Arc<Signal>> {
        let cores = self.cores.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        cores.iter().filter_map(Weak::upgrade).collect()
    }
}

fn check_range(gpa: u64, size: u64) -> Result<(), NestedError> {
    if (gpa | size) & PAGE_OFFSET != 0 || size == 0 {
        return Err(NestedError::Unaligned);
    }
    match gpa.checked_add(size) {
        Some(end) if end <= 1 << PHYSICAL_BITS => Ok(()),
        _ => Err(NestedError::OutOfRange),
    }
}

/// Calls `leaf(gpa, size)` for the largest aligned leaves that tile the range.
fn for_each_leaf(gpa: u64, size: u64, mut leaf: impl FnMut(u64, u64)) {
    let end = gpa + size;
    let mut at = gpa;
    while at < end {
        let bytes = if at % LARGE == 0 && end - at >= LARGE { LARGE } else { PAGE_SIZE };
        leaf(at, bytes);
        at += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Arc<Region> {
        Arc::new(Region::new(4 << 20).unwrap())
    }

    #[test]
    fn large_leaves_split_when_one_page_changes() {
        let (npt, ram) = (NestedPageTable::default(), region());
        let host = ram.start() as u64;
        npt.map(0, 4 << 20, &ram, 0, right::READ | right::WRITE).unwrap();
        npt.protect(0x5000, 0x1000, right::READ).unwrap();
        assert_eq!(npt.lookup(0x4fff), Some(Leaf { host: host + 0x4000, rights: 3 }));
        assert_eq!(npt.lookup(0x5008), Some(Leaf { host: host + 0x5000, rights: 1 }));
        npt.unmap(0x20_0000, LARGE).unwrap();
        assert_eq!(npt.lookup(0x20_0000), None);
        assert_eq!(npt.lookup(0x1f_f000), Some(Leaf { host: host + 0x1f_f000, rights: 3 }));
    }

    #[test]
    fn a_device_has_no_memory_to_give_rights_to() {
        let (npt, ram) = (NestedPageTable::default(), region());
        npt.map_device(0xfee0_0000, 0x1000).unwrap();
        npt.protect(0xfee0_0000, 0x1000, right::READ).unwrap();
        assert_eq!(npt.lookup(0xfee0_0080), Some(Leaf { host: 0, rights: right::DEVICE }));
        npt.map(0xfee0_0000, 0x1000, &ram, 0, right::READ).unwrap();
        assert_eq!(npt.lookup(0xfee0_0000), Some(Leaf { host: ram.start() as u64, rights: right::READ }));
    }

    #[test]
    fn ranges_are_checked() {
        let (npt, ram) = (NestedPageTable::default(), region());
        assert_eq!(npt.map(1, 4096, &ram, 0, 7), Err(NestedError::Unaligned));
        assert_eq!(npt.map(0, 0, &ram, 0, 7), Err(NestedError::Unaligned));
        assert_eq!(npt.map(0, 8 << 20, &ram, 0, 7), Err(NestedError::OutOfRange));
        assert_eq!(npt.map(0, 4096, &ram, u64::MAX - 4095, 7), Err(NestedError::OutOfRange));
        assert_eq!(npt.unmap(1 << PHYSICAL_BITS, 4096), Err(NestedError::OutOfRange));
        assert_eq!(npt.lookup(u64::MAX), None);
    }

    #[test]
    fn changes_raise_the_generation() {
        let (npt, ram) = (NestedPageTable::default(), region());
        let before = npt.generation();
        npt.map(0, 4096, &ram, 0, 7).unwrap();
        assert_eq!(npt.generation(), before, "nobody cached a page that was not mapped");
        npt.map(0, 4096, &ram, 4096, 7).unwrap();
        npt.unmap(0, 4096).unwrap();
        assert_eq!(npt.generation(), before + 2);
    }
}
