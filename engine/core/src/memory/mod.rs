//! Guest-physical memory: the RAM regions that back it, and the nested page table that maps it.

pub mod breakpoints;
pub mod code;
pub mod nested;
pub mod order;
pub mod region;
pub mod waivers;

/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Mask of the offset in a page.
pub const PAGE_OFFSET: u64 = PAGE_SIZE - 1;
