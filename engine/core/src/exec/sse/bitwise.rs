//! Bitwise operations, in their integer and floating-point spellings, and PTEST (SDM vol. 2: PAND, ANDPS, PTEST).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::zip;
use super::operand::{operations, vector_source, Source};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::rflags::{CF, ZF};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Ptest => Some(vector_source!(insn, ptest)),
        _ => logic::handler(insn),
    }
}

mod logic {
    use super::{operations, zip};

    operations! {
        Pand => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Andps => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Andpd => |a, b| zip(a, b, |x: u64, y: u64| x & y);
        Pandn => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Andnps => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Andnpd => |a, b| zip(a, b, |x: u64, y: u64| !x & y);
        Por => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Orps => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Orpd => |a, b| zip(a, b, |x: u64, y: u64| x | y);
        Pxor => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
        Xorps => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
        Xorpd => |a, b| zip(a, b, |x: u64, y: u64| x ^ y);
    }
}

fn ptest<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let b = S::xmm(cpu, uop)?;
    let a = cpu.xmm(uop.reg[0]);
    let zero = if a & b == 0 { ZF } else { 0 };
    let carry = if !a & b == 0 { CF } else { 0 };
    cpu.flags = Flags::from_bits(zero | carry);
    Ok(())
}
