//! The shape that most integer instructions have: an operation on two vectors, with or without an immediate byte.
//!
//! An operation says what it computes (the traits below); `binary` and `immediate` pick, when the instruction is decoded, the handler
//! that feeds it from the right registers or memory.

use iced_x86::Instruction;

use super::operand::{halves, is_mm, mmx_source, vector_source, MmxSource, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// An operation on two vectors, of 8 bytes (MMX) or 16 (XMM, half of a YMM): `destination = apply(first, second)`.
pub trait Binary {
    fn apply<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N];
}

/// The same with an immediate byte.
pub trait Immediate {
    /// Bits of the immediate that are the low half's alone; the upper half's follow.
    const LOW_BITS: u32;
    fn apply<const N: usize>(a: [u8; N], b: [u8; N], imm: u8) -> [u8; N];
}

/// The handler of operation `O`.
pub fn binary<O: Binary>(insn: &Instruction) -> Handler {
    if is_mm(insn, 0) {
        mmx_source!(insn, binary_mm, O)
    } else {
        vector_source!(insn, binary_vector, O)
    }
}

fn binary_vector<O: Binary, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let result = halves::<S>(|n| u128::from_le_bytes(O::apply(a[n].to_le_bytes(), b[n].to_le_bytes())));
    S::put(cpu, uop.reg[0], result);
    Ok(())
}

fn binary_mm<O: Binary, S: MmxSource>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let b = S::mm(cpu, uop)?;
    let a = cpu.mm(uop.reg[0]);
    cpu.touch_mmx();
    cpu.set_mm(uop.reg[0], u64::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes())));
    Ok(())
}

/// The handler of operation `O` with an immediate.
pub fn immediate<O: Immediate>(insn: &Instruction) -> Handler {
    if is_mm(insn, 0) {
        mmx_source!(insn, immediate_mm, O)
    } else {
        vector_source!(insn, immediate_vector, O)
    }
}

fn immediate_vector<O: Immediate, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = S::first(cpu, uop);
    let imm = |n: usize| uop.imm as u8 >> (O::LOW_BITS * n as u32);
    let result = halves::<S>(|n| u128::from_le_bytes(O::apply(a[n].to_le_bytes(), b[n].to_le_bytes(), imm(n))));
    S::put(cpu, uop.reg[0], result);
    Ok(())
}

fn immediate_mm<O: Immediate, S: MmxSource>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let b = S::mm(cpu, uop)?;
    let a = cpu.mm(uop.reg[0]);
    cpu.touch_mmx();
    cpu.set_mm(uop.reg[0], u64::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes(), uop.imm as u8)));
    Ok(())
}

/// Declares operations by mnemonic, and the `handler` that picks among them:
/// `Mnemonic | Mnemonic => |a, b| value` on two vectors, with `N` their length in bytes.
macro_rules! operations {
    ($($($mnemonic:ident)|+ => |$a:ident, $b:ident| $value:expr;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &iced_x86::Instruction) -> Option<crate::uop::Handler> {
            Some(match insn.mnemonic() {
                $($(iced_x86::Mnemonic::$mnemonic)|+ => {
                    struct Operation;
                    impl crate::exec::sse::form::Binary for Operation {
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $b: [u8; N]) -> [u8; N] {
                            $value
                        }
                    }
                    crate::exec::sse::form::binary::<Operation>(insn)
                })*
                _ => return None,
            })
        }
    };
}
pub(in crate::exec) use operations;

/// [`operations`] with an immediate byte: `Mnemonic => |a, b, imm| value`. `by N`: the immediate has N bits for each half.
macro_rules! immediate_operations {
    ($name:ident: $($($mnemonic:ident)|+ $(by $bits:literal)? => |$a:ident, $b:ident, $imm:ident| $value:expr;)*) => {
        fn $name(insn: &iced_x86::Instruction) -> Option<crate::uop::Handler> {
            Some(match insn.mnemonic() {
                $($(iced_x86::Mnemonic::$mnemonic)|+ => {
                    struct Operation;
                    impl crate::exec::sse::form::Immediate for Operation {
                        const LOW_BITS: u32 = 0 $(+ $bits)?;
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $b: [u8; N], $imm: u8) -> [u8; N] {
                            $value
                        }
                    }
                    crate::exec::sse::form::immediate::<Operation>(insn)
                })*
                _ => return None,
            })
        }
    };
}
pub(in crate::exec) use immediate_operations;
