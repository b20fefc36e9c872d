//! Performance monitoring and last branch records: everything about them that belongs to a core and not to a guest.
//!
//! Sources: SDM vol. 3, ch. 18 and 20 (architectural performance monitoring version 4, as Cascade Lake has it); APM vol. 2, 13.2.
//!
//! Nothing here is touched while nobody watches. While somebody does, the core runs in the dispatcher of `cpu/watch.rs`, which keeps the
//! [`tally`] of what happens; counters are differences of its totals, and are looked at when software reads them or when one may overflow.
//! `registers` has the MSRs of Intel's silicon, `amd` those of AMD's.

mod amd;
pub mod branch;
pub mod counter;
pub mod event;
mod host;
pub mod lbr;
pub mod log;
pub mod predictor;
pub mod registers;
pub mod tally;
pub mod watching;

use crate::model::{Feature, Model};
use branch::Kind;
use counter::Counter;
use lbr::{Lbr, Transfer};
use log::BranchLog;
use predictor::Predictor;
use tally::Tally;
pub use watching::Watching;

/// Bits of IA32_DEBUGCTL (SDM vol. 3, 18.4.1).
pub mod debugctl {
    pub const LBR: u64 = 1 << 0;
    pub const BTF: u64 = 1 << 1;
    pub const FREEZE_LBRS_ON_PMI: u64 = 1 << 11;
    pub const FREEZE_PERFMON_ON_PMI: u64 = 1 << 12;
    pub const FREEZE_WHILE_SMM: u64 = 1 << 14;
}

/// Bits of the local APIC's LVT entry for performance monitoring interrupts (SDM vol. 3, 11.5.1).
pub mod lvt {
    pub const MASKED: u64 = 1 << 16;
    pub const DELIVERY: u64 = 7 << 8;
    /// The interrupt has not been delivered yet; read-only for software.
    pub const PENDING: u64 = 1 << 12;
    pub const NMI: u64 = 4 << 8;
    /// Bits that can be written: vector, delivery mode, mask.
    pub const BITS: u64 = 0x1_07ff;
}

/// General counters of Intel's silicon, and fixed ones behind them.
const GENERAL: usize = 4;
const FIXED: usize = 3;
/// Counters of AMD's silicon with the core extensions, and without.
const AMD_COUNTERS: usize = 6;
const AMD_LEGACY: usize = 4;
const COUNTERS: usize = 7;

/// What the dispatcher must do for the watchers; bits of [`Pmu::watched`].
pub mod watch {
    /// Keep account of instructions.
    pub const COUNT: u8 = 1;
    /// Look at every branch.
    pub const BRANCHES: u8 = 2;
}

/// The performance monitoring unit of a core.
pub struct Pmu {
    /// Bits of [`watch`].
    pub watched: u8,
    /// What host code does for the watchers.
    pub watching: Watching,
    /// Whether the LBR stack records.
    pub recording: bool,
    /// Privilege level of the code that runs.
    pub cpl: u8,
    /// Instruction count of the core up to which `tally` is right.
    pub since: u64,
    /// Instruction count of the core before which no counter overflows.
    pub check_at: u64,
    /// A counter overflows at `check_at` and not later, whatever runs, so a block must end there.
    pub exact: bool,
    /// An overflow's interrupt waits for the next instruction boundary that can take it.
    pub interrupt: bool,
    pub tally: Tally,
    /// Mispredicted branches that host code has counted, and that are not in the tally yet.
    pub mispredicted: u64,
    pub lbr: Lbr,
    pub predictor: Predictor,
    pub log: Option<BranchLog>,
    counters: [Counter; COUNTERS],
    /// Event select registers.
    select: [u64; AMD_COUNTERS],
    fixed_control: u64,
    global_control: u64,
    global_status: u64,
    /// The host's IA32_DEBUGCTL; the guest's is in its state.
    pub host_debugctl: u64,
    pub lvtpc: u64,
    /// LVTPC of the guest that runs, if overflow interrupts are its own.
    pub virtual_lvtpc: Option<u64>,
    amd: bool,
    /// General counters that exist.
    general: usize,
    /// Fixed counters that exist.
    fixed: usize,
    has_lbr: bool,
    capabilities: Option<u64>,
    unused_address_bits: u8,
}

impl Pmu {
    /// The unit of a core of `model` after reset.
    pub fn new(model: &Model) -> Self {
        let amd = model.is_amd();
        let (general, fixed) = match (model.has(Feature::Pmu), amd) {
            (false, _) => (0, 0),
            (true, false) => (GENERAL, FIXED),
            (true, true) => (if model.has(Feature::PerfctrCore) { AMD_COUNTERS } else { AMD_LEGACY }, 0),
        };
        Pmu {
            watched: 0,
            watching: Watching::NONE,
            recording: false,
            cpl: 0,
            since: 0,
            check_at: u64::MAX,
            exact: false,
            interrupt: false,
            tally: Tally::default(),
            mispredicted: 0,
            lbr: Lbr::default(),
            predictor: Predictor::default(),
            log: None,
            counters: [Counter::default(); COUNTERS],
            select: [0; AMD_COUNTERS],
            fixed_control: 0,
            global_control: if amd { 0 } else { (1 << general) - 1 },
            global_status: 0,
            host_debugctl: 0,
            lvtpc: lvt::MASKED,
            virtual_lvtpc: None,
            amd,
            general,
            fixed,
            has_lbr: model.has(Feature::Lbr),
            capabilities: model.perf_capabilities(),
            unused_address_bits: model.unused_address_bits(),
        }
    }

    /// Whether the model has counters.
    pub fn exists(&self) -> bool {
        self.general != 0
    }

    /// Decides what to watch while a guest with this `debugctl` runs.
    pub fn choose(&mut self, debugctl: u64) {
        self.recording = self.has_lbr && debugctl & debugctl::LBR != 0 && self.global_status & registers::status::LBR_FROZEN == 0;
        let counts = self.interrupt || self.counters.iter().any(|counter| !counter.stopped());
        let branches = self.recording || self.log.is_some() || self.counters.iter().any(Counter::follows_branches);
        self.watched = if counts { watch::COUNT } else { 0 } + if branches { watch::BRANCHES } else { 0 };
        self.check_at = if counts { 0 } else { u64::MAX };
        let special = self.log.is_some() || self.recording && self.lbr.select & lbr::select::CALL_STACK != 0;
        let tally = self.counters.iter().any(Counter::follows_kinds);
        self.watching =
            if branches && !special { Watching::branches(tally, self.recording.then_some(self.lbr.select != 0)) } else { Watching::NONE };
        self.lbr.enter_level(self.cpl);
    }

    /// A VM exit, at which DEBUGCTL is cleared; AMD's silicon leaves it alone.
    pub fn leave_guest(&mut self) {
        if !self.amd {
            self.host_debugctl = 0;
        }
    }

    /// Brings the tally up to date at the core's instruction count `now`.
    #[inline]
    pub fn account(&mut self, now: u64) {
        self.tally.0[usize::from(self.cpl != 0)].instructions += now.wrapping_sub(self.since);
        self.since = now;
    }

    /// Brings the counters up to date with the tally, and requests the interrupt of one that overflowed, which may change the guest's
    /// `debugctl`. Returns whether one did.
    pub fn fold(&mut self, debugctl: &mut u64) -> bool {
        let (mut overflowed, mut interrupts) = (false, false);
        for n in 0..COUNTERS {
            if self.counters[n].fold(&self.tally) {
                overflowed = true;
                interrupts |= self.counters[n].interrupts;
                self.global_status |= self.status_bit(n);
            }
        }
        if interrupts {
            self.request_interrupt(debugctl);
        }
        overflowed
    }

    /// PRED_CMD was written: an indirect branch prediction barrier, if bit 0 is set.
    pub fn barrier(&mut self, command: u64) {
        if command & 1 != 0 {
            self.predictor.forget();
        }
    }

    fn status_bit(&self, counter: usize) -> u64 {
        match (self.amd, counter < GENERAL) {
            (true, _) => 0,
            (false, true) => 1 << counter,
            (false, false) => 1 << (32 + counter - GENERAL),
        }
    }

    /// A performance monitoring interrupt: what is to freeze freezes, then the interrupt goes through the LVT entry.
    fn request_interrupt(&mut self, debugctl: &mut u64) {
        if *debugctl & debugctl::FREEZE_LBRS_ON_PMI != 0 && self.has_lbr {
            match self.virtual_lvtpc {
                Some(_) => *debugctl &= !debugctl::LBR, // the guest's version of performance monitoring is 2
                None => self.global_status |= registers::status::LBR_FROZEN,
            }
        }
        if *debugctl & debugctl::FREEZE_PERFMON_ON_PMI != 0 {
            self.global_status |= registers::status::COUNTERS_FROZEN;
            self.configure();
        }
        self.interrupt |= match self.virtual_lvtpc {
            Some(entry) => entry & lvt::MASKED == 0,
            None => self.lvtpc & lvt::MASKED == 0,
        };
        if self.interrupt && self.virtual_lvtpc.is_none() {
            self.mask_interrupts();
        }
    }

    /// A guest with this LVT entry runs from now on.
    pub fn load_virtual_interrupt(&mut self, entry: u64) {
        self.interrupt |= entry & lvt::PENDING != 0;
        self.virtual_lvtpc = Some(entry & !lvt::PENDING);
    }

    /// It does no more: its LVT entry, where an interrupt that it has not taken is pending. None if interrupts were not its own.
    pub fn save_virtual_interrupt(&mut self) -> Option<u64> {
        let entry = self.virtual_lvtpc.take()?;
        Some(entry | if std::mem::take(&mut self.interrupt) { lvt::PENDING } else { 0 })
    }

    /// The core's interrupt is on its way: on Intel silicon it masks itself.
    pub fn mask_interrupts(&mut self) {
        if !self.amd {
            self.lvtpc |= lvt::MASKED;
        }
    }

    /// The interrupt that waits goes to the guest: tells whether it can go there at once, as an NMI; then its LVT entry masks itself.
    pub fn take_virtual_interrupt(&mut self) -> bool {
        match &mut self.virtual_lvtpc {
            Some(entry) if *entry & (lvt::MASKED | lvt::DELIVERY) == lvt::NMI => {
                *entry |= lvt::MASKED;
                true
            }
            _ => false,
        }
    }

    /// Whether the interrupt that waits is an NMI.
    pub fn is_nmi(&self) -> bool {
        self.lvtpc & lvt::DELIVERY == lvt::NMI
    }

    /// How long code at the current privilege level can run, in instructions, before a counter may overflow; and whether a block of `longest`
    /// that goes beyond would be too long for one.
    pub fn headroom(&self, longest: u64) -> (u64, bool) {
        let (mut room, mut certain) = (u64::MAX, u64::MAX);
        for counter in &self.counters {
            let Some(measure) = counter.running_at(self.cpl) else { continue };
            let left = counter.remaining();
            room = room.min(left);
            if measure.follows_instructions() {
                certain = certain.min(left);
            }
        }
        (room, certain < room.saturating_add(longest))
    }

    /// Notes a branch or an event's delivery at privilege level `cpl`; returns whether it was mispredicted, and the cycles for which it makes
    /// the core stall.
    #[inline(always)]
    pub fn retire(&mut self, kind: Kind, cpl: u8, from: u64, next: u64, to: u64, taken: bool) -> (bool, u64) {
        let wrong = self.predictor.mispredicts(kind, from, next, to, taken);
        (wrong, self.tally.add(cpl, kind, taken, wrong))
    }

    /// Records a transfer that took place in the LBR stack, when the core's instruction count is `now`.
    #[inline(always)]
    pub fn record(&mut self, transfer: &Transfer, now: u64) {
        self.lbr.record(transfer, now.wrapping_add(self.tally.stalled()));
    }
}
