//! Which instructions a CPU model has: the rest is #UD, or what the bytes meant before the instruction existed (SDM vol. 2, "CPUID
//! Feature Flag" of each instruction).

use iced_x86::{Code, CpuidFeature, DecoderOptions, Instruction, Mnemonic};

use crate::model::{Feature, Model, Silicon};

/// Options of the decoder for `model`: prefixes that it ignores because it lacks the instruction they make.
pub fn options(model: &Model) -> u32 {
    let ignored = [
        (Feature::Bmi1, DecoderOptions::NO_MPFX_0FBC),
        (Feature::Abm, DecoderOptions::NO_MPFX_0FBD),
        (Feature::Wbnoinvd, DecoderOptions::NO_WBNOINVD),
        (Feature::LahfLm, DecoderOptions::NO_LAHF_SAHF_64),
    ];
    // Near branches of 16 bits in 64-bit mode, far ones that REX.W does not widen, and LOCK MOV CR0 in place of MOV CR8.
    let vendor = if model.silicon() == Silicon::Amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
    ignored.into_iter().filter(|(feature, _)| !model.has(*feature)).fold(vendor, |options, (_, option)| options | option)
}

/// Whether `model` has `insn`.
pub fn offers(model: &Model, insn: &Instruction) -> bool {
    if model.silicon() == Silicon::Amd && is_prefetch_of_register(insn.code()) {
        return false;
    }
    is_hint(insn.mnemonic())
        || insn.cpuid_features().iter().all(|feature| match need(*feature) {
            Need::Nothing => true,
            Need::One(feature) => model.has(feature),
            Need::Unknown => false,
        })
}

/// 0F 0D with a register: a NOP to Intel's silicon alone.
fn is_prefetch_of_register(code: Code) -> bool {
    matches!(code, Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D)
}

/// Instructions in the space of hints, which CPUs that do not know them execute as NOP.
fn is_hint(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Prefetch | Prefetchw | Prefetchwt1 | Prefetchit0 | Prefetchit1 | Endbr32 | Endbr64 | Rdsspd | Rdsspq | Cldemote | Reservednop
    )
}

/// What an instruction asks of a model.
enum Need {
    Nothing,
    One(Feature),
    /// A feature that no model has.
    Unknown,
}

/// The decoder's name of a feature in ours.
fn need(feature: CpuidFeature) -> Need {
    use CpuidFeature::*;
    Need::One(match feature {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | CPUID | MULTIBYTENOP | PAUSE | RDPMC | SMM | SMX => return Need::Nothing,
        // A guest runs under a hypervisor, so its CPU always has these; their handlers tell what becomes of them.
        VMX | INVEPT | INVVPID | SVM | SKINIT | SKINIT_or_SVM | SEV_ES => return Need::Nothing,
        X64 => Feature::Lm,
        FPU | FPU287 | FPU387 => Feature::Fpu,
        TSC => Feature::Tsc,
        MSR => Feature::Msr,
        CX8 => Feature::Cx8,
        CMOV => Feature::Cmov,
        SEP => Feature::Sep,
        SYSCALL => Feature::Syscall,
        FXSR => Feature::Fxsr,
        MMX => Feature::Mmx,
        SSE => Feature::Sse,
        SSE2 => Feature::Sse2,
        SSE3 => Feature::Sse3,
        SSSE3 => Feature::Ssse3,
        SSE4_1 => Feature::Sse41,
        SSE4_2 => Feature::Sse42,
        SSE4A => Feature::Sse4a,
        AES => Feature::Aes,
        PCLMULQDQ => Feature::Pclmulqdq,
        SHA => Feature::ShaNi,
        AVX => Feature::Avx,
        AVX2 => Feature::Avx2,
        FMA => Feature::Fma,
        F16C => Feature::F16c,
        AVX512F => Feature::Avx512f,
        AVX512DQ => Feature::Avx512dq,
        AVX512CD => Feature::Avx512cd,
        AVX512BW => Feature::Avx512bw,
        AVX512VL => Feature::Avx512vl,
        AVX512_VNNI => Feature::Avx512Vnni,
        POPCNT => Feature::Popcnt,
        LZCNT => Feature::Abm,
        BMI1 => Feature::Bmi1,
        BMI2 => Feature::Bmi2,
        ADX => Feature::Adx,
        MOVBE => Feature::Movbe,
        MOVDIRI => Feature::Movdiri,
        MOVDIR64B => Feature::Movdir64b,
        CMPXCHG16B => Feature::Cx16,
        XSAVE => Feature::Xsave,
        XSAVEOPT => Feature::Xsaveopt,
        XSAVEC => Feature::Xsavec,
        XSAVES => Feature::Xsaves,
        CLFSH => Feature::Clflush,
        CLFLUSHOPT => Feature::Clflushopt,
        CLWB => Feature::Clwb,
        CLZERO => Feature::Clzero,
        WBNOINVD => Feature::Wbnoinvd,
        FSGSBASE => Feature::Fsgsbase,
        INVPCID => Feature::Invpcid,
        SMAP => Feature::Smap,
        PKU => Feature::Pku,
        MONITOR => Feature::Monitor,
        MONITORX => Feature::Mwaitx,
        RDRAND => Feature::Rdrand,
        RDSEED => Feature::Rdseed,
        RDTSCP => Feature::Rdtscp,
        RDPID => Feature::Rdpid,
        RDPRU => Feature::Rdpru,
        SERIALIZE => Feature::Serialize,
        RTM | HLE_or_RTM => Feature::Rtm,
        _ => return Need::Unknown,
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::Decoder;

    use super::*;

    fn decoded(model: &Model, bytes: &[u8]) -> (Mnemonic, bool) {
        let insn = Decoder::with_ip(64, bytes, 0, options(model)).decode();
        (insn.mnemonic(), offers(model, &insn))
    }

    fn without(name: &str) -> Model {
        Model::new("cascadelake", &[(name.to_owned(), false)]).unwrap()
    }

    #[test]
    fn an_instruction_needs_its_feature() {
        let popcnt = [0xf3, 0x0f, 0xb8, 0xc0];
        assert_eq!(decoded(&Model::default(), &popcnt), (Mnemonic::Popcnt, true));
        assert_eq!(decoded(&without("popcnt"), &popcnt), (Mnemonic::Popcnt, false));
        // SHA1RNDS4 is AMD's and later Intel's; XBEGIN needs RTM, which no model offers.
        assert!(!decoded(&Model::default(), &[0x0f, 0x3a, 0xcc, 0xc0, 0]).1);
        assert!(!decoded(&Model::default(), &[0xc7, 0xf8, 0, 0, 0, 0]).1);
    }

    #[test]
    fn prefixes_without_their_instruction_are_ignored() {
        let (tzcnt, lzcnt) = ([0xf3, 0x0f, 0xbc, 0xc0], [0xf3, 0x0f, 0xbd, 0xc0]);
        assert_eq!(decoded(&Model::default(), &tzcnt), (Mnemonic::Tzcnt, true));
        assert_eq!(decoded(&without("bmi1"), &tzcnt), (Mnemonic::Bsf, true));
        assert_eq!(decoded(&without("abm"), &lzcnt), (Mnemonic::Bsr, true));
    }

    #[test]
    fn hints_stay_hints() {
        for hint in [&[0x0f, 0x0d, 0x08][..], &[0xf3, 0x0f, 0x1e, 0xfa], &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], &[0x0f, 0x18, 0x00]] {
            assert!(decoded(&without("3dnowprefetch"), hint).1, "{hint:02x?}");
        }
    }
}
