//! Hidden breakpoints: instructions, by guest-physical address, before which a core leaves the guest.
//!
//! They are beside the nested page table and not in guest memory, so software finds nothing, and no core has to lift one while it steps
//! over it. Blocks are made with them (`decode/block.rs`): a change drops the code of the page, and a VM without any pays nothing. Code is
//! found by host address, so the set is kept both ways, and follows the table.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::nested::Tree;
use super::PAGE_OFFSET;

#[derive(Default)]
struct Sets {
    gpas: BTreeSet<u64>,
    /// Where the addresses that are mapped live.
    hosts: HashSet<u64>,
}

/// The breakpoints of one VM.
#[derive(Default)]
pub struct Breakpoints {
    any: AtomicBool,
    sets: Mutex<Sets>,
}

impl Breakpoints {
    /// Whether there is a breakpoint at a host address.
    #[inline]
    pub fn at_host(&self, host: u64) -> bool {
        self.any() && self.lock().hosts.contains(&host)
    }

    /// Whether there is a breakpoint at a guest-physical address.
    pub fn contains(&self, gpa: u64) -> bool {
        self.lock().gpas.contains(&gpa)
    }

    /// Whether there is any.
    #[inline]
    pub fn any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }

    /// Adds and removes breakpoints; returns the host pages whose code is no longer right.
    pub fn change(&self, tree: &Tree, add: &[u64], remove: &[u64]) -> Vec<u64> {
        let mut sets = self.lock();
        sets.gpas.extend(add);
        for gpa in remove {
            sets.gpas.remove(gpa);
        }
        self.any.store(!sets.gpas.is_empty(), Ordering::Relaxed);
        sets.follow(tree)
    }

    /// The table has changed; returns the host pages whose code is no longer right.
    pub fn follow(&self, tree: &Tree) -> Vec<u64> {
        if self.any() {
            self.lock().follow(tree)
        } else {
            Vec::new()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sets {
    fn follow(&mut self, tree: &Tree) -> Vec<u64> {
        let host = |gpa: &u64| tree.lookup(*gpa).map(|leaf| leaf.host + (gpa & PAGE_OFFSET));
        let hosts: HashSet<u64> = self.gpas.iter().filter_map(host).collect();
        let pages: BTreeSet<u64> = self.hosts.symmetric_difference(&hosts).map(|at| at & !PAGE_OFFSET).collect();
        self.hosts = hosts;
        pages.into_iter().collect()
    }
}
