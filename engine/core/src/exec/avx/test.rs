//! VTESTPS and VTESTPD: PTEST of the sign bits (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::sse::operand::{halves, vex_source, Source};
use crate::flags::Flags;
use crate::state::rflags::{CF, ZF};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vtestps => vex_source!(insn, test, Singles),
        Mnemonic::Vtestpd => vex_source!(insn, test, Doubles),
        _ => return None,
    })
}

/// Where the signs are.
trait Signs {
    const BITS: u128;
}
struct Singles;
struct Doubles;
impl Signs for Singles {
    const BITS: u128 = 0x8000_0000_8000_0000_8000_0000_8000_0000;
}
impl Signs for Doubles {
    const BITS: u128 = 0x8000_0000_0000_0000_8000_0000_0000_0000;
}

fn test<L: Signs, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?;
    let a = cpu.ymm(uop.reg[0]);
    let zero = if halves::<S>(|n| a[n] & b[n] & L::BITS) == [0; 2] { ZF } else { 0 };
    let carry = if halves::<S>(|n| !a[n] & b[n] & L::BITS) == [0; 2] { CF } else { 0 };
    cpu.flags = Flags::from_bits(zero | carry);
    Ok(())
}
