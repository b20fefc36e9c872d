//! The MSRs of Intel's silicon: counters, their control, LBR (SDM vol. 3, 18.9 and 20.2; vol. 4, table 2-2), and RDPMC of both vendors.

use super::counter::{ring, MASK};
use super::event::{select, Event, Measure};
use super::lbr::{self, ENTRIES};
use super::{debugctl, Pmu, AMD_COUNTERS, FIXED, GENERAL};
use crate::paging::canonical;

/// Indices of the MSRs.
pub mod index {
    pub const PMC: u32 = 0xc1;
    pub const EVTSEL: u32 = 0x186;
    pub const LBR_SELECT: u32 = 0x1c8;
    pub const LBR_TOS: u32 = 0x1c9;
    pub const FIXED_CTR: u32 = 0x309;
    pub use crate::model::msrs::index::PERF_CAPABILITIES;
    pub const FIXED_CTR_CTRL: u32 = 0x38d;
    pub const GLOBAL_STATUS: u32 = 0x38e;
    pub const GLOBAL_CTRL: u32 = 0x38f;
    pub const GLOBAL_STATUS_RESET: u32 = 0x390;
    pub const GLOBAL_STATUS_SET: u32 = 0x391;
    pub const GLOBAL_INUSE: u32 = 0x392;
    pub const A_PMC: u32 = 0x4c1;
    pub const LBR_FROM: u32 = 0x680;
    pub const LBR_TO: u32 = 0x6c0;
    pub const X2APIC_LVTPC: u32 = 0x834;
    pub const LBR_INFO: u32 = 0xdc0;
}

/// Bits of GLOBAL_STATUS besides those of the counters.
pub mod status {
    pub const LBR_FROZEN: u64 = 1 << 58;
    pub const COUNTERS_FROZEN: u64 = 1 << 59;
    /// ASCI, which nothing sets here, and those of units that the core lacks: they can be reset, as they read zero.
    pub const OTHERS: u64 = 1 << 55 | 1 << 60 | 1 << 61 | 1 << 62 | 1 << 63;
    /// What STATUS_SET can set besides counters.
    pub const SETTABLE: u64 = LBR_FROZEN | COUNTERS_FROZEN;
}

/// Bits of an event select register; transactional memory is not there.
const EVTSEL_BITS: u64 = 0xffff_ffff;
/// Fields of FIXED_CTR_CTRL for one counter.
mod fixed {
    pub const OS: u64 = 1;
    pub const USR: u64 = 2;
    pub const PMI: u64 = 8;
    pub const BITS: u64 = 15;
}
/// What the fixed counters count.
const FIXED_EVENTS: [Event; FIXED] = [Event::Instructions, Event::Cycles, Event::Cycles];
/// INUSE: some counter raises interrupts.
const INUSE_PMI: u64 = 1 << 63;
/// INDEX of RDPMC: a fixed counter, and its low half alone.
const RDPMC_FIXED: u32 = 1 << 30;
const RDPMC_FAST: u32 = 1 << 31;

/// The software's mistake that is #GP in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Number of register `index` in a row of `count` that starts at `first`.
fn within(index: u32, first: u32, count: usize) -> Option<usize> {
    let n = index.checked_sub(first)? as usize;
    (n < count).then_some(n)
}

impl Pmu {
    /// Reads an MSR; counters are as of the last [`Pmu::fold`].
    pub fn read(&self, index: u32) -> Result<u64, Refused> {
        if self.amd {
            return self.read_amd(index);
        }
        self.read_counters(index).or_else(|| self.read_lbr(index)).ok_or(Refused)
    }

    /// Writes an MSR. Everything has been folded, and is chosen anew afterwards.
    pub fn write(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        if self.amd {
            return self.write_amd(index, value);
        }
        if index == index::PERF_CAPABILITIES || self.read(index).is_err() {
            return Err(Refused);
        }
        self.write_counters(index, value)?;
        self.configure();
        Ok(())
    }

    fn read_counters(&self, index: u32) -> Option<u64> {
        if index == index::PERF_CAPABILITIES {
            return self.capabilities;
        }
        if !self.exists() {
            return None;
        }
        if let Some(n) = within(index, index::PMC, GENERAL).or_else(|| within(index, index::A_PMC, GENERAL)) {
            return Some(self.counters[n].value());
        }
        if let Some(n) = within(index, index::EVTSEL, GENERAL) {
            return Some(self.select[n]);
        }
        if let Some(n) = within(index, index::FIXED_CTR, FIXED) {
            return Some(self.counters[GENERAL + n].value());
        }
        Some(match index {
            index::FIXED_CTR_CTRL => self.fixed_control,
            index::GLOBAL_STATUS => self.global_status,
            index::GLOBAL_CTRL => self.global_control,
            index::GLOBAL_STATUS_RESET | index::GLOBAL_STATUS_SET => 0,
            index::GLOBAL_INUSE => self.in_use(),
            _ => return None,
        })
    }

    fn write_counters(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        if let Some(n) = within(index, index::PMC, GENERAL) {
            self.counters[n].set(i64::from(value as i32) as u64);
        } else if let Some(n) = within(index, index::A_PMC, GENERAL) {
            self.counters[n].set(allowed(value, MASK)?);
        } else if let Some(n) = within(index, index::EVTSEL, GENERAL) {
            self.select[n] = allowed(value, EVTSEL_BITS)?;
        } else if let Some(n) = within(index, index::FIXED_CTR, FIXED) {
            self.counters[GENERAL + n].set(allowed(value, MASK)?);
        } else {
            match index {
                index::FIXED_CTR_CTRL => self.fixed_control = allowed(value, (1 << (4 * FIXED)) - 1)?,
                index::GLOBAL_CTRL => self.global_control = allowed(value, self.counter_bits())?,
                index::GLOBAL_STATUS_RESET => {
                    let bits = self.counter_bits() | status::SETTABLE | status::OTHERS;
                    self.global_status &= !allowed(value, bits)?;
                }
                index::GLOBAL_STATUS_SET => self.global_status |= allowed(value, self.counter_bits() | status::SETTABLE)?,
                index::GLOBAL_STATUS | index::GLOBAL_INUSE => return Err(Refused),
                _ => return self.write_lbr(index, value),
            }
        }
        Ok(())
    }

    /// Bits of the counters in GLOBAL_CTRL and GLOBAL_STATUS.
    fn counter_bits(&self) -> u64 {
        ((1 << self.general) - 1) | ((1 << self.fixed) - 1) << 32
    }

    /// Whether GLOBAL_CTRL takes `value`.
    pub fn global_control_allowed(&self, value: u64) -> bool {
        !self.amd && value & !self.counter_bits() == 0
    }

    /// GLOBAL_CTRL, which a VM exit saves.
    pub fn global_control(&self) -> u64 {
        self.global_control
    }

    /// Loads GLOBAL_CTRL at a VM entry or exit; everything has been folded.
    pub fn load_global_control(&mut self, value: u64) {
        if self.global_control != value {
            self.global_control = value;
            self.configure();
        }
    }

    fn in_use(&self) -> u64 {
        let general = (0..GENERAL).filter(|n| self.select[*n] & 0xff != 0).fold(0, |bits, n| bits | 1 << n);
        let fixed = (0..FIXED).filter(|n| self.fixed_field(*n) & 3 != 0).fold(0, |bits, n| bits | 1 << (32 + n));
        let interrupts =
            (0..GENERAL).any(|n| self.select[n] & select::INT != 0) || (0..FIXED).any(|n| self.fixed_field(n) & fixed::PMI != 0);
        general | fixed | if interrupts { INUSE_PMI } else { 0 }
    }

    fn fixed_field(&self, n: usize) -> u64 {
        self.fixed_control >> (4 * n) & fixed::BITS
    }

    // ---- last branch records ------------------------------------------------------------------------------------------------------------

    fn read_lbr(&self, index: u32) -> Option<u64> {
        if !self.has_lbr {
            return None;
        }
        let lbr = &self.lbr;
        let row = |first, values: &[u64; ENTRIES]| within(index, first, ENTRIES).map(|n| values[n]);
        match index {
            index::LBR_SELECT => Some(lbr.select),
            index::LBR_TOS => Some(lbr.tos as u64),
            _ => row(index::LBR_FROM, &lbr.from).or_else(|| row(index::LBR_TO, &lbr.to)).or_else(|| row(index::LBR_INFO, &lbr.info)),
        }
    }

    fn write_lbr(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        let lbr = &mut self.lbr;
        let address = || if canonical(value, self.unused_address_bits) { Ok(value) } else { Err(Refused) };
        if let Some(n) = within(index, index::LBR_FROM, ENTRIES) {
            lbr.from[n] = address()?;
        } else if let Some(n) = within(index, index::LBR_TO, ENTRIES) {
            lbr.to[n] = address()?;
        } else if let Some(n) = within(index, index::LBR_INFO, ENTRIES) {
            lbr.info[n] = value;
        } else if index == index::LBR_SELECT {
            lbr.select = allowed(value, lbr::select::ALL)?;
        } else {
            lbr.tos = value as usize % ENTRIES;
        }
        Ok(())
    }

    // ---- what follows from the registers --------------------------------------------------------------------------------------------------

    /// Sets every counter up as the registers say. Everything has been folded.
    pub(super) fn configure(&mut self) {
        if self.amd {
            return self.configure_amd();
        }
        let frozen = self.global_status & status::COUNTERS_FROZEN != 0;
        let enabled = if frozen { 0 } else { self.global_control };
        for n in 0..self.general {
            let select = self.select[n];
            let on = select & select::EN != 0 && enabled >> n & 1 != 0;
            let rings = if on { rings(select & select::OS, select & select::USR) } else { 0 };
            self.counters[n].configure(Measure::selected(select, false), rings, select & select::INT != 0, &self.tally);
        }
        for (n, event) in FIXED_EVENTS.into_iter().enumerate().take(self.fixed) {
            let field = self.fixed_field(n);
            let on = enabled >> (32 + n) & 1 != 0;
            let rings = if on { rings(field & fixed::OS, field & fixed::USR) } else { 0 };
            self.counters[GENERAL + n].configure(Measure::plain(event), rings, field & fixed::PMI != 0, &self.tally);
        }
    }

    /// The value that RDPMC reads with this index; counters are as of the last [`Pmu::fold`].
    pub fn rdpmc(&self, index: u32) -> Result<u64, Refused> {
        if self.amd {
            return if (index as usize) < self.general { Ok(self.counters[index as usize].value()) } else { Err(Refused) };
        }
        let n = (index & !(RDPMC_FAST | RDPMC_FIXED)) as usize;
        let (first, count) = if index & RDPMC_FIXED != 0 { (GENERAL, self.fixed) } else { (0, self.general) };
        if n >= count {
            return Err(Refused);
        }
        let value = self.counters[first + n].value();
        Ok(if index & RDPMC_FAST != 0 { value & 0xffff_ffff } else { value })
    }
}

const _: () = assert!(AMD_COUNTERS <= GENERAL + FIXED);

/// Privilege that a counter counts at.
pub(super) fn rings(os: u64, user: u64) -> u8 {
    let [kernel, user] = [(os, ring::KERNEL), (user, ring::USER)].map(|(on, bit)| if on != 0 { bit } else { 0 });
    kernel | user
}

/// `value`, unless it has bits outside `bits`.
fn allowed(value: u64, bits: u64) -> Result<u64, Refused> {
    if value & !bits == 0 {
        Ok(value)
    } else {
        Err(Refused)
    }
}

/// Bits of IA32_DEBUGCTL that a model has: LBR, BTF and freezing in SMM always, freezing at interrupts with performance monitoring; on
/// AMD silicon LBR, BTF and the debug pins.
pub fn debugctl_bits(pmu: &Pmu) -> u64 {
    match (pmu.amd, pmu.exists()) {
        (true, _) => 0x3f,
        (false, true) => {
            debugctl::LBR | debugctl::BTF | debugctl::FREEZE_LBRS_ON_PMI | debugctl::FREEZE_PERFMON_ON_PMI | debugctl::FREEZE_WHILE_SMM
        }
        (false, false) => debugctl::LBR | debugctl::BTF | debugctl::FREEZE_WHILE_SMM,
    }
}
