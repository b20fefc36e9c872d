//! MOVDIR64B: 64 bytes from memory to an aligned place in one store (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::select::width;
use crate::cpu::{CodeSize, Cpu};
use crate::paging::AccessKind;
use crate::state::seg;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

const BYTES: usize = 64;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Movdir64b => by_wide_width!(width(insn, 0), move_line),
        _ => None,
    }
}

/// Operand 0 is the address of the destination, in ES.
fn move_line<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = cpu.linear(uop, BYTES as u64, AccessKind::Read)?;
    let mut line = [0; BYTES];
    cpu.read_area(uop.segment(), source, &mut line)?;
    let offset = cpu.reg::<W>(uop.reg[0]).zero_extend();
    let la = cpu.segment_address(seg::ES, offset, BYTES as u64, AccessKind::Write)?;
    if la & (BYTES as u64 - 1) != 0 {
        return Err(cpu.general_protection());
    }
    cpu.write_area(seg::ES, la, &line)
}
