//! Floating-point comparison: CMPPS, CMPPD, CMPSS, CMPSD, COMISS, UCOMISS and siblings (SDM vol. 1, 10.4.1.4 and 11.4.1.4).

use iced_x86::{Code, Instruction, Mnemonic};

use super::float::{float, Float};
use super::operand::{legacy_source, vector_source, Source};
use crate::cpu::Cpu;
use crate::exec::float::unit::{simd, simd_compare};
use crate::flags::Flags;
use crate::state::rflags::{CF, PF, ZF};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Cmpps => packed_single(insn),
        Mnemonic::Cmppd => packed_double(insn),
        Mnemonic::Cmpss => scalar_single(insn),
        // The mnemonic is also a string instruction's.
        Mnemonic::Cmpsd if insn.code() == Code::Cmpsd_xmm_xmmm64_imm8 => scalar_double(insn),
        Mnemonic::Comiss | Mnemonic::Vcomiss => vector_source!(insn, compare, Comiss),
        Mnemonic::Comisd | Mnemonic::Vcomisd => vector_source!(insn, compare, Comisd),
        Mnemonic::Ucomiss | Mnemonic::Vucomiss => vector_source!(insn, compare, Ucomiss),
        Mnemonic::Ucomisd | Mnemonic::Vucomisd => vector_source!(insn, compare, Ucomisd),
        _ => return None,
    })
}

/// Declares a comparison into a mask for each of the eight predicates, and the function that picks by the immediate.
macro_rules! masks {
    ($name:ident, $operation:ident, $op:literal) => {
        struct $operation<const PREDICATE: u8>;
        impl<const PREDICATE: u8> Float for $operation<PREDICATE> {
            #[inline(always)]
            fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32) {
                simd!(mxcsr, $op, a, b, imm PREDICATE)
            }
        }
        fn $name(insn: &Instruction) -> Handler {
            match insn.immediate8() & 7 {
                0 => legacy_source!(insn, float, $operation<0>),
                1 => legacy_source!(insn, float, $operation<1>),
                2 => legacy_source!(insn, float, $operation<2>),
                3 => legacy_source!(insn, float, $operation<3>),
                4 => legacy_source!(insn, float, $operation<4>),
                5 => legacy_source!(insn, float, $operation<5>),
                6 => legacy_source!(insn, float, $operation<6>),
                _ => legacy_source!(insn, float, $operation<7>),
            }
        }
    };
}
masks!(packed_single, Cmpps, "cmpps");
masks!(packed_double, Cmppd, "cmppd");
masks!(scalar_single, Cmpss, "cmpss");
masks!(scalar_double, Cmpsd, "cmpsd");

/// A comparison into EFLAGS.
trait Compare {
    fn apply(mxcsr: u32, a: u128, b: u128) -> (u64, u32);
}

macro_rules! comparisons {
    ($($operation:ident => $op:literal;)*) => {$(
        struct $operation;
        impl Compare for $operation {
            #[inline(always)]
            fn apply(mxcsr: u32, a: u128, b: u128) -> (u64, u32) {
                simd_compare!(mxcsr, $op, a, b)
            }
        }
    )*};
}
comparisons! {
    Comiss => "comiss";
    Comisd => "comisd";
    Ucomiss => "ucomiss";
    Ucomisd => "ucomisd";
}

fn compare<O: Compare, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::xmm(cpu, uop)?;
    let (image, flags) = O::apply(cpu.state.fpu.mxcsr, cpu.xmm(uop.reg[0]), b);
    cpu.raise_simd(flags)?;
    cpu.flags = Flags::from_bits(image & (CF | PF | ZF));
    Ok(())
}
