//! PMOVSX and PMOVZX: the low lanes, widened (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::{build, Lane};
use super::operand::is_memory;
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// Picks the handler that widens `$from` to `$to`, by how many bytes the source has.
macro_rules! widen {
    ($insn:ident, $from:ty => $to:ty) => {
        match (is_memory($insn, 1), $insn.memory_size().size()) {
            (false, _) => widen_register::<$from, $to>,
            (_, 2) => widen_memory::<u16, $from, $to>,
            (_, 4) => widen_memory::<u32, $from, $to>,
            _ => widen_memory::<u64, $from, $to>,
        }
    };
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Pmovsxbw => widen!(insn, i8 => i16),
        Mnemonic::Pmovsxbd => widen!(insn, i8 => i32),
        Mnemonic::Pmovsxbq => widen!(insn, i8 => i64),
        Mnemonic::Pmovsxwd => widen!(insn, i16 => i32),
        Mnemonic::Pmovsxwq => widen!(insn, i16 => i64),
        Mnemonic::Pmovsxdq => widen!(insn, i32 => i64),
        Mnemonic::Pmovzxbw => widen!(insn, u8 => u16),
        Mnemonic::Pmovzxbd => widen!(insn, u8 => u32),
        Mnemonic::Pmovzxbq => widen!(insn, u8 => u64),
        Mnemonic::Pmovzxwd => widen!(insn, u16 => u32),
        Mnemonic::Pmovzxwq => widen!(insn, u16 => u64),
        Mnemonic::Pmovzxdq => widen!(insn, u32 => u64),
        _ => return None,
    })
}

fn widen<From: Lane, To: Lane + core::convert::From<From>>(cpu: &mut Cpu, uop: &Uop, low: u64) {
    let bytes = low.to_le_bytes();
    let result = build::<To, 16>(|n| To::from(From::get(&bytes, n)));
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(result));
}

fn widen_register<From: Lane, To: Lane + core::convert::From<From>>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let low = cpu.xmm(uop.reg[1]) as u64;
    widen::<From, To>(cpu, uop, low);
    Ok(())
}

fn widen_memory<W: Word, From: Lane, To: Lane + core::convert::From<From>>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let low = cpu.load::<W>(uop)?.zero_extend();
    widen::<From, To>(cpu, uop, low);
    Ok(())
}
