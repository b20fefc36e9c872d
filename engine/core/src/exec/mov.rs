//! Data movement: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, BSWAP, MOVBE, XLAT (SDM vol. 1, 7.3.1).

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{CodeSize, Cpu};
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Mov => mov(insn),
        _ => None,
    }
}

/// Picks `$handler::<W>` for the width of operand 0 in bytes.
macro_rules! by_width {
    ($bytes:expr, $handler:ident) => {
        match $bytes {
            1 => Some($handler::<u8> as Handler),
            2 => Some($handler::<u16> as Handler),
            4 => Some($handler::<u32> as Handler),
            8 => Some($handler::<u64> as Handler),
            _ => None,
        }
    };
}

fn mov(insn: &Instruction) -> Option<Handler> {
    if !insn.op0_register().is_gpr() && insn.op0_kind() == OpKind::Register {
        return None; // segment, control and debug registers: other families
    }
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) if insn.op1_register().is_gpr() => by_width!(insn.op0_register().size(), mov_rr),
        (OpKind::Register, OpKind::Memory) => by_width!(insn.op0_register().size(), mov_rm),
        (OpKind::Memory, OpKind::Register) if insn.op1_register().is_gpr() => by_width!(insn.op1_register().size(), mov_mr),
        (OpKind::Register, _) if insn.op1_kind() != OpKind::Register => by_width!(insn.op0_register().size(), mov_ri),
        (OpKind::Memory, kind) if kind != OpKind::Register => by_width!(insn.memory_size().size(), mov_mi),
        _ => None,
    }
}

fn mov_rr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[1]);
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

fn mov_rm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.load(uop)?;
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

fn mov_mr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[1]);
    cpu.store(uop, value)
}

fn mov_ri<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.set_reg(uop.reg[0], W::truncate(uop.imm));
    Ok(())
}

fn mov_mi<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.store(uop, W::truncate(uop.imm))
}
