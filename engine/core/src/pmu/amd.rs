//! The MSRs of AMD's silicon: PERF_CTL and PERF_CTR, with the old names of the first four (APM vol. 2, 13.2.1; app. A).
//!
//! There is no global control and no status: an overflow raises the interrupt of the LVT entry, and the counter's value tells.

use super::event::{select, Measure};
use super::registers::{rings, Refused};
use super::{Pmu, AMD_COUNTERS, AMD_LEGACY};

/// First pair of control and counter.
const PERF_CTL: u32 = 0xc001_0200;
/// The old names: four controls, then four counters.
const LEGACY_CTL: u32 = 0xc001_0000;

/// Bits of a control register; the others are not writable, and writing them does nothing.
const CONTROL_BITS: u64 = 0x030f_ffd7_ffff;
const GUEST_ONLY: u64 = 1 << 40;
const HOST_ONLY: u64 = 1 << 41;

/// One of the two registers of a counter.
enum Register {
    Control(usize),
    Counter(usize),
}

impl Pmu {
    fn register(&self, index: u32) -> Option<Register> {
        let extended = index.wrapping_sub(PERF_CTL) as usize;
        let legacy = index.wrapping_sub(LEGACY_CTL) as usize;
        let (n, counter) = if extended < 2 * AMD_COUNTERS && self.general == AMD_COUNTERS {
            (extended / 2, extended % 2 != 0)
        } else if legacy < 2 * AMD_LEGACY && self.exists() {
            (legacy % AMD_LEGACY, legacy >= AMD_LEGACY)
        } else {
            return None;
        };
        Some(if counter { Register::Counter(n) } else { Register::Control(n) })
    }

    pub(super) fn read_amd(&self, index: u32) -> Result<u64, Refused> {
        match self.register(index).ok_or(Refused)? {
            Register::Control(n) => Ok(self.select[n]),
            Register::Counter(n) => Ok(self.counters[n].value()),
        }
    }

    pub(super) fn write_amd(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        match self.register(index).ok_or(Refused)? {
            Register::Control(n) => self.select[n] = value & CONTROL_BITS,
            Register::Counter(n) => self.counters[n].set(value),
        }
        self.configure();
        Ok(())
    }

    pub(super) fn configure_amd(&mut self) {
        for n in 0..self.general {
            let control = self.select[n];
            let in_guest = control & (GUEST_ONLY | HOST_ONLY) != HOST_ONLY;
            let on = control & select::EN != 0 && in_guest;
            let rings = if on { rings(control & select::OS, control & select::USR) } else { 0 };
            self.counters[n].configure(Measure::selected(control, true), rings, control & select::INT != 0, &self.tally);
        }
    }
}
