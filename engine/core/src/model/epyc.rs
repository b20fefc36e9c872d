//! AMD EPYC, Rome: family 23, model 49, stepping 0 (layout of the leaves: APM vol. 3, app. E).
//!
//! Caches and TLBs are a plausible part's, not a certain one's: nothing in a guest may depend on them.

use super::{Cache, Feature, Part};

pub const PART: Part = Part {
    name: "epyc",
    amd: true,
    signature: 0x0083_0f10,
    brand: "softkvm CPU (AMD EPYC, Rome)",
    highest_basic: 0x10,
    highest_extended: 0x8000_0021,
    features: FEATURES,
    added: ADDED,
    caches: CACHES,
    constants: &[
        // L1 TLBs, then L1 caches: 32 KB, 8 ways, 64-byte lines.
        (0x8000_0005, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]),
        // L2 TLBs, L2 of 512 KB with 8 ways, L3 of 16 MB with 16 ways.
        (0x8000_0006, [0x4800_6400, 0x6800_6400, 0x0200_6140, 0x0080_9140]),
        // MONITOR lines of 64 bytes; C-states of MWAIT.
        (0x5, [0x40, 0x40, 3, 0x11]),
        // TLBs for 1 GB pages.
        (0x8000_0019, [0xf040_f040, 0xf040_0000, 0, 0]),
        // Unaligned SSE loads are as fast as aligned ones.
        (0x8000_001a, [0x2, 0, 0, 0]),
    ],
    msrs: &[
        (0x8b, 0x0830_107c),        // PATCH_LEVEL: microcode revision
        (0xc001_0010, 0),           // SYSCFG: no memory encryption, no TOP_MEM2
        (0xc001_0015, 1 | 1 << 24), // HWCR: SMM locked, the TSC counts at P0 frequency
        (0xc001_001f, 0),           // NB_CFG
        (0xc001_0055, 0),           // INT_PENDING: no C1E
        (0xc001_0114, 0),           // VM_CR: SVM neither locked nor disabled
        (0xc001_0117, 0),           // VM_HSAVE_PA
        (0xc001_1020, 0),           // LS_CFG
        (0xc001_1022, 0),           // DC_CFG
        (0xc001_1029, 1 << 1),      // DE_CFG: LFENCE waits for everything before it
    ],
};

#[rustfmt::skip]
const FEATURES: &[Feature] = {
    use Feature::*;
    &[
        Fpu, Vme, De, Pse, Tsc, Msr, Pae, Mce, Cx8, Apic, Sep, Mtrr, Pge, Mca, Cmov, Pat, Pse36, Clflush, Mmx, Fxsr, Sse, Sse2, Ht, Sse3,
        Pclmulqdq, Monitor, Ssse3, Fma, Cx16, Sse41, Sse42, X2apic, Movbe, Popcnt, Aes, Xsave, Avx, F16c, Rdrand, Arat, Aperfmperf,
        Fsgsbase, Bmi1, Avx2, Smep, Bmi2, Cqm, RdtA, Rdseed, Adx, Smap, Clflushopt, Clwb, ShaNi, Umip, Rdpid, Xsaveopt, Xsavec, Xgetbv1,
        Xsaves, Syscall, Nx, Mmxext, FxsrOpt, Pdpe1gb, Rdtscp, Lm, LahfLm, CmpLegacy, Svm, Extapic, Cr8Legacy, Abm, Sse4a, MisalignSse,
        Prefetchw, Osvw, Ibs, Skinit, Wdt, Topoext, PerfctrCore, PerfctrNb, Bpext, PerfctrLlc, Mwaitx, Invtsc, Clzero, Irperf, Xsaveerptr,
        Rdpru, Wbnoinvd, AmdIbpb, AmdIbrs, AmdStibp, AmdSsbd, Npt, Lbrv, NripSave, TscScale, VmcbClean, FlushByAsid, DecodeAssists,
        PauseFilter, PfThreshold, Avic, VVmsaveVmload, Vgif, Pmu,
    ]
};

/// Later parts have these, or KVM offers them on this one. The engine does not speculate, and says so.
#[rustfmt::skip]
const ADDED: &[Feature] = {
    use Feature::*;
    &[
        Pcid, Invpcid, Erms, Fsrm, Serialize, TscAdjust, TscDeadline, ArchCapabilities, SpecCtrl, AmdSsbNo, BtcNo, SrsoNo,
        LfenceSerializing,
    ]
};

/// The caches of one core and its slice of the last level.
const CACHES: &[Cache] = &[
    Cache { kind: 1, level: 1, ways: 8, sets: 64, properties: 0 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, properties: 0 },
    Cache { kind: 3, level: 2, ways: 8, sets: 1024, properties: 2 },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384, properties: 1 },
];
