//! From linear to host addresses: the guest's page tables, the nested page table, and the TLB in front of both.

pub mod frames;
mod table;
pub mod tlb;
pub mod translate;
pub mod walk;

use crate::memory::nested::right;
use crate::state::cr4;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    Read,
    Write,
    Fetch,
}

impl AccessKind {
    /// The right that the access needs in the nested page table.
    pub const fn right(self) -> u8 {
        match self {
            AccessKind::Read => right::READ,
            AccessKind::Write => right::WRITE,
            AccessKind::Fetch => right::EXECUTE,
        }
    }
}

/// With which privilege an access is made; each has a TLB of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// Supervisor, and SMAP applies.
    Supervisor,
    /// Supervisor with EFLAGS.AC set, so SMAP does not apply.
    SupervisorAc,
    User,
}

/// Bits of an address above a linear address: 16, or 7 with 5-level paging.
pub const fn unused_bits(cr4: u64) -> u8 {
    if cr4 & cr4::LA57 != 0 {
        7
    } else {
        16
    }
}

/// Whether the `unused` upper bits of `la` repeat the one below them (SDM vol. 1, 3.3.7.1).
#[inline(always)]
pub const fn canonical(la: u64, unused: u8) -> bool {
    (la as i64) << unused >> unused == la as i64
}
