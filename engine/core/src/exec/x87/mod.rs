//! The x87 unit (SDM vol. 1, ch. 8).
//!
//! Arithmetic is `exec::float`'s, under the guest's control word, so results and status bits are exact, with masked and with unmasked
//! exceptions. The stack, tags and the pending-exception protocol are here.

mod arithmetic;
mod compare;
mod control;
mod environment;
mod function;
mod load;
mod stack;

pub(in crate::exec) use stack::status;

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    const FAMILIES: [fn(&Instruction) -> Option<Handler>; 6] =
        [control::handler, load::handler, arithmetic::handler, compare::handler, function::handler, environment::handler];
    FAMILIES.iter().find_map(|family| family(insn))
}

/// Whether the dispatcher must look at the CPU after this instruction: it may unmask an exception, or bring one that waits.
pub fn ends_block(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Fldcw | Mnemonic::Fldenv | Mnemonic::Frstor)
}
