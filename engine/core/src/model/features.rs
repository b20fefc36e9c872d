//! CPU features by name: where CPUID announces each, and whether the engine implements it (SDM vol. 2, CPUID; APM vol. 3, app. E).
//!
//! Performance monitoring and LBR have no bit of their own; their leaf in the table is one that no software asks for.
//! Names are those of Linux and QEMU; `_`, `-` and `.` are the same letter.

/// Registers of a CPUID answer, as indices.
pub mod register {
    pub const EAX: usize = 0;
    pub const EBX: usize = 1;
    pub const ECX: usize = 2;
    pub const EDX: usize = 3;
}

use register::{EAX, EBX, ECX, EDX};

/// What the table knows about a feature.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    pub feature: Feature,
    pub name: &'static str,
    pub leaf: u32,
    pub subleaf: u32,
    pub register: usize,
    pub bit: u32,
    /// Whether the engine can execute what the feature promises.
    pub implemented: bool,
}

impl Info {
    /// Whether the engine offers the feature: where the host's own units compute, they need fused multiply-add and half precision.
    pub fn available(&self) -> bool {
        self.implemented && has_unit(self.feature)
    }
}

/// Whether what computes floating point ([`crate::exec::float`]) can do what the feature promises.
#[cfg(all(target_arch = "x86_64", not(feature = "soft-float")))]
fn has_unit(feature: Feature) -> bool {
    match feature {
        Feature::Fma => std::arch::is_x86_feature_detected!("fma"),
        Feature::F16c => std::arch::is_x86_feature_detected!("f16c"),
        _ => true,
    }
}

#[cfg(not(all(target_arch = "x86_64", not(feature = "soft-float"))))]
fn has_unit(_feature: Feature) -> bool {
    true
}

macro_rules! features {
    ($($leaf:literal . $subleaf:literal $register:ident { $($bit:literal $feature:ident $name:literal $implemented:ident),+ $(,)? })+) => {
        /// A feature that CPUID announces.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Feature {
            $($(#[doc = $name] $feature,)+)+
        }

        /// Every feature, in the order of [`Feature`].
        pub const TABLE: &[Info] = &[
            $($(Info {
                feature: Feature::$feature,
                name: $name,
                leaf: $leaf,
                subleaf: $subleaf,
                register: $register,
                bit: $bit,
                implemented: features!(@ $implemented),
            },)+)+
        ];
    };
    (@ yes) => { true };
    (@ no) => { false };
}

features! {
    0x1 . 0 EDX {
        0 Fpu "fpu" yes, 1 Vme "vme" no, 2 De "de" yes, 3 Pse "pse" yes, 4 Tsc "tsc" yes, 5 Msr "msr" yes, 6 Pae "pae" yes,
        7 Mce "mce" yes, 8 Cx8 "cx8" yes, 9 Apic "apic" yes, 11 Sep "sep" yes, 12 Mtrr "mtrr" yes, 13 Pge "pge" yes,
        14 Mca "mca" yes, 15 Cmov "cmov" yes, 16 Pat "pat" yes, 17 Pse36 "pse36" yes, 19 Clflush "clflush" yes, 21 Dts "ds" no,
        22 Acpi "acpi" no, 23 Mmx "mmx" yes, 24 Fxsr "fxsr" yes, 25 Sse "sse" yes, 26 Sse2 "sse2" yes, 27 SelfSnoop "ss" yes,
        28 Ht "ht" no, 29 Tm "tm" no, 31 Pbe "pbe" no,
    }
    0x1 . 0 ECX {
        0 Sse3 "pni" yes, 1 Pclmulqdq "pclmulqdq" yes, 2 Dtes64 "dtes64" no, 3 Monitor "monitor" yes, 4 DsCpl "ds-cpl" no,
        5 Vmx "vmx" no, 6 Smx "smx" no, 7 Est "est" no, 8 Tm2 "tm2" no, 9 Ssse3 "ssse3" yes, 11 Sdbg "sdbg" no, 12 Fma "fma" yes,
        13 Cx16 "cx16" yes, 14 Xtpr "xtpr" no, 15 Pdcm "pdcm" yes, 17 Pcid "pcid" yes, 18 Dca "dca" no, 19 Sse41 "sse4.1" yes,
        20 Sse42 "sse4.2" yes, 21 X2apic "x2apic" yes, 22 Movbe "movbe" yes, 23 Popcnt "popcnt" yes,
        24 TscDeadline "tsc-deadline" yes, 25 Aes "aes" yes, 26 Xsave "xsave" yes, 28 Avx "avx" yes, 29 F16c "f16c" yes,
        30 Rdrand "rdrand" yes,
    }
    0x6 . 0 EAX {
        0 Dtherm "dtherm" no, 1 Ida "ida" no, 2 Arat "arat" yes, 4 Pln "pln" no, 6 Pts "pts" no, 7 Hwp "hwp" no,
    }
    0x6 . 0 ECX {
        0 Aperfmperf "aperfmperf" no, 3 Epb "epb" no,
    }
    0x7 . 0 EBX {
        0 Fsgsbase "fsgsbase" yes, 1 TscAdjust "tsc-adjust" yes, 2 Sgx "sgx" no, 3 Bmi1 "bmi1" yes, 4 Hle "hle" no, 5 Avx2 "avx2" yes,
        6 FdpExcptnOnly "fdp-excptn-only" no, 7 Smep "smep" yes, 8 Bmi2 "bmi2" yes, 9 Erms "erms" yes, 10 Invpcid "invpcid" yes,
        11 Rtm "rtm" no, 12 Cqm "cqm" no, 13 ZeroFcsFds "zero-fcs-fds" yes, 14 Mpx "mpx" no, 15 RdtA "rdt-a" no, 16 Avx512f "avx512f" no,
        17 Avx512dq "avx512dq" no, 18 Rdseed "rdseed" yes, 19 Adx "adx" yes, 20 Smap "smap" yes, 23 Clflushopt "clflushopt" yes,
        24 Clwb "clwb" yes, 25 IntelPt "intel-pt" no, 28 Avx512cd "avx512cd" no, 29 ShaNi "sha-ni" yes, 30 Avx512bw "avx512bw" no,
        31 Avx512vl "avx512vl" no,
    }
    0x7 . 0 ECX {
        2 Umip "umip" yes, 3 Pku "pku" yes, 11 Avx512Vnni "avx512-vnni" no, 16 La57 "la57" yes, 22 Rdpid "rdpid" yes,
        25 Cldemote "cldemote" yes, 27 Movdiri "movdiri" yes, 28 Movdir64b "movdir64b" yes, 31 Pks "pks" yes,
    }
    0x7 . 0 EDX {
        4 Fsrm "fsrm" yes, 10 MdClear "md-clear" yes, 14 Serialize "serialize" yes, 26 SpecCtrl "spec-ctrl" yes, 27 Stibp "stibp" yes,
        28 FlushL1d "flush-l1d" no, 29 ArchCapabilities "arch-capabilities" yes, 31 Ssbd "ssbd" yes,
    }
    0x7 . 2 EDX {
        4 BhiCtrl "bhi-ctrl" yes,
    }
    0xd . 1 EAX {
        0 Xsaveopt "xsaveopt" yes, 1 Xsavec "xsavec" yes, 2 Xgetbv1 "xgetbv1" yes, 3 Xsaves "xsaves" yes,
    }
    0x8000_0001 . 0 EDX {
        11 Syscall "syscall" yes, 20 Nx "nx" yes, 22 Mmxext "mmxext" yes, 25 FxsrOpt "fxsr-opt" no, 26 Pdpe1gb "pdpe1gb" yes,
        27 Rdtscp "rdtscp" yes, 29 Lm "lm" yes,
    }
    0x8000_0001 . 0 ECX {
        0 LahfLm "lahf-lm" yes, 1 CmpLegacy "cmp-legacy" no, 2 Svm "svm" yes, 3 Extapic "extapic" no, 4 Cr8Legacy "cr8legacy" no,
        5 Abm "abm" yes, 6 Sse4a "sse4a" no, 7 MisalignSse "misalignsse" no, 8 Prefetchw "3dnowprefetch" yes, 9 Osvw "osvw" no,
        10 Ibs "ibs" no, 12 Skinit "skinit" no, 13 Wdt "wdt" no, 22 Topoext "topoext" yes, 23 PerfctrCore "perfctr-core" yes,
        24 PerfctrNb "perfctr-nb" no, 26 Bpext "bpext" no, 28 PerfctrLlc "perfctr-llc" no, 29 Mwaitx "mwaitx" no,
    }
    0x8000_0007 . 0 EDX {
        8 Invtsc "invtsc" yes,
    }
    0x8000_0008 . 0 EBX {
        0 Clzero "clzero" no, 1 Irperf "irperf" no, 2 Xsaveerptr "xsaveerptr" no, 4 Rdpru "rdpru" no, 9 Wbnoinvd "wbnoinvd" no,
        12 AmdIbpb "ibpb" yes, 14 AmdIbrs "ibrs" yes, 15 AmdStibp "amd-stibp" yes, 24 AmdSsbd "amd-ssbd" yes, 26 AmdSsbNo "amd-ssb-no" yes,
        29 BtcNo "btc-no" yes,
    }
    0x8000_000a . 0 EDX {
        0 Npt "npt" yes, 1 Lbrv "lbrv" no, 3 NripSave "nrip-save" yes, 4 TscScale "tsc-scale" yes, 5 VmcbClean "vmcb-clean" no,
        6 FlushByAsid "flushbyasid" no, 7 DecodeAssists "decodeassists" no, 10 PauseFilter "pause-filter" no, 12 PfThreshold "pfthreshold" no,
        13 Avic "avic" no, 15 VVmsaveVmload "v-vmsave-vmload" no, 16 Vgif "vgif" no,
    }
    0x8000_0021 . 0 EAX {
        2 LfenceSerializing "lfence-always-serializing" yes, 6 NullSelectorClearsBase "null-sel-clr-base" no, 29 SrsoNo "srso-no" yes,
    }
    0xffff_ffff . 0 EAX {
        0 Pmu "pmu" yes, 1 Lbr "lbr" yes,
    }
}

/// What each feature (left) builds on (right): without the right one, the left one does not exist either.
pub const NEEDS: &[(Feature, Feature)] = &[
    (Feature::Sse, Feature::Fxsr),
    (Feature::Sse2, Feature::Sse),
    (Feature::Sse3, Feature::Sse2),
    (Feature::Ssse3, Feature::Sse3),
    (Feature::Sse41, Feature::Ssse3),
    (Feature::Sse42, Feature::Sse41),
    (Feature::Aes, Feature::Sse2),
    (Feature::Pclmulqdq, Feature::Sse2),
    (Feature::Mmxext, Feature::Mmx),
    (Feature::Xsaveopt, Feature::Xsave),
    (Feature::Xsavec, Feature::Xsave),
    (Feature::Xgetbv1, Feature::Xsave),
    (Feature::Xsaves, Feature::Xsavec),
    (Feature::Avx, Feature::Xsave),
    (Feature::Avx2, Feature::Avx),
    (Feature::Pku, Feature::Xsave),
    (Feature::Pku, Feature::Lm),
    (Feature::Pks, Feature::Lm),
    (Feature::Fma, Feature::Avx),
    (Feature::F16c, Feature::Avx),
    (Feature::Avx512f, Feature::Avx2),
    (Feature::Avx512dq, Feature::Avx512f),
    (Feature::Avx512cd, Feature::Avx512f),
    (Feature::Avx512bw, Feature::Avx512f),
    (Feature::Avx512vl, Feature::Avx512f),
    (Feature::Avx512Vnni, Feature::Avx512f),
    (Feature::BhiCtrl, Feature::SpecCtrl),
    (Feature::X2apic, Feature::Apic),
    (Feature::TscDeadline, Feature::Apic),
    (Feature::Invtsc, Feature::Tsc),
    (Feature::Rdtscp, Feature::Tsc),
    (Feature::Pcid, Feature::Pae),
    (Feature::Lm, Feature::Pae),
    (Feature::Pdpe1gb, Feature::Lm),
    (Feature::La57, Feature::Lm),
    (Feature::Syscall, Feature::Msr),
    (Feature::Npt, Feature::Svm),
    (Feature::NripSave, Feature::Svm),
    (Feature::TscScale, Feature::Svm),
    (Feature::PerfctrCore, Feature::Pmu),
    (Feature::Lbr, Feature::Pmu),
    (Feature::Lbr, Feature::Pdcm),
];

impl Feature {
    /// The feature's table entry.
    pub fn info(self) -> &'static Info {
        &TABLE[self as usize]
    }

    /// Name in Linux's or QEMU's spelling.
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// The feature called `name`.
    pub fn by_name(name: &str) -> Option<Feature> {
        let wanted = canonical_name(name);
        TABLE.iter().find(|info| canonical_name(info.name) == wanted).map(|info| info.feature)
    }
}

/// `name` with every separator written as `-`.
fn canonical_name(name: &str) -> String {
    name.trim().to_ascii_lowercase().replace(['_', '.'], "-")
}

/// A set of features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FeatureSet([u64; 4]);

const _: () = assert!(TABLE.len() <= 256);

impl FeatureSet {
    #[inline]
    pub fn contains(&self, feature: Feature) -> bool {
        self.0[feature as usize / 64] >> (feature as usize % 64) & 1 != 0
    }

    pub fn insert(&mut self, feature: Feature) {
        self.0[feature as usize / 64] |= 1 << (feature as usize % 64);
    }

    pub fn remove(&mut self, feature: Feature) {
        self.0[feature as usize / 64] &= !(1 << (feature as usize % 64));
    }

    /// The features of the set, in table order.
    pub fn iter(&self) -> impl Iterator<Item = &'static Info> + '_ {
        TABLE.iter().filter(|info| self.contains(info.feature))
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> Self {
        let mut set = FeatureSet::default();
        features.into_iter().for_each(|feature| set.insert(feature));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_and_places_are_unique() {
        let names: HashSet<_> = TABLE.iter().map(|info| canonical_name(info.name)).collect();
        let places: HashSet<_> = TABLE.iter().map(|info| (info.leaf, info.subleaf, info.register, info.bit)).collect();
        assert_eq!((names.len(), places.len()), (TABLE.len(), TABLE.len()));
    }

    #[test]
    fn separators_do_not_matter() {
        assert_eq!(Feature::by_name("TSC_deadline"), Some(Feature::TscDeadline));
        assert_eq!(Feature::by_name("sse4_2"), Some(Feature::Sse42));
        assert_eq!(Feature::by_name("sse5"), None);
    }

    #[test]
    fn sets_hold_what_was_put_in() {
        let mut set: FeatureSet = [Feature::Fpu, Feature::SrsoNo].into_iter().collect();
        assert!(set.contains(Feature::SrsoNo) && !set.contains(Feature::Pcid));
        set.remove(Feature::Fpu);
        assert_eq!(set.iter().map(|info| info.name).collect::<Vec<_>>(), ["srso-no"]);
    }
}
