//! Intel Xeon, Cascade Lake: family 6, model 85, stepping 7 (layout of the leaves: SDM vol. 2, CPUID).
//!
//! Caches and TLBs are a plausible part's, not a certain one's: nothing in a guest may depend on them.

use super::{Cache, Feature, Part};

pub const PART: Part = Part {
    name: "cascadelake",
    amd: false,
    signature: 0x0005_0657,
    brand: "softkvm CPU (Intel Xeon, Cascade Lake)",
    highest_basic: 0x16,
    highest_extended: 0x8000_0008,
    features: FEATURES,
    added: ADDED,
    caches: CACHES,
    constants: &[
        // One-byte cache and TLB descriptors; FF refers to leaf 4.
        (0x2, [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000]),
        // MONITOR lines of 64 bytes; C-states of MWAIT.
        (0x5, [0x40, 0x40, 3, 0x2020]),
        // L2: 1 MB, eight ways as the leaf's encoding can say, 64-byte lines.
        (0x8000_0006, [0, 0, 0x0100_6040, 0]),
    ],
    msrs: &[
        (0x3a, 1),                      // FEATURE_CONTROL: locked, VMX off
        (0x8b, 0x0500_3604 << 32),      // BIOS_SIGN_ID: microcode revision
        (0x34, 0),                      // SMI_COUNT
        (0x17, 0),                      // PLATFORM_ID
        (0x140, 0),                     // MISC_FEATURES_ENABLES
        (0x1a0, 1 | 1 << 11 | 1 << 12), // MISC_ENABLE: fast strings; branch trace and PEBS unavailable
    ],
};

#[rustfmt::skip]
const FEATURES: &[Feature] = {
    use Feature::*;
    &[
        Fpu, Vme, De, Pse, Tsc, Msr, Pae, Mce, Cx8, Apic, Sep, Mtrr, Pge, Mca, Cmov, Pat, Pse36, Clflush, Dts, Acpi, Mmx, Fxsr, Sse, Sse2,
        SelfSnoop, Ht, Tm, Pbe, Sse3, Pclmulqdq, Dtes64, Monitor, DsCpl, Vmx, Smx, Est, Tm2, Ssse3, Sdbg, Fma, Cx16, Xtpr, Pdcm, Pcid, Dca,
        Sse41, Sse42, X2apic, Movbe, Popcnt, TscDeadline, Aes, Xsave, Avx, F16c, Rdrand, Dtherm, Ida, Arat, Pln, Pts, Hwp, Aperfmperf, Epb,
        Fsgsbase, TscAdjust, Bmi1, Hle, Avx2, FdpExcptnOnly, Smep, Bmi2, Erms, Invpcid, Rtm, Cqm, ZeroFcsFds, Mpx, RdtA, Avx512f, Avx512dq,
        Rdseed, Adx, Smap, Clflushopt, Clwb, IntelPt, Avx512cd, Avx512bw, Avx512vl, Pku, Avx512Vnni, MdClear, SpecCtrl, Stibp, FlushL1d,
        ArchCapabilities, Ssbd, Xsaveopt, Xsavec, Xgetbv1, Xsaves, Syscall, Nx, Pdpe1gb, Rdtscp, Lm, LahfLm, Abm, Prefetchw, Invtsc,
        Pmu, Lbr,
    ]
};

/// Later Xeons have these. They spare a guest work: SERIALIZE an IRET per code patch, FSRM a table-driven copy, BHI_CTRL a loop of 110
/// instructions in each system call, which Linux runs on a virtual Intel CPU without it, whatever ARCH_CAPABILITIES says.
#[rustfmt::skip]
const ADDED: &[Feature] =
    &[Feature::Umip, Feature::Rdpid, Feature::Fsrm, Feature::Serialize, Feature::Movdiri, Feature::Movdir64b, Feature::BhiCtrl];

/// The caches of one core and its slice of the last level.
const CACHES: &[Cache] = &[
    Cache { kind: 1, level: 1, ways: 8, sets: 64, properties: 0 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, properties: 0 },
    Cache { kind: 3, level: 2, ways: 16, sets: 1024, properties: 0 },
    Cache { kind: 3, level: 3, ways: 11, sets: 2048, properties: 4 },
];
