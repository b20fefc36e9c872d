//! Which instructions are compared: every opcode form that iced knows, the model offers and the host has, less what would not come back.

use iced_x86::{Code, CpuidFeature, Mnemonic, OpCodeInfo, OpCodeOperandKind};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::model::features::TABLE;
use softkvm_engine::model::Model;

/// Why a form is not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Left {
    /// The CPU model that the engine offers lacks it.
    NotOffered,
    /// The host's CPU lacks it.
    NotOnHost,
    /// It asks the host's kernel for something.
    Kernel,
    /// What it reads is a property of the host: time, random numbers, CPUID, tables, model-specific registers.
    HostProperty,
    /// It belongs to descriptor tables, which differ; the instruction tables and the far-transfer tests cover it.
    DescriptorTables,
}

/// The form of an instruction or the reason to leave it out; `None` for what is no instruction in code of `size`.
pub fn classify(code: Code, size: CodeSize, offers: &Offers) -> Option<Result<(), Left>> {
    let form = code.op_code();
    let exists = match size {
        CodeSize::Bits64 => form.mode64() && form.intel_decoder64(),
        CodeSize::Bits32 => form.mode32() && form.intel_decoder32(),
        CodeSize::Bits16 => form.mode16() && form.intel_decoder16(),
    };
    if !form.is_instruction() || !exists || form.fwait() || form.decoder_option() != 0 {
        return None;
    }
    if let Some(reason) = left_out(code, form) {
        return Some(Err(reason));
    }
    for feature in code.cpuid_features() {
        match feature_name(*feature) {
            Some("") => {}
            Some(name) if !offers.model(name) => return Some(Err(Left::NotOffered)),
            Some(name) if !offers.host(name) => return Some(Err(Left::NotOnHost)),
            Some(_) => {}
            None => return Some(Err(Left::NotOffered)),
        }
    }
    Some(Ok(()))
}

fn left_out(code: Code, form: &OpCodeInfo) -> Option<Left> {
    use Mnemonic::*;
    match form.mnemonic() {
        Syscall | Sysenter | Sysret | Sysretq | Sysexit | Sysexitq | Int | Int1 | Int3 | Into => Some(Left::Kernel),
        Vmcall | Vmmcall | Vmgexit | Vmrun | Vmload | Vmsave | Clgi | Stgi | Skinit | Invlpga | Monitor | Mwait => Some(Left::Kernel),
        Cpuid | Rdtsc | Rdtscp | Rdpid | Rdpmc | Rdrand | Rdseed | Xgetbv | Rdpru => Some(Left::HostProperty),
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64 => Some(Left::HostProperty),
        Xrstor | Xrstor64 | Xrstors | Xrstors64 | Fxsave | Fxsave64 | Fxrstor | Fxrstor64 => Some(Left::HostProperty),
        Sgdt | Sidt | Sldt | Str | Smsw | Rdfsbase | Wrfsbase | Wrgsbase => Some(Left::HostProperty),
        Rdpkru | Wrpkru => Some(Left::HostProperty),
        Lar | Lsl | Verr | Verw | Lfs | Lgs | Lss | Lds | Les | Iret | Iretd | Iretq | Retf => Some(Left::DescriptorTables),
        Jmp | Call if code.is_jmp_far() || code.is_jmp_far_indirect() || code.is_call_far() || code.is_call_far_indirect() => {
            Some(Left::DescriptorTables)
        }
        Mov if matches!(code, Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16) => Some(Left::DescriptorTables),
        Pop if (0..form.op_count()).any(|n| is_segment_register(form.op_kind(n))) => Some(Left::DescriptorTables),
        _ => None,
    }
}

fn is_segment_register(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(kind, es | cs | ss | ds | fs | gs)
}

/// The engine's name of a feature: empty for what every 64-bit CPU has, `None` for what the engine knows nothing of.
fn feature_name(feature: CpuidFeature) -> Option<&'static str> {
    use CpuidFeature::*;
    Some(match feature {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | PAUSE | MULTIBYTENOP | CPUID | FPU | FPU287 | FPU387 => "",
        TSC => "tsc",
        MSR => "msr",
        CX8 => "cx8",
        CMOV => "cmov",
        CLFSH => "clflush",
        MMX => "mmx",
        FXSR => "fxsr",
        SSE => "sse",
        SSE2 => "sse2",
        SSE3 => "pni",
        SSSE3 => "ssse3",
        SSE4_1 => "sse4.1",
        SSE4_2 => "sse4.2",
        SSE4A => "sse4a",
        CMPXCHG16B => "cx16",
        PCLMULQDQ => "pclmulqdq",
        AES => "aes",
        SHA => "sha-ni",
        MOVBE => "movbe",
        POPCNT => "popcnt",
        LZCNT => "abm",
        BMI1 => "bmi1",
        BMI2 => "bmi2",
        ADX => "adx",
        FSGSBASE => "fsgsbase",
        CLFLUSHOPT => "clflushopt",
        CLWB => "clwb",
        CLDEMOTE => "cldemote",
        MOVDIRI => "movdiri",
        MOVDIR64B => "movdir64b",
        PREFETCHW => "3dnowprefetch",
        SERIALIZE => "serialize",
        AVX => "avx",
        AVX2 => "avx2",
        FMA => "fma",
        F16C => "f16c",
        INVPCID => "invpcid",
        SMAP => "smap",
        XSAVE => "xsave",
        _ => return None,
    })
}

/// What the model offers and what the host has.
pub struct Offers {
    model: Model,
}

impl Offers {
    pub fn new(model: Model) -> Self {
        Offers { model }
    }

    fn model(&self, name: &str) -> bool {
        TABLE.iter().any(|info| info.name == name && self.model.has(info.feature))
    }

    fn host(&self, name: &str) -> bool {
        TABLE.iter().any(|info| {
            let answer = core::arch::x86_64::__cpuid_count(info.leaf, info.subleaf);
            let registers = [answer.eax, answer.ebx, answer.ecx, answer.edx];
            info.name == name && registers[info.register] >> info.bit & 1 != 0
        })
    }
}

/// Family of a form in the ledger.
pub fn family(code: Code) -> &'static str {
    use CpuidFeature::*;
    match code.cpuid_features()[0] {
        FPU | FPU287 | FPU387 => "x87",
        MMX => "MMX",
        SSE => "SSE",
        SSE2 => "SSE2",
        SSE3 | SSSE3 => "SSE3 and SSSE3",
        SSE4_1 | SSE4_2 | SSE4A => "SSE4",
        AES | PCLMULQDQ | SHA => "AES, PCLMULQDQ, SHA",
        AVX => "AVX",
        AVX2 => "AVX2",
        FMA | F16C => "FMA and F16C",
        BMI1 | BMI2 | ADX | LZCNT | POPCNT | MOVBE => "BMI, ADX, POPCNT, MOVBE",
        _ => "integer",
    }
}
