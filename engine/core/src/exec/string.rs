//! (to be written)

use iced_x86::Instruction;

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(_insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    None
}
