//! BOUND: an index against a pair of signed bounds in memory, #BR outside of them (SDM vol. 2). It does not exist in 64-bit mode.

use iced_x86::{Code, Instruction};

use crate::cpu::{CodeSize, Cpu};
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    Some(match insn.code() {
        Code::Bound_r16_m1616 => bound::<u16>,
        Code::Bound_r32_m3232 => bound::<u32>,
        _ => return None,
    })
}

fn bound<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.linear(uop, 2 * W::BYTES, AccessKind::Read)?;
    let lower = cpu.read::<W>(uop.segment(), la)?.sign_extend() as i64;
    let upper = cpu.read::<W>(uop.segment(), la.wrapping_add(W::BYTES))?.sign_extend() as i64;
    let index = cpu.reg::<W>(uop.reg[0]).sign_extend() as i64;
    if index < lower || index > upper {
        return Err(cpu.raise(vector::BR));
    }
    Ok(())
}
