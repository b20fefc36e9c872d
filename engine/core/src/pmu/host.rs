//! The host's side of the PMU: its RDMSR and WRMSR between two runs of a guest, and the branch log. `softkvm/silicon/pmu.py` describes it.

use super::log::{BranchLog, Filter};
use super::lvt;
use super::registers::{debugctl_bits, index::X2APIC_LVTPC, Refused};
use crate::model::msrs::index::{DEBUGCTL, PRED_CMD};
use crate::virt::entry::Core;

impl Core {
    /// Reads an MSR of the core's PMU as the host does.
    pub fn pmu_read(&self, index: u32) -> Result<u64, Refused> {
        let pmu = &self.cpu.pmu;
        match index {
            DEBUGCTL => Ok(pmu.host_debugctl),
            X2APIC_LVTPC => Ok(pmu.lvtpc),
            _ => pmu.read(index),
        }
    }

    /// Writes one as the host does.
    pub fn pmu_write(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        let pmu = &mut self.cpu.pmu;
        let allowed = match index {
            DEBUGCTL => debugctl_bits(pmu),
            X2APIC_LVTPC => lvt::BITS,
            PRED_CMD => 1,
            _ => return pmu.write(index, value),
        };
        if value & !allowed != 0 {
            return Err(Refused);
        }
        match index {
            DEBUGCTL => pmu.host_debugctl = value,
            X2APIC_LVTPC => pmu.lvtpc = value,
            _ => pmu.barrier(value),
        }
        Ok(())
    }

    /// Starts a branch log of at most `capacity` records; one that was on is lost.
    pub fn branch_log_start(&mut self, capacity: usize, filter: Filter) {
        self.cpu.pmu.log = Some(BranchLog::new(capacity, filter));
    }

    /// Takes the records of the branch log out; none while there is no log.
    pub fn branch_log_read(&mut self) -> Vec<u8> {
        self.cpu.pmu.log.as_mut().map_or(Vec::new(), BranchLog::take)
    }

    /// Ends the branch log.
    pub fn branch_log_stop(&mut self) {
        self.cpu.pmu.log = None;
    }

    /// Records that the log had no room for.
    pub fn branches_lost(&self) -> u64 {
        self.cpu.pmu.log.as_ref().map_or(0, |log| log.lost)
    }
}
