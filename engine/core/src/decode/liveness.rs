//! Which instructions of a block leave flags that nobody sees.
//!
//! All flags are seen at the end of a block and by whatever may fault, exit or be interrupted, so that state is precise wherever it is
//! looked at. Only instructions listed here are trusted to do none of these.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::model::Silicon;
use crate::state::rflags::{ARITHMETIC, CF, OF};

/// What an instruction does to the arithmetic flags, as bits of RFLAGS.
struct Effect {
    reads: u64,
    /// Replaced whatever the operands are.
    kills: u64,
}

/// For each instruction of a block: nobody sees the flags that it leaves.
pub fn dead_flags(block: &[Instruction], silicon: Silicon) -> Vec<bool> {
    let replaced = block.iter().map(|insn| effect(insn, silicon).kills);
    replaced.zip(live_flags(block, silicon)).map(|(kills, live)| kills != 0 && kills & live == 0).collect()
}

/// For each instruction of a block: the flags behind it that somebody sees.
pub fn live_flags(block: &[Instruction], silicon: Silicon) -> Vec<u64> {
    let mut live = ARITHMETIC;
    let mut after = vec![0; block.len()];
    for (insn, after) in block.iter().zip(&mut after).rev() {
        let effect = effect(insn, silicon);
        *after = live;
        live = live & !effect.kills | effect.reads;
    }
    after
}

fn effect(insn: &Instruction, silicon: Silicon) -> Effect {
    let reads = iced_bits(insn.rflags_read());
    match kills(insn, silicon) {
        Some(kills) if in_registers(insn) => Effect { reads, kills },
        // The instruction may fault before it replaces them.
        Some(kills) => Effect { reads: ARITHMETIC, kills },
        None => Effect { reads: ARITHMETIC, kills: 0 },
    }
}

fn in_registers(insn: &Instruction) -> bool {
    insn.mnemonic() == Mnemonic::Lea || (0..insn.op_count()).all(|n| insn.op_kind(n) != OpKind::Memory)
}

/// The flags that a trusted instruction replaces; `None` for the others.
fn kills(insn: &Instruction, silicon: Silicon) -> Option<u64> {
    use Mnemonic::*;
    Some(match insn.mnemonic() {
        Add | Or | Adc | Sbb | And | Sub | Xor | Cmp | Test | Neg => ARITHMETIC,
        Imul | Mul if silicon == Silicon::Amd => CF | OF,
        Imul | Mul => ARITHMETIC,
        Inc | Dec => ARITHMETIC & !CF,
        Shl | Sal | Shr | Sar if counted(insn) => ARITHMETIC,
        Rol | Ror if counted(insn) => CF | OF,
        // The count may be zero.
        Shl | Sal | Shr | Sar if insn.op1_kind() == OpKind::Register => 0,
        Shlx | Shrx | Sarx | Rorx | Xchg | Cwd | Cbw => 0,
        Mov if general(insn) => 0,
        Movzx | Movsx | Movsxd | Lea | Not | Bswap | Nop | Cdq | Cqo | Cdqe | Cwde => 0,
        Cmova | Cmovae | Cmovb | Cmovbe | Cmove | Cmovg | Cmovge | Cmovl | Cmovle | Cmovne | Cmovno | Cmovnp | Cmovns | Cmovo | Cmovp
        | Cmovs => 0,
        Seta | Setae | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns | Seto | Setp | Sets => 0,
        _ => return None,
    })
}

/// Whether a shift has a count that is an immediate and not zero.
fn counted(insn: &Instruction) -> bool {
    insn.op1_kind() == OpKind::Immediate8 && insn.immediate8() & 0x1f != 0
}

/// Whether a MOV has no segment, control or debug register.
fn general(insn: &Instruction) -> bool {
    (0..insn.op_count()).all(|n| insn.op_kind(n) != OpKind::Register || insn.op_register(n).is_gpr())
}

/// The arithmetic flags of a set of iced's.
fn iced_bits(set: u32) -> u64 {
    use crate::state::rflags::{AF, PF, SF, ZF};
    use iced_x86::RflagsBits;
    let pairs = [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ];
    pairs.iter().filter(|(theirs, _)| set & theirs != 0).map(|(_, ours)| ours).sum()
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn dead(code: &[u8]) -> Vec<bool> {
        let block: Vec<_> = Decoder::new(64, code, DecoderOptions::NONE).into_iter().collect();
        dead_flags(&block, Silicon::Intel)
    }

    #[test]
    fn flags_die_before_a_replacement() {
        // add rax, rbx; lea rcx, [rax]; sub rcx, rax
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0x8d, 0x08, 0x48, 0x29, 0xc1]), [true, false, false]);
    }

    #[test]
    fn memory_sees_all_flags() {
        // add rax, rbx; mov rcx, [rax]; sub rcx, rax
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0x8b, 0x08, 0x48, 0x29, 0xc1]), [false; 3]);
        // add rax, rbx; sub rcx, [rax]
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0x2b, 0x08]), [false; 2]);
    }

    #[test]
    fn readers_and_partial_replacements_keep_flags() {
        // add rax, rbx; adc rcx, rdx; add rax, rax
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0x11, 0xd1, 0x48, 0x01, 0xc0]), [false, true, false]);
        // add rax, rbx; inc rcx
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0xff, 0xc1]), [false; 2]);
        // add rax, rbx; shl rcx, cl
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0xd3, 0xe1]), [false; 2]);
        // add rax, rbx; shl rcx, 0; shl rcx, 1
        assert_eq!(dead(&[0x48, 0x01, 0xd8, 0x48, 0xc1, 0xe1, 0, 0x48, 0xd1, 0xe1]), [false; 3]);
    }
}
