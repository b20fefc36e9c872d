//! MSR values of a model: what software reads there after reset (SDM vol. 4; APM vol. 2, app. A).

use std::collections::BTreeMap;

use super::{Feature, Model};

/// Indices of the MSRs that every model or the engine itself knows.
pub mod index {
    pub const TSC: u32 = 0x10;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRRCAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const PERF_CAPABILITIES: u32 = 0x345;
    pub const PKRS: u32 = 0x6e1;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// PAT after reset: WB, WT, UC-, UC, twice (SDM vol. 3, table 12-12).
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// MTRRCAP: eight variable ranges, fixed ranges, write-combining.
const MTRRCAP: u64 = 8 | 1 << 8 | 1 << 10;

/// ARCH_CAPABILITIES: an engine that executes nothing speculatively has none of the flaws that the register lists.
const ARCH_CAPABILITIES: u64 = 1 << 0 // RDCL_NO
    | 1 << 1 // IBRS_ALL
    | 1 << 3 // SKIP_L1DFL_VMENTRY
    | 1 << 4 // SSB_NO
    | 1 << 5 // MDS_NO
    | 1 << 6 // PSCHANGE_MC_NO
    | 1 << 8 // TAA_NO
    | 1 << 13 // SBDR_SSDP_NO
    | 1 << 14 // FBSDP_NO
    | 1 << 15 // PSDP_NO
    | 1 << 20 // BHI_NO
    | 1 << 24 // PBRSB_NO
    | 1 << 26 // GDS_NO
    | 1 << 27 // RFDS_NO
    | 1 << 62; // ITS_NO

impl Model {
    /// MSR values of the model, by index.
    pub fn msrs(&self) -> BTreeMap<u32, u64> {
        let mut msrs: BTreeMap<u32, u64> = self.part.msrs.iter().copied().collect();
        msrs.insert(index::PAT, PAT_RESET);
        msrs.insert(index::MTRRCAP, MTRRCAP);
        msrs.insert(index::MCG_CAP, 0);
        if self.has(Feature::ArchCapabilities) {
            msrs.insert(index::ARCH_CAPABILITIES, ARCH_CAPABILITIES);
        }
        if !self.is_amd() {
            msrs.insert(index::PLATFORM_INFO, self.platform_info());
        }
        msrs.extend(self.perf_capabilities().map(|value| (index::PERF_CAPABILITIES, value)));
        msrs
    }

    /// PERF_CAPABILITIES: the format of branch records, freezing in SMM, counters that can be written as a whole.
    pub fn perf_capabilities(&self) -> Option<u64> {
        const LBR_FORMAT_INFO: u64 = 5;
        const FREEZE_WHILE_SMM: u64 = 1 << 12;
        const FULL_WIDTH_WRITES: u64 = 1 << 13;
        let records = if self.has(Feature::Lbr) { LBR_FORMAT_INFO } else { 0 };
        let counters = if self.has(Feature::Pmu) { FULL_WIDTH_WRITES } else { 0 };
        (self.has(Feature::Pdcm) && !self.is_amd()).then_some(records | FREEZE_WHILE_SMM | counters)
    }

    /// PLATFORM_INFO: the ratio of TSC to the 100 MHz bus clock, as the highest and as the lowest that the part runs at.
    fn platform_info(&self) -> u64 {
        let ratio = ((self.tsc_khz() + 50_000) / 100_000) & 0xff;
        ratio << 8 | ratio << 40
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mitigation_facts_follow_the_feature() {
        let msrs = Model::default().msrs();
        assert_eq!(msrs[&index::ARCH_CAPABILITIES] & 3, 3);
        assert_eq!(msrs[&index::PLATFORM_INFO] >> 8 & 0xff, msrs[&index::PLATFORM_INFO] >> 40 & 0xff);
        let without = Model::new("cascadelake", &[("arch-capabilities".to_owned(), false)]).unwrap();
        assert!(!without.msrs().contains_key(&index::ARCH_CAPABILITIES));
    }

    #[test]
    fn amd_has_its_own_registers() {
        let msrs = Model::new("epyc", &[]).unwrap().msrs();
        assert_eq!(msrs[&0xc001_1029], 2);
        assert!(!msrs.contains_key(&index::PLATFORM_INFO));
    }
}
