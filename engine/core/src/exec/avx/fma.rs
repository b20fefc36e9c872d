//! Fused multiply-add (SDM vol. 1, 14.5). The model offers it only where the host's units compute and have it, or where software does. The
//! order of the operands decides which of several NaNs is the result, so each form is its own host instruction.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::float::unit::simd_ternary;
use crate::exec::sse::operand::{vex_source, Source};
use crate::uop::{Exec, Handler, Uop};

/// An operation on three XMM registers under an MXCSR: the new first register, and the exception flags raised.
trait Ternary {
    fn apply(mxcsr: u32, a: u128, b: u128, c: u128) -> (u128, u32);
}

/// Handler of operation `O`. Scalar forms keep the upper lanes of the destination.
fn fused<O: Ternary, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let c = S::vector(cpu, uop)?;
    let (a, b) = (cpu.ymm(uop.reg[0]), cpu.ymm(uop.reg[1]));
    let mxcsr = cpu.state.fpu.mxcsr;
    let (low, raised) = O::apply(mxcsr, a[0], b[0], c[0]);
    let (high, more) = if S::HALVES == 2 { O::apply(mxcsr, a[1], b[1], c[1]) } else { (0, 0) };
    cpu.raise_simd(raised | more)?;
    S::put(cpu, uop.reg[0], [low, high]);
    Ok(())
}

/// Declares operations that are one instruction of the unit each, and the `handler` that picks among them.
macro_rules! operations {
    ($($mnemonic:ident => $op:literal;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &Instruction) -> Option<Handler> {
            Some(match insn.mnemonic() {
                $(Mnemonic::$mnemonic => {
                    struct Operation;
                    impl Ternary for Operation {
                        #[inline(always)]
                        fn apply(mxcsr: u32, a: u128, b: u128, c: u128) -> (u128, u32) {
                            simd_ternary!(mxcsr, $op, a, b, c)
                        }
                    }
                    vex_source!(insn, fused, Operation)
                })*
                _ => return None,
            })
        }
    };
}

operations! {
    Vfmadd132ps => "vfmadd132ps";
    Vfmadd132pd => "vfmadd132pd";
    Vfmadd132ss => "vfmadd132ss";
    Vfmadd132sd => "vfmadd132sd";
    Vfmadd213ps => "vfmadd213ps";
    Vfmadd213pd => "vfmadd213pd";
    Vfmadd213ss => "vfmadd213ss";
    Vfmadd213sd => "vfmadd213sd";
    Vfmadd231ps => "vfmadd231ps";
    Vfmadd231pd => "vfmadd231pd";
    Vfmadd231ss => "vfmadd231ss";
    Vfmadd231sd => "vfmadd231sd";
    Vfmsub132ps => "vfmsub132ps";
    Vfmsub132pd => "vfmsub132pd";
    Vfmsub132ss => "vfmsub132ss";
    Vfmsub132sd => "vfmsub132sd";
    Vfmsub213ps => "vfmsub213ps";
    Vfmsub213pd => "vfmsub213pd";
    Vfmsub213ss => "vfmsub213ss";
    Vfmsub213sd => "vfmsub213sd";
    Vfmsub231ps => "vfmsub231ps";
    Vfmsub231pd => "vfmsub231pd";
    Vfmsub231ss => "vfmsub231ss";
    Vfmsub231sd => "vfmsub231sd";
    Vfnmadd132ps => "vfnmadd132ps";
    Vfnmadd132pd => "vfnmadd132pd";
    Vfnmadd132ss => "vfnmadd132ss";
    Vfnmadd132sd => "vfnmadd132sd";
    Vfnmadd213ps => "vfnmadd213ps";
    Vfnmadd213pd => "vfnmadd213pd";
    Vfnmadd213ss => "vfnmadd213ss";
    Vfnmadd213sd => "vfnmadd213sd";
    Vfnmadd231ps => "vfnmadd231ps";
    Vfnmadd231pd => "vfnmadd231pd";
    Vfnmadd231ss => "vfnmadd231ss";
    Vfnmadd231sd => "vfnmadd231sd";
    Vfnmsub132ps => "vfnmsub132ps";
    Vfnmsub132pd => "vfnmsub132pd";
    Vfnmsub132ss => "vfnmsub132ss";
    Vfnmsub132sd => "vfnmsub132sd";
    Vfnmsub213ps => "vfnmsub213ps";
    Vfnmsub213pd => "vfnmsub213pd";
    Vfnmsub213ss => "vfnmsub213ss";
    Vfnmsub213sd => "vfnmsub213sd";
    Vfnmsub231ps => "vfnmsub231ps";
    Vfnmsub231pd => "vfnmsub231pd";
    Vfnmsub231ss => "vfnmsub231ss";
    Vfnmsub231sd => "vfnmsub231sd";
    Vfmaddsub132ps => "vfmaddsub132ps";
    Vfmaddsub132pd => "vfmaddsub132pd";
    Vfmaddsub213ps => "vfmaddsub213ps";
    Vfmaddsub213pd => "vfmaddsub213pd";
    Vfmaddsub231ps => "vfmaddsub231ps";
    Vfmaddsub231pd => "vfmaddsub231pd";
    Vfmsubadd132ps => "vfmsubadd132ps";
    Vfmsubadd132pd => "vfmsubadd132pd";
    Vfmsubadd213ps => "vfmsubadd213ps";
    Vfmsubadd213pd => "vfmsubadd213pd";
    Vfmsubadd231ps => "vfmsubadd231ps";
    Vfmsubadd231pd => "vfmsubadd231pd";
}
