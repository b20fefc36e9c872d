//! What a core knows of the nested page table without asking it: the place of guest-physical frames, by pieces of 2 MB and of 4 KB.
//!
//! Page walks and fills of the TLB go through here, so they take no lock. Like the TLB, this is dropped before a change of the nested page
//! table is complete (`Cpu::flush_nested`). Only frames that are mapped are remembered.

use crate::memory::nested::{Leaf, NestedPageTable, LARGE};
use crate::memory::{PAGE_OFFSET, PAGE_SIZE};

const LARGE_SLOTS: usize = 512;
const SMALL_SLOTS: usize = 1024;

#[derive(Clone, Copy)]
struct Slot {
    /// Guest-physical address of the piece's first byte.
    gpa: u64,
    leaf: Leaf,
}

const EMPTY: Slot = Slot { gpa: u64::MAX, leaf: Leaf { host: 0, rights: 0 } };

/// Frames of one core.
pub struct Frames {
    large: Box<[Slot; LARGE_SLOTS]>,
    small: Box<[Slot; SMALL_SLOTS]>,
}

impl Default for Frames {
    fn default() -> Self {
        Frames { large: Box::new([EMPTY; LARGE_SLOTS]), small: Box::new([EMPTY; SMALL_SLOTS]) }
    }
}

impl Frames {
    /// The leaf of `gpa`, adjusted to its 4 KB page.
    #[inline(always)]
    pub fn lookup(&mut self, table: &NestedPageTable, gpa: u64) -> Option<Leaf> {
        let large = &self.large[(gpa / LARGE) as usize % LARGE_SLOTS];
        if large.gpa == gpa & !(LARGE - 1) {
            return Some(Leaf { host: large.leaf.host + (gpa & (LARGE - 1) & !PAGE_OFFSET), rights: large.leaf.rights });
        }
        let small = &self.small[(gpa / PAGE_SIZE) as usize % SMALL_SLOTS];
        if small.gpa == gpa & !PAGE_OFFSET {
            return Some(small.leaf);
        }
        self.ask(table, gpa)
    }

    #[cold]
    #[inline(never)]
    fn ask(&mut self, table: &NestedPageTable, gpa: u64) -> Option<Leaf> {
        let (leaf, size) = table.tree().find(gpa)?;
        if size >= LARGE {
            let host = leaf.host - (gpa & (LARGE - 1) & !PAGE_OFFSET);
            self.large[(gpa / LARGE) as usize % LARGE_SLOTS] = Slot { gpa: gpa & !(LARGE - 1), leaf: Leaf { host, ..leaf } };
        } else {
            self.small[(gpa / PAGE_SIZE) as usize % SMALL_SLOTS] = Slot { gpa: gpa & !PAGE_OFFSET, leaf };
        }
        Some(leaf)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.large.fill(EMPTY);
        self.small.fill(EMPTY);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::memory::nested::right;
    use crate::memory::region::Region;

    #[test]
    fn a_frame_is_where_the_table_has_it() {
        let (npt, ram) = (NestedPageTable::default(), Arc::new(Region::new(8 << 20).unwrap()));
        npt.map(0, 8 << 20, &ram, 0, right::READ).unwrap();
        npt.protect(0x5000, PAGE_SIZE, right::READ | right::WRITE).unwrap();
        npt.unmap(0x6000, PAGE_SIZE).unwrap();
        let mut frames = Frames::default();
        for round in 0..2 {
            for gpa in (0..10 << 20).step_by(PAGE_SIZE as usize) {
                assert_eq!(frames.lookup(&npt, gpa + 8), npt.lookup(gpa + 8), "{gpa:#x} in round {round}");
            }
        }
    }

    #[test]
    fn what_is_forgotten_is_asked_for_again() {
        let (npt, ram) = (NestedPageTable::default(), Arc::new(Region::new(2 << 20).unwrap()));
        let mut frames = Frames::default();
        assert_eq!(frames.lookup(&npt, 0x1000), None);
        npt.map(0, 2 << 20, &ram, 0, right::READ).unwrap();
        assert!(frames.lookup(&npt, 0x1000).is_some(), "nothing is known of what was not mapped");
        npt.unmap(0, 2 << 20).unwrap();
        frames.clear();
        assert_eq!(frames.lookup(&npt, 0x1000), None);
    }
}
