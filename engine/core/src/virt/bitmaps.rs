//! The hypervisor's permission bitmaps: which MSRs and ports exit (SDM vol. 3, 25.6.4 and 25.6.9; APM vol. 2, 15.10.1 and 15.11).

use crate::cpu::Cpu;

/// MSRs of one range of the bitmap.
const RANGE: u32 = 0x2000;
/// First MSR of each range.
const RANGES: [u32; 3] = [0, 0xc000_0000, 0xc001_0000];

impl Cpu {
    /// Whether the MSR bitmap makes an access exit. MSRs outside its ranges always do.
    pub fn msr_intercepted(&self, index: u32, write: bool) -> bool {
        let Some(range) = RANGES.iter().position(|first| (*first..first + RANGE).contains(&index)) else { return true };
        let bit = index - RANGES[range];
        if self.bitmaps.is_null() {
            return true;
        }
        // SAFETY: not null, so it is the block that `Core::enter` got; its caller keeps that valid during the run. The hypervisor may
        // write bitmaps meanwhile, so one volatile byte is read and no reference is made.
        let byte = unsafe { (&raw const (*self.bitmaps).msr_bitmap[range][usize::from(write)][bit as usize / 8]).read_volatile() };
        byte >> (bit % 8) & 1 != 0
    }

    /// Whether the port bitmap makes an access to the byte at `port` exit.
    pub fn port_intercepted(&self, port: u16) -> bool {
        if self.bitmaps.is_null() {
            return true;
        }
        // SAFETY: as in `msr_intercepted`.
        let byte = unsafe { (&raw const (*self.bitmaps).io_bitmap[usize::from(port) / 8]).read_volatile() };
        byte >> (port % 8) & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::clock::Clock;
    use crate::virt::control::{Block, BLOCK_SIZE};
    use std::sync::Arc;

    /// A zeroed block that changed as `edit` says.
    fn block(edit: impl FnOnce(&mut Block)) -> Box<Block> {
        let mut block = Box::<Block>::new_uninit();
        // SAFETY: `BLOCK_SIZE` bytes are the whole block, and zeroes are a valid one.
        let mut block = unsafe {
            block.as_mut_ptr().cast::<u8>().write_bytes(0, BLOCK_SIZE);
            block.assume_init()
        };
        edit(&mut block);
        block
    }

    fn cpu(block: &Block) -> Box<Cpu> {
        let mut cpu = Cpu::new(Arc::default(), Clock::default());
        cpu.bitmaps = block;
        cpu
    }

    #[test]
    fn msr_bits_are_by_range_and_direction() {
        let block = block(|block| {
            block.msr_bitmap[0][0][0x10 / 8] |= 1 << (0x10 % 8);
            block.msr_bitmap[1][1][0x82 / 8] |= 1 << (0x82 % 8);
        });
        let cpu = cpu(&block);
        assert!(cpu.msr_intercepted(0x10, false) && !cpu.msr_intercepted(0x10, true));
        assert!(cpu.msr_intercepted(0xc000_0082, true) && !cpu.msr_intercepted(0xc000_0082, false));
        assert!(!cpu.msr_intercepted(0xc001_1fff, true));
        assert!(cpu.msr_intercepted(0x2000, false) && cpu.msr_intercepted(0xc001_2000, true) && cpu.msr_intercepted(u32::MAX, false));
    }

    #[test]
    fn port_bits_are_by_number() {
        let block = block(|block| block.io_bitmap[0x3f8 / 8] |= 1);
        let cpu = cpu(&block);
        assert!(cpu.port_intercepted(0x3f8) && !cpu.port_intercepted(0x3f9) && !cpu.port_intercepted(0xffff));
    }
}
