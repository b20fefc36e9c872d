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
