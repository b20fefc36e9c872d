//! From linear to host addresses: the guest's page tables, the nested page table, and the TLB in front of both.

pub mod tlb;
pub mod translate;
pub mod walk;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    Read,
    Write,
    Fetch,
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

/// Whether `la` is canonical for 48-bit linear addresses.
#[inline(always)]
pub const fn canonical(la: u64) -> bool {
    (la as i64) << 16 >> 16 == la as i64
}
