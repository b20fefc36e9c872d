//! SSE and SSE2 floating-point arithmetic, and conversions between XMM registers (SDM vol. 1, 10.4.1.2 and 11.4.1.2).

use iced_x86::{Instruction, Mnemonic};

use super::host::simd;
use super::operand::{vector_source, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// An operation on two XMM registers under an MXCSR: the new first register, and the exception flags raised.
pub trait Float {
    fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32);
}

/// Handler of operation `O`.
pub fn float<O: Float, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let b = S::xmm(cpu, uop)?;
    let (result, flags) = O::apply(cpu.state.fpu.mxcsr, cpu.xmm(uop.reg[0]), b);
    cpu.raise_simd(flags)?;
    cpu.set_xmm(uop.reg[0], result);
    Ok(())
}

/// Declares operations that are one host instruction each, and the `handler` that picks among them.
macro_rules! host_operations {
    ($($mnemonic:ident => $op:literal;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &Instruction) -> Option<Handler> {
            Some(match insn.mnemonic() {
                $(Mnemonic::$mnemonic => {
                    struct Operation;
                    impl Float for Operation {
                        #[inline(always)]
                        fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32) {
                            simd!(mxcsr, $op, a, b)
                        }
                    }
                    vector_source!(insn, float, Operation)
                })*
                _ => return None,
            })
        }
    };
}

host_operations! {
    Addps => "addps";
    Addpd => "addpd";
    Addss => "addss";
    Addsd => "addsd";
    Subps => "subps";
    Subpd => "subpd";
    Subss => "subss";
    Subsd => "subsd";
    Mulps => "mulps";
    Mulpd => "mulpd";
    Mulss => "mulss";
    Mulsd => "mulsd";
    Divps => "divps";
    Divpd => "divpd";
    Divss => "divss";
    Divsd => "divsd";
    Minps => "minps";
    Minpd => "minpd";
    Minss => "minss";
    Minsd => "minsd";
    Maxps => "maxps";
    Maxpd => "maxpd";
    Maxss => "maxss";
    Maxsd => "maxsd";
    Sqrtps => "sqrtps";
    Sqrtpd => "sqrtpd";
    Sqrtss => "sqrtss";
    Sqrtsd => "sqrtsd";
    Rcpps => "rcpps";
    Rcpss => "rcpss";
    Rsqrtps => "rsqrtps";
    Rsqrtss => "rsqrtss";
    Cvtdq2ps => "cvtdq2ps";
    Cvtdq2pd => "cvtdq2pd";
    Cvtps2dq => "cvtps2dq";
    Cvttps2dq => "cvttps2dq";
    Cvtpd2dq => "cvtpd2dq";
    Cvttpd2dq => "cvttpd2dq";
    Cvtps2pd => "cvtps2pd";
    Cvtpd2ps => "cvtpd2ps";
    Cvtss2sd => "cvtss2sd";
    Cvtsd2ss => "cvtsd2ss";
}
