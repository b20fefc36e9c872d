//! Segment registers, descriptor tables, and the bases of FS and GS.
//!
//! Sources: SDM vol. 3, 2.4, 3.4, 5.4 to 5.6 and 5.10; SDM vol. 2 for each instruction.

mod base;
mod inspect;
mod load;
mod table;

use iced_x86::{Instruction, Mnemonic, Register};

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, size: CodeSize) -> Option<Handler> {
    load::handler(insn).or_else(|| inspect::handler(insn)).or_else(|| table::handler(insn, size)).or_else(|| base::handler(insn))
}

/// Loads of SS end their block: an interrupt shadow follows, and the width of the stack may change.
pub fn ends_block(insn: &Instruction) -> bool {
    let loads = matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop) && insn.op0_register() == Register::SS;
    loads || insn.mnemonic() == Mnemonic::Lss
}
