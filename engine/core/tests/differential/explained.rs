//! Differences that are no bugs, each with its reason. Whatever is not in this table fails the run.

use iced_x86::{Code, CodeSize, CpuidFeature, Instruction, Mnemonic, OpKind, RflagsBits};
use softkvm_engine::state::rflags;

use super::encode::Encoded;
use super::image::{Fault, Image};

/// A comparison that found a difference: the state before, what the engine made of it, what the host did.
pub struct Case<'a> {
    pub encoded: &'a Encoded,
    pub before: &'a Image,
    pub engine: &'a Image,
    pub host: &'a Image,
    /// Whether memory is the same on both sides.
    pub same_memory: bool,
}

const GENERAL_PROTECTION: u8 = 13;

/// A reason for differences.
pub struct Reason {
    pub name: &'static str,
    pub text: &'static str,
    applies: fn(&Case) -> bool,
}

/// Every reason, in the order in which they are tried.
pub const REASONS: &[Reason] = &[
    Reason {
        name: "undefined flags",
        text: "The manuals leave these flags undefined, and the host is not the silicon that the model follows in them (model/silicon.rs).",
        applies: |case| without(case, |image, case| image.rflags &= !undefined(&case.encoded.insn, case.before)),
    },
    Reason {
        name: "double shift by more than the operand",
        text: "SHLD and SHRD of 16 bits by more than 16: result and flags are undefined, and the host is not the silicon that the model follows.",
        applies: |case| {
            let insn = &case.encoded.insn;
            matches!(insn.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
                && matches!(case.encoded.insn.op1_register().size(), 2)
                && shift_count(insn, case.before) > 16
                && (insn.op0_kind() == OpKind::Memory || case.same_memory)
                && case.engine.fault == case.host.fault
        },
    },
    Reason {
        name: "C1 behind FCOMI and FCMOVcc",
        text: "The host is not the silicon that the model follows in this condition bit (model/silicon.rs).",
        applies: |case| {
            may_keep_c1(case.encoded.insn.mnemonic()) && without(case, |image, _| image.area.fsw &= !C1)
        },
    },
    Reason {
        name: "near branch behind 66",
        text: "In 64-bit mode Intel's silicon ignores an operand-size prefix of near branches; AMD's truncates RIP to 16 bits.",
        applies: |case| {
            case.encoded.insn.code_size() == CodeSize::Code64 && near_branch(case.encoded) && case.encoded.prefixes().contains(&0x66)
        },
    },
    Reason {
        name: "CALL with two faults",
        text: "Where both the target and the stack of a CALL are bad, Intel's manual checks the target first, AMD's silicon the stack.",
        applies: |case| {
            case.encoded.insn.mnemonic() == Mnemonic::Call && vector(case.engine) == Some(13) && matches!(vector(case.host), Some(12 | 14))
        },
    },
    Reason {
        name: "pages of the host's kernel",
        text: "At addresses of the other half a fault's error code tells whether the host's kernel or hypervisor has a page there.",
        applies: |case| {
            let kernel = |fault: &Option<Fault>| fault.is_some_and(|fault| fault.vector == 14 && fault.address >= 0x7fff_ffff_f000);
            (kernel(&case.host.fault) && without(case, |image, _| forget_fault(image, |fault| fault.error &= !1)))
                || kernel(&case.engine.fault)
                    && matches!(vector(case.host), Some(12..=14))
                    && without(case, |image, _| image.fault = None)
        },
    },
    Reason {
        name: "CVTPI2PS from memory",
        text: "Intel's silicon enters MMX mode whatever the source is, AMD's only for an MMX register.",
        applies: |case| case.encoded.insn.mnemonic() == Mnemonic::Cvtpi2ps && without(case, forget_mmx),
    },
    Reason {
        name: "0F 0D with a register",
        text: "A prefetch with a register operand is a NOP of Intel's silicon and #UD of AMD's.",
        applies: |case| format!("{:?}", case.encoded.insn.code()).ends_with("0F0D") && vector(case.host) == Some(6) && vector(case.engine).is_none(),
    },
    Reason {
        name: "ENTER and the final stack pointer",
        text: "Intel's silicon checks that the stack can be written where ENTER leaves RSP, before it pushes; AMD's does not.",
        applies: |case| {
            let faults = |image: &Image| matches!(vector(image), None | Some(12..=14));
            case.encoded.insn.mnemonic() == Mnemonic::Enter && vector(case.engine) == Some(14) && faults(case.host)
        },
    },
    Reason {
        name: "condition codes behind an unmasked exception",
        text: "When a comparison raises an unmasked exception, Intel's silicon leaves C3, C2 and C0 (FCOMI: the flags) as they were; \
               AMD's writes them.",
        applies: |case| {
            comparison(&case.encoded.insn)
                && case.host.area.fsw & SUMMARY != 0
                && without(case, |image, _| {
                    image.area.fsw &= !CONDITIONS;
                    image.rflags &= !rflags::ARITHMETIC;
                })
        },
    },
    Reason {
        name: "MXCSR.MM",
        text: "AMD's silicon has the misaligned-exception mask, bit 17 of MXCSR; for Intel's it is reserved and #GP.",
        applies: |case| matches!(case.encoded.insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && vector(case.engine) == Some(13),
    },
    Reason {
        name: "MMX state behind a fault",
        text: "AMD's silicon enters MMX mode before an instruction with an MMX register faults; Intel's changes nothing.",
        applies: |case| vector(case.host).is_some() && touches_mmx(&case.encoded.insn) && without(case, forget_mmx),
    },
    Reason {
        name: "masked store",
        text: "MASKMOVDQU and MASKMOVQ may fault on bytes that their mask leaves out, and silicon differs in the address that CR2 gets.",
        applies: |case| {
            matches!(case.encoded.insn.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq)
                && vector(case.host).is_some()
        },
    },
    Reason {
        name: "masked load at a segment's limit",
        text: "Masked loads look only at bytes that their mask selects; AMD's silicon checks the limit of the segment for all of them.",
        applies: |case| {
            use Mnemonic::*;
            matches!(case.encoded.insn.mnemonic(), Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq)
                && case.encoded.insn.code_size() != CodeSize::Code64
                && matches!(vector(case.host), Some(12 | GENERAL_PROTECTION))
        },
    },
    Reason {
        name: "SHA with a misaligned operand",
        text: "Intel's manual gives the SHA instructions exceptions of type 4, so #GP for a misaligned operand; AMD's silicon takes any address.",
        applies: |case| {
            case.encoded.insn.cpuid_features().contains(&CpuidFeature::SHA)
                && case.engine.fault.is_some_and(|fault| (fault.vector, fault.error) == (GENERAL_PROTECTION, 0))
                && matches!(vector(case.host), None | Some(12..=14))
        },
    },
    Reason {
        name: "LOCK before MOV CR0",
        text: "AMD's silicon takes LOCK MOV CR0 as another way to write MOV CR8, which is privileged; Intel's has no such thing and raises #UD.",
        applies: |case| {
            matches!(case.encoded.insn.code(), Code::Mov_r64_cr | Code::Mov_cr_r64 | Code::Mov_r32_cr | Code::Mov_cr_r32)
                && case.encoded.prefixes().contains(&0xf0)
                && (vector(case.engine), vector(case.host)) == (Some(6), Some(GENERAL_PROTECTION))
        },
    },
    Reason {
        name: "MOVSXD with 66",
        text: "The source is 16 bits of Intel's silicon and 32 bits of AMD's, which reaches a bad page two bytes earlier.",
        applies: |case| case.encoded.insn.code() == Code::Movsxd_r16_rm16 && vector(case.host).is_some(),
    },
    Reason {
        name: "place of a fault in a long operand",
        text: "Where an operand of several parts is bad, silicon differs in which bad byte CR2 tells, or which check comes first.",
        applies: |case| {
            is_x87(&case.encoded.insn)
                && case.encoded.insn.memory_size().size() >= 10
                && vector(case.host) == Some(14)
                && matches!(vector(case.engine), Some(12..=14))
                && without(case, |image, _| image.fault = None)
        },
    },
];

/// FSW: an unmasked exception waits.
const SUMMARY: u16 = 0x80;
/// FSW: C1.
const C1: u16 = 0x200;
/// FSW: C0, C2 and C3.
const CONDITIONS: u16 = 0x4500;

fn vector(image: &Image) -> Option<u8> {
    image.fault.map(|fault| fault.vector)
}

fn forget_fault(image: &mut Image, change: impl Fn(&mut Fault)) {
    image.fault.iter_mut().for_each(change);
}

fn forget_mmx(image: &mut Image, _case: &Case) {
    (image.area.fsw, image.area.ftw) = (0, 0);
    image.area.st = Default::default();
}

fn touches_mmx(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm())
}

fn near_branch(encoded: &Encoded) -> bool {
    let insn = &encoded.insn;
    encoded.branch_width().is_some() || insn.is_call_near_indirect() || insn.is_jmp_near_indirect() || insn.mnemonic() == Mnemonic::Ret
}

/// Whether it is an instruction of the x87 FPU.
pub fn is_x87(insn: &Instruction) -> bool {
    insn.code().cpuid_features().iter().any(|feature| matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

fn may_keep_c1(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Fcomi | Fcomip | Fucomi | Fucomip)
        || matches!(mnemonic, Fcmovb | Fcmovnb | Fcmove | Fcmovne | Fcmovbe | Fcmovnbe | Fcmovu | Fcmovnu)
}

/// Whether it is an x87 comparison, which sets condition codes or flags.
pub fn comparison(insn: &Instruction) -> bool {
    use Mnemonic::*;
    let mnemonic = insn.mnemonic();
    matches!(mnemonic, Fcom | Fcomp | Fcompp | Fucom | Fucomp | Fucompp | Ficom | Ficomp | Ftst)
        || matches!(mnemonic, Fcomi | Fcomip | Fucomi | Fucomip)
}

/// The first reason that explains the case.
pub fn explain(case: &Case) -> Option<&'static Reason> {
    REASONS.iter().find(|reason| (reason.applies)(case))
}

/// Whether the two sides agree once `forget` has cleared what a reason speaks about.
fn without(case: &Case, forget: impl Fn(&mut Image, &Case)) -> bool {
    let (mut engine, mut host) = (*case.engine, *case.host);
    forget(&mut engine, case);
    forget(&mut host, case);
    case.same_memory && engine == host
}

/// Flags that the instruction leaves undefined (SDM vol. 1, app. A).
pub fn undefined(insn: &Instruction, before: &Image) -> u64 {
    use Mnemonic::*;
    if matches!(insn.mnemonic(), Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd) && shift_count(insn, before) == 0 {
        return 0;
    }
    let mut names = insn.rflags_undefined();
    if matches!(insn.mnemonic(), Rcl | Rcr) && shift_count(insn, before) > 1 {
        names |= RflagsBits::OF;
    }
    let bits = [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ];
    bits.iter().filter(|(name, _)| names & name != 0).fold(0, |mask, (_, bit)| mask | bit)
}

/// The count of a shift as the CPU masks it.
fn shift_count(insn: &Instruction, before: &Image) -> u64 {
    let last = insn.op_count() - 1;
    let count = if insn.op_kind(last) == OpKind::Immediate8 { insn.immediate(last) } else { before.gpr[1] };
    let wide = insn.op_kind(0) == OpKind::Register && insn.op_register(0).size() == 8
        || insn.op_kind(0) == OpKind::Memory && insn.memory_size().size() == 8;
    count & if wide { 63 } else { 31 }
}
