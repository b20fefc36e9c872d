//! Which vector instructions become host code: SSE to SSE4.2, AES, PCLMULQDQ, SHA, AVX, AVX2, FMA and F16C (SDM vol. 1, ch. 10 to 14).
//!
//! The host's instruction is the guest's, with the memory operand where the TLB has it: a vector register of the guest is in the host's of
//! the same number (see [`super::vector_registers`]). What the host's processor lacks, and what may touch memory that it does not name
//! whole, is the interpreter's.

use std::arch::is_x86_feature_detected;

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// How much of the vector registers an instruction works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Width {
    /// XMM registers; what is above them keeps its value.
    Xmm = 1,
    /// YMM registers, if only to clear their upper halves.
    Ymm = 2,
}

/// What instructions work on besides the general registers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Units {
    pub vectors: Option<Width>,
    pub x87: bool,
}

impl Units {
    pub fn any(self) -> bool {
        self != Units::default()
    }

    /// What instructions with `self` and one with `other` work on together.
    pub fn and(self, other: Units) -> Units {
        Units { vectors: self.vectors.max(other.vectors), x87: self.x87 || other.x87 }
    }
}

/// The extensions that matter here, with what the standard library calls them.
macro_rules! extensions {
    ($($feature:ident $name:tt),+ $(,)?) => {
        const EXTENSIONS: [(CpuidFeature, fn() -> bool); [$($name),+].len()] =
            [$((CpuidFeature::$feature, || is_x86_feature_detected!($name))),+];
    };
}

extensions! {
    SSE "sse",
    SSE2 "sse2",
    SSE3 "sse3",
    SSSE3 "ssse3",
    SSE4_1 "sse4.1",
    SSE4_2 "sse4.2",
    AES "aes",
    PCLMULQDQ "pclmulqdq",
    SHA "sha",
    AVX "avx",
    AVX2 "avx2",
    FMA "fma",
    F16C "f16c",
}

/// Extensions that the host's processor has: bits by place in the table.
#[derive(Clone, Copy)]
pub struct Extensions(u32);

impl Extensions {
    pub fn of_host() -> Self {
        Extensions(EXTENSIONS.iter().filter(|(_, detected)| detected()).fold(0, |all, (feature, _)| all | bit(*feature)))
    }

    /// Whether vector registers are 32 bytes wide.
    pub fn has_ymm(self) -> bool {
        self.0 & bit(CpuidFeature::AVX) != 0
    }

    fn has_all(self, features: &[CpuidFeature]) -> bool {
        features.iter().all(|feature| self.0 & bit(*feature) != 0)
    }
}

/// The bit of an extension; zero for those that are not in the table, which no host has.
fn bit(feature: CpuidFeature) -> u32 {
    EXTENSIONS.iter().position(|(known, _)| *known == feature).map_or(0, |place| 1 << place)
}

/// The width of `insn` if it is a vector instruction that the host can run in the guest's place.
pub fn width(insn: &Instruction, host: Extensions) -> Option<Width> {
    if !has_vector_operands(insn) || !host.has_all(insn.cpuid_features()) || is_other(insn.mnemonic()) {
        return None;
    }
    match insn.code().encoding() {
        EncodingKind::Legacy => Some(Width::Xmm),
        EncodingKind::VEX => Some(Width::Ymm),
        _ => None,
    }
}

fn has_vector_operands(insn: &Instruction) -> bool {
    let registers = || (0..insn.op_count()).filter(|n| insn.op_kind(*n) == OpKind::Register).map(|n| insn.op_register(n));
    let clears_all = matches!(insn.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    clears_all || registers().any(is_vector) && registers().all(|register| is_vector(register) || register.is_gpr())
}

/// Whether `register` is one that this file is about.
pub fn is_vector(register: Register) -> bool {
    register.is_xmm() || register.is_ymm()
}

/// Instructions that touch, and fault for, the selected lanes of their memory operand alone, and those that are MMX without an MMX register.
fn is_other(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Maskmovdqu | Vmaskmovdqu | Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq | Cvtpi2ps | Cvtpi2pd)
}

/// Whether the memory operand must be aligned to its size: the interpreter tells the fault. It also takes those of 16 bytes that merely need
/// not be aligned and almost always are.
pub fn is_aligned(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.code().encoding() {
        EncodingKind::Legacy => {
            insn.memory_size().size() == 16 && !matches!(insn.mnemonic(), Movups | Movupd | Movdqu | Lddqu | Pcmpistri | Pcmpistrm)
        }
        _ => matches!(insn.mnemonic(), Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa),
    }
}

/// `insn` with a store that goes through the caches in place of one that does not: the engine's SFENCE orders the former only.
pub fn cached(insn: &Instruction) -> Instruction {
    let mut cached = *insn;
    cached.set_code(match insn.code() {
        Code::Movntps_m128_xmm => Code::Movaps_xmmm128_xmm,
        Code::Movntpd_m128_xmm => Code::Movapd_xmmm128_xmm,
        Code::Movntdq_m128_xmm => Code::Movdqa_xmmm128_xmm,
        Code::VEX_Vmovntps_m128_xmm => Code::VEX_Vmovaps_xmmm128_xmm,
        Code::VEX_Vmovntps_m256_ymm => Code::VEX_Vmovaps_ymmm256_ymm,
        Code::VEX_Vmovntpd_m128_xmm => Code::VEX_Vmovapd_xmmm128_xmm,
        Code::VEX_Vmovntpd_m256_ymm => Code::VEX_Vmovapd_ymmm256_ymm,
        Code::VEX_Vmovntdq_m128_xmm => Code::VEX_Vmovdqa_xmmm128_xmm,
        Code::VEX_Vmovntdq_m256_ymm => Code::VEX_Vmovdqa_ymmm256_ymm,
        Code::Movntq_m64_mm => Code::Movq_mmm64_mm,
        Code::Movnti_m32_r32 => Code::Mov_rm32_r32,
        Code::Movnti_m64_r64 => Code::Mov_rm64_r64,
        code => code,
    });
    cached
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn decode(code: &[u8]) -> Instruction {
        Decoder::new(64, code, DecoderOptions::NONE).decode()
    }

    const ALL: Extensions = Extensions(u32::MAX);

    #[test]
    fn the_encoding_tells_the_width() {
        assert_eq!(width(&decode(&[0x0f, 0x58, 0xc1]), ALL), Some(Width::Xmm)); // addps xmm0, xmm1
        assert_eq!(width(&decode(&[0xc5, 0xf0, 0x58, 0xc2]), ALL), Some(Width::Ymm)); // vaddps xmm0, xmm1, xmm2
        assert_eq!(width(&decode(&[0xc5, 0xf8, 0x77]), ALL), Some(Width::Ymm)); // vzeroupper
        assert_eq!(width(&decode(&[0x0f, 0x58, 0xc1]), Extensions(0)), None);
    }

    #[test]
    fn other_registers_and_selected_lanes_are_left_out() {
        assert_eq!(width(&decode(&[0x0f, 0xfc, 0xc1]), ALL), None); // paddb mm0, mm1
        assert_eq!(width(&decode(&[0x0f, 0x2a, 0xc1]), ALL), None); // cvtpi2ps xmm0, mm1
        assert_eq!(width(&decode(&[0x48, 0x01, 0xc8]), ALL), None); // add rax, rcx
        assert_eq!(width(&decode(&[0x66, 0x0f, 0xf7, 0xc1]), ALL), None); // maskmovdqu xmm0, xmm1
        assert_eq!(width(&decode(&[0xa5]), ALL), None); // movsd
    }

    #[test]
    fn alignment_is_of_legacy_encodings() {
        assert!(is_aligned(&decode(&[0x0f, 0x58, 0x06]))); // addps xmm0, [rsi]
        assert!(!is_aligned(&decode(&[0xc5, 0xf0, 0x58, 0x06]))); // vaddps xmm0, xmm1, [rsi]
        assert!(!is_aligned(&decode(&[0xf3, 0x0f, 0x58, 0x06]))); // addss xmm0, [rsi]
        assert!(!is_aligned(&decode(&[0x0f, 0x10, 0x06]))); // movups xmm0, [rsi]
        assert!(is_aligned(&decode(&[0xc5, 0xfc, 0x28, 0x06]))); // vmovaps ymm0, [rsi]
    }
}
