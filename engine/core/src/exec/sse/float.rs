//! SSE and SSE2 floating-point arithmetic, and conversions between XMM registers (SDM vol. 1, 10.4.1.2 and 11.4.1.2).

use iced_x86::{Instruction, Mnemonic};

use super::operand::{is_memory, is_ymm, vector_source, vex_source, Source, VexMemory, VexRegister};
use crate::cpu::Cpu;
use crate::exec::float::unit::simd;
use crate::uop::{Exec, Handler, Uop};

/// An operation on two XMM registers under an MXCSR: the new first register, and the exception flags raised.
pub trait Float {
    fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32);
}

/// Handler of operation `O`. The flags of both halves are found before any is reported.
pub(in crate::exec) fn float<O: Float, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let mxcsr = cpu.state.fpu.mxcsr;
    let (low, raised) = O::apply(mxcsr, a[0], b[0]);
    let (high, more) = if S::HALVES == 2 { O::apply(mxcsr, a[1], b[1]) } else { (0, 0) };
    cpu.raise_simd(raised | more)?;
    S::put(cpu, uop.reg[0], [low, high]);
    Ok(())
}

/// Handler of a conversion of operation `O` to lanes half as wide: two halves make one.
fn narrow<O: Float, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let mxcsr = cpu.state.fpu.mxcsr;
    let (low, raised) = O::apply(mxcsr, 0, b[0]);
    let (high, more) = if S::HALVES == 2 { O::apply(mxcsr, 0, b[1]) } else { (0, 0) };
    cpu.raise_simd(raised | more)?;
    S::put_xmm(cpu, uop.reg[0], high << 64 | low);
    Ok(())
}

/// Handler of a conversion of operation `O` to lanes twice as wide: one half makes two.
fn widen<O: Float, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::xmm(cpu, uop)?;
    let mxcsr = cpu.state.fpu.mxcsr;
    let (low, raised) = O::apply(mxcsr, 0, b);
    let (high, more) = O::apply(mxcsr, 0, b >> 64);
    cpu.raise_simd(raised | more)?;
    S::put(cpu, uop.reg[0], [low, high]);
    Ok(())
}

/// Picks among [`float`], [`narrow`] and [`widen`].
fn form<O: Float>(insn: &Instruction) -> Handler {
    match insn.mnemonic() {
        Mnemonic::Vcvtpd2ps | Mnemonic::Vcvtpd2dq | Mnemonic::Vcvttpd2dq => vex_source!(insn, narrow, O),
        Mnemonic::Vcvtps2pd | Mnemonic::Vcvtdq2pd if is_ymm(insn, 0) && is_memory(insn, 1) => widen::<O, VexMemory<16>>,
        Mnemonic::Vcvtps2pd | Mnemonic::Vcvtdq2pd if is_ymm(insn, 0) => widen::<O, VexRegister<1, 1>>,
        _ => vector_source!(insn, float, O),
    }
}

/// Declares operations that are one instruction of the unit each, and the `handler` that picks among them.
macro_rules! operations {
    ($($($mnemonic:ident)|+ => $op:literal;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &Instruction) -> Option<Handler> {
            Some(match insn.mnemonic() {
                $($(Mnemonic::$mnemonic)|+ => {
                    struct Operation;
                    impl Float for Operation {
                        #[inline(always)]
                        fn apply(mxcsr: u32, a: u128, b: u128) -> (u128, u32) {
                            simd!(mxcsr, $op, a, b)
                        }
                    }
                    form::<Operation>(insn)
                })*
                _ => return None,
            })
        }
    };
}

operations! {
    Addps | Vaddps => "addps";
    Addpd | Vaddpd => "addpd";
    Addss | Vaddss => "addss";
    Addsd | Vaddsd => "addsd";
    Subps | Vsubps => "subps";
    Subpd | Vsubpd => "subpd";
    Subss | Vsubss => "subss";
    Subsd | Vsubsd => "subsd";
    Mulps | Vmulps => "mulps";
    Mulpd | Vmulpd => "mulpd";
    Mulss | Vmulss => "mulss";
    Mulsd | Vmulsd => "mulsd";
    Divps | Vdivps => "divps";
    Divpd | Vdivpd => "divpd";
    Divss | Vdivss => "divss";
    Divsd | Vdivsd => "divsd";
    Minps | Vminps => "minps";
    Minpd | Vminpd => "minpd";
    Minss | Vminss => "minss";
    Minsd | Vminsd => "minsd";
    Maxps | Vmaxps => "maxps";
    Maxpd | Vmaxpd => "maxpd";
    Maxss | Vmaxss => "maxss";
    Maxsd | Vmaxsd => "maxsd";
    Sqrtps | Vsqrtps => "sqrtps";
    Sqrtpd | Vsqrtpd => "sqrtpd";
    Sqrtss | Vsqrtss => "sqrtss";
    Sqrtsd | Vsqrtsd => "sqrtsd";
    Rcpps | Vrcpps => "rcpps";
    Rcpss | Vrcpss => "rcpss";
    Rsqrtps | Vrsqrtps => "rsqrtps";
    Rsqrtss | Vrsqrtss => "rsqrtss";
    Cvtdq2ps | Vcvtdq2ps => "cvtdq2ps";
    Cvtdq2pd | Vcvtdq2pd => "cvtdq2pd";
    Cvtps2dq | Vcvtps2dq => "cvtps2dq";
    Cvttps2dq | Vcvttps2dq => "cvttps2dq";
    Cvtpd2dq | Vcvtpd2dq => "cvtpd2dq";
    Cvttpd2dq | Vcvttpd2dq => "cvttpd2dq";
    Cvtps2pd | Vcvtps2pd => "cvtps2pd";
    Cvtpd2ps | Vcvtpd2ps => "cvtpd2ps";
    Cvtss2sd | Vcvtss2sd => "cvtss2sd";
    Cvtsd2ss | Vcvtsd2ss => "cvtsd2ss";
}
