//! MXCSR (SDM vol. 1, 10.2.3): its bits, and what becomes of the exceptions of an SSE instruction.

use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::cr4;
use crate::uop::{Exec, Stop};

/// Sticky exception flags: invalid, denormal, divide by zero, overflow, underflow, precision.
pub const FLAGS: u32 = 0x3f;
/// Flags of exceptions that are found before the operation.
pub const BEFORE: u32 = 0x07;
/// Exception masks, the flags' order.
pub const MASKS: u32 = 0x1f80;
pub const MASK_SHIFT: u32 = 7;
/// Rounding control.
pub const ROUNDING: u32 = 3 << ROUNDING_SHIFT;
pub const ROUNDING_SHIFT: u32 = 13;
pub const INVALID: u32 = 0x01;
pub const DENORMAL: u32 = 0x02;
pub const DIVIDE_BY_ZERO: u32 = 0x04;
pub const OVERFLOW: u32 = 0x08;
pub const UNDERFLOW: u32 = 0x10;
pub const PRECISION: u32 = 0x20;
/// Denormals are zeros.
pub const DAZ: u32 = 1 << 6;
/// Flush-to-zero.
pub const FLUSH: u32 = 1 << 15;

/// Whether overflow is unmasked.
#[inline(always)]
pub fn traps_overflow(guest: u32) -> bool {
    guest & OVERFLOW << MASK_SHIFT == 0
}

/// Whether underflow is unmasked.
#[inline(always)]
pub fn traps_underflow(guest: u32) -> bool {
    guest & UNDERFLOW << MASK_SHIFT == 0
}

impl Cpu {
    /// Adds the flags that an operation raised to MXCSR; #XM when one of them is unmasked.
    #[inline(always)]
    pub(in crate::exec) fn raise_simd(&mut self, flags: u32) -> Exec {
        let unmasked = flags & !(self.state.fpu.mxcsr >> MASK_SHIFT);
        if unmasked != 0 {
            return Err(self.simd_exception(flags, unmasked));
        }
        self.state.fpu.mxcsr |= flags;
        Ok(())
    }

    /// SDM vol. 1, 11.5.2: exceptions found before the operation keep those behind it from being found.
    #[cold]
    fn simd_exception(&mut self, flags: u32, unmasked: u32) -> Stop {
        self.state.fpu.mxcsr |= if unmasked & BEFORE != 0 { flags & BEFORE } else { flags };
        if self.state.cr4 & cr4::OSXMMEXCPT != 0 {
            self.raise(vector::XM)
        } else {
            self.undefined()
        }
    }
}
