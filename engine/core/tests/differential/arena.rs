//! The arena of an instruction and its operands: where things are, for the host's CPU and for the guest alike.

pub const PAGE: usize = 4096;
/// Pages of the arena by purpose; those not named are guards.
pub const STUB_PAGE: usize = 0;
pub const CONTEXT_PAGE: usize = 1;
pub const SLOT_PAGE: usize = 2;
pub const DATA_PAGE: usize = 4;
pub const READ_ONLY_PAGE: usize = 7;
pub const PAGES: usize = 9;
/// Pages of operands that can be written.
pub const DATA_PAGES: usize = 2;
/// Bytes of operands that can be written.
pub const DATA_SIZE: usize = DATA_PAGES * PAGE;
/// Where in its page the instruction is.
pub const SLOT_OFFSET: usize = 0x400;
/// Where its page and the operands are in the arena.
pub const SLOT_PAGE_OFFSET: u64 = (SLOT_PAGE * PAGE) as u64;
pub const DATA_OFFSET: u64 = (DATA_PAGE * PAGE) as u64;
/// Where the page that can only be read is, from the operands.
pub const READ_ONLY_OFFSET: u64 = ((READ_ONLY_PAGE - DATA_PAGE) * PAGE) as u64;
/// Where arenas are: below 2 GB, the same in every run, and far from each other, because bit offsets reach far.
const ARENA: u64 = 0x10_0000;
const ARENA_DISTANCE: u64 = 0x1000_0000;

/// Contents of the page that can only be read.
pub fn read_only() -> Vec<u8> {
    (0..PAGE as u64).step_by(8).flat_map(|at| at.wrapping_mul(0x0102_0408_1020_4081).to_le_bytes()).collect()
}

/// Where the arena of an oracle with this number is.
pub fn arena(number: u16) -> u64 {
    ARENA + ARENA_DISTANCE * u64::from(number)
}
