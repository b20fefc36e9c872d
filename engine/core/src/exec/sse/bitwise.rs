//! Bitwise operations, in their integer and floating-point spellings, and PTEST (SDM vol. 2: PAND, ANDPS, PTEST).

use iced_x86::{Instruction, Mnemonic};

use super::form::operations;
use super::lanes::zip;
use super::operand::{halves, vector_source, Source};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::rflags::{CF, ZF};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Ptest | Mnemonic::Vptest => Some(vector_source!(insn, ptest)),
        _ => logic::handler(insn),
    }
}

mod logic {
    use super::{operations, zip};

    operations! {
        Pand | Vpand => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Andps | Vandps => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Andpd | Vandpd => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Pandn | Vpandn => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Andnps | Vandnps => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Andnpd | Vandnpd => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Por | Vpor => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Orps | Vorps => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Orpd | Vorpd => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Pxor | Vpxor => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
        Xorps | Vxorps => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
        Xorpd | Vxorpd => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
    }
}

fn ptest<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = cpu.ymm(uop.reg[0]);
    let zero = if halves::<S>(|n| a[n] & b[n]) == [0; 2] { ZF } else { 0 };
    let carry = if halves::<S>(|n| !a[n] & b[n]) == [0; 2] { CF } else { 0 };
    cpu.flags = Flags::from_bits(zero | carry);
    Ok(())
}
