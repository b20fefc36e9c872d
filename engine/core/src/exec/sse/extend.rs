//! PMOVSX and PMOVZX: the low lanes, widened (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::{build, Lane};
use super::operand::{is_memory, is_vex, is_ymm, Encoding, Legacy, Vex};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Plain;

/// Picks the handler that widens `$from` to `$to`, by how many bytes the source and the result have.
macro_rules! widen {
    ($insn:ident, $from:ty => $to:ty) => {
        match (is_memory($insn, 1), $insn.memory_size().size(), is_vex($insn), is_ymm($insn, 0)) {
            (false, _, false, _) => widen_register::<$from, $to, Legacy, 1>,
            (false, _, true, false) => widen_register::<$from, $to, Vex, 1>,
            (false, _, true, true) => widen_register::<$from, $to, Vex, 2>,
            (_, 2, false, _) => widen_memory::<u16, $from, $to, Legacy, 1>,
            (_, 4, false, _) => widen_memory::<u32, $from, $to, Legacy, 1>,
            (_, _, false, _) => widen_memory::<u64, $from, $to, Legacy, 1>,
            (_, 2, true, _) => widen_memory::<u16, $from, $to, Vex, 1>,
            (_, 4, true, false) => widen_memory::<u32, $from, $to, Vex, 1>,
            (_, _, true, false) => widen_memory::<u64, $from, $to, Vex, 1>,
            (_, 4, true, true) => widen_memory::<u32, $from, $to, Vex, 2>,
            (_, 8, true, true) => widen_memory::<u64, $from, $to, Vex, 2>,
            (_, _, true, true) => widen_memory::<u128, $from, $to, Vex, 2>,
        }
    };
}

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Pmovsxbw | Mnemonic::Vpmovsxbw => widen!(insn, i8 => i16),
        Mnemonic::Pmovsxbd | Mnemonic::Vpmovsxbd => widen!(insn, i8 => i32),
        Mnemonic::Pmovsxbq | Mnemonic::Vpmovsxbq => widen!(insn, i8 => i64),
        Mnemonic::Pmovsxwd | Mnemonic::Vpmovsxwd => widen!(insn, i16 => i32),
        Mnemonic::Pmovsxwq | Mnemonic::Vpmovsxwq => widen!(insn, i16 => i64),
        Mnemonic::Pmovsxdq | Mnemonic::Vpmovsxdq => widen!(insn, i32 => i64),
        Mnemonic::Pmovzxbw | Mnemonic::Vpmovzxbw => widen!(insn, u8 => u16),
        Mnemonic::Pmovzxbd | Mnemonic::Vpmovzxbd => widen!(insn, u8 => u32),
        Mnemonic::Pmovzxbq | Mnemonic::Vpmovzxbq => widen!(insn, u8 => u64),
        Mnemonic::Pmovzxwd | Mnemonic::Vpmovzxwd => widen!(insn, u16 => u32),
        Mnemonic::Pmovzxwq | Mnemonic::Vpmovzxwq => widen!(insn, u16 => u64),
        Mnemonic::Pmovzxdq | Mnemonic::Vpmovzxdq => widen!(insn, u32 => u64),
        _ => return None,
    })
}

fn widen<From, To, E, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop, source: u128)
where
    From: Lane,
    To: Lane + core::convert::From<From>,
    E: Encoding,
{
    let bytes = source.to_le_bytes();
    let lanes = 16 / To::BYTES;
    let half = |half: usize| u128::from_le_bytes(build::<To, 16>(|n| To::from(From::get(&bytes, half * lanes + n))));
    E::put(cpu, uop.reg[0], [half(0), if HALVES == 2 { half(1) } else { 0 }]);
}

fn widen_register<From, To, E, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec
where
    From: Lane,
    To: Lane + core::convert::From<From>,
    E: Encoding,
{
    E::require(cpu)?;
    let source = cpu.xmm(uop.reg[1]);
    widen::<From, To, E, HALVES>(cpu, uop, source);
    Ok(())
}

fn widen_memory<W, From, To, E, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec
where
    W: Plain + Into<u128>,
    From: Lane,
    To: Lane + core::convert::From<From>,
    E: Encoding,
{
    E::require(cpu)?;
    let source = cpu.load::<W>(uop)?.into();
    widen::<From, To, E, HALVES>(cpu, uop, source);
    Ok(())
}
