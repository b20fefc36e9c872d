//! Lanes to and from general registers and memory: PEXTRx, PINSRx, EXTRACTPS, INSERTPS, PMOVMSKB, MOVMSKPS, MOVMSKPD (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::Lane;
use super::operand::{by_encoding, is_memory, is_mm, vector_source, Encoding, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let store = is_memory(insn, 0);
    let load = is_memory(insn, 1) || is_memory(insn, 2);
    Some(match insn.mnemonic() {
        Mnemonic::Pmovmskb if is_mm(insn, 1) => mask_mm,
        Mnemonic::Pmovmskb | Mnemonic::Vpmovmskb => vector_source!(insn, mask, u8),
        Mnemonic::Movmskps | Mnemonic::Vmovmskps => vector_source!(insn, mask, u32),
        Mnemonic::Movmskpd | Mnemonic::Vmovmskpd => vector_source!(insn, mask, u64),
        Mnemonic::Pextrw if is_mm(insn, 1) => extract_mm,
        Mnemonic::Pinsrw if is_mm(insn, 0) && load => insert_mm_memory,
        Mnemonic::Pinsrw if is_mm(insn, 0) => insert_mm,
        Mnemonic::Pextrb | Mnemonic::Vpextrb if store => by_encoding!(insn, extract_memory, u8),
        Mnemonic::Pextrw | Mnemonic::Vpextrw if store => by_encoding!(insn, extract_memory, u16),
        Mnemonic::Pextrd | Mnemonic::Vpextrd | Mnemonic::Extractps | Mnemonic::Vextractps if store => {
            by_encoding!(insn, extract_memory, u32)
        }
        Mnemonic::Pextrq | Mnemonic::Vpextrq if store => by_encoding!(insn, extract_memory, u64),
        Mnemonic::Pextrb | Mnemonic::Vpextrb => by_encoding!(insn, extract, u8),
        Mnemonic::Pextrw | Mnemonic::Vpextrw => by_encoding!(insn, extract, u16),
        Mnemonic::Pextrd | Mnemonic::Vpextrd | Mnemonic::Extractps | Mnemonic::Vextractps => by_encoding!(insn, extract, u32),
        Mnemonic::Pextrq | Mnemonic::Vpextrq => by_encoding!(insn, extract, u64),
        Mnemonic::Pinsrb | Mnemonic::Vpinsrb if load => by_encoding!(insn, insert_memory, u8),
        Mnemonic::Pinsrw | Mnemonic::Vpinsrw if load => by_encoding!(insn, insert_memory, u16),
        Mnemonic::Pinsrd | Mnemonic::Vpinsrd if load => by_encoding!(insn, insert_memory, u32),
        Mnemonic::Pinsrq | Mnemonic::Vpinsrq if load => by_encoding!(insn, insert_memory, u64),
        Mnemonic::Pinsrb | Mnemonic::Vpinsrb => by_encoding!(insn, insert, u8),
        Mnemonic::Pinsrw | Mnemonic::Vpinsrw => by_encoding!(insn, insert, u16),
        Mnemonic::Pinsrd | Mnemonic::Vpinsrd => by_encoding!(insn, insert, u32),
        Mnemonic::Pinsrq | Mnemonic::Vpinsrq => by_encoding!(insn, insert, u64),
        Mnemonic::Insertps | Mnemonic::Vinsertps if load => by_encoding!(insn, insert_single_memory),
        Mnemonic::Insertps | Mnemonic::Vinsertps => by_encoding!(insn, insert_single),
        _ => return None,
    })
}

/// The top bit of every lane; the general register is written whole.
fn mask<L: Lane, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let [low, high] = S::vector(cpu, uop)?.map(|half| top_bits::<L>(&half.to_le_bytes()));
    cpu.set_reg::<u64>(uop.reg[0], high << (16 / L::BYTES) | low);
    Ok(())
}

#[inline(always)]
fn top_bits<L: Lane>(bytes: &[u8]) -> u64 {
    let mut bits = 0;
    for n in 0..bytes.len() / L::BYTES {
        bits |= u64::from(bytes[(n + 1) * L::BYTES - 1] >> 7) << n;
    }
    bits
}

fn mask_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let bits = top_bits::<u8>(&cpu.mm(uop.reg[1]).to_le_bytes());
    cpu.touch_mmx();
    cpu.set_reg::<u64>(uop.reg[0], bits);
    Ok(())
}

/// The lane that the immediate selects.
#[inline(always)]
fn selected<L: Lane>(uop: &Uop) -> usize {
    uop.imm as usize & (16 / L::BYTES - 1)
}

fn extract<L: Lane + Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = L::get(&cpu.xmm(uop.reg[1]).to_le_bytes(), selected::<L>(uop));
    cpu.set_reg::<u64>(uop.reg[0], lane.zero_extend());
    Ok(())
}

fn extract_memory<L: Lane + Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = L::get(&cpu.xmm(uop.reg[1]).to_le_bytes(), selected::<L>(uop));
    cpu.store(uop, lane)
}

fn insert_lane<L: Lane, E: Encoding>(cpu: &mut Cpu, uop: &Uop, lane: L) {
    let mut bytes = cpu.xmm(E::first(uop)).to_le_bytes();
    lane.put(&mut bytes, selected::<L>(uop));
    E::put_xmm(cpu, uop.reg[0], u128::from_le_bytes(bytes));
}

fn insert<L: Lane + Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = cpu.reg::<L>(E::second(uop));
    insert_lane::<L, E>(cpu, uop, lane);
    Ok(())
}

fn insert_memory<L: Lane + Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = cpu.load::<L>(uop)?;
    insert_lane::<L, E>(cpu, uop, lane);
    Ok(())
}

fn extract_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let word = u16::get(&cpu.mm(uop.reg[1]).to_le_bytes(), uop.imm as usize & 3);
    cpu.touch_mmx();
    cpu.set_reg::<u64>(uop.reg[0], word.into());
    Ok(())
}

fn insert_mm_word(cpu: &mut Cpu, uop: &Uop, word: u16) {
    let mut bytes = cpu.mm(uop.reg[0]).to_le_bytes();
    word.put(&mut bytes, uop.imm as usize & 3);
    cpu.touch_mmx();
    cpu.set_mm(uop.reg[0], u64::from_le_bytes(bytes));
}

fn insert_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let word = cpu.reg::<u16>(uop.reg[1]);
    insert_mm_word(cpu, uop, word);
    Ok(())
}

fn insert_mm_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let word = cpu.load::<u16>(uop)?;
    insert_mm_word(cpu, uop, word);
    Ok(())
}

/// INSERTPS: immediate bits 5:4 place, bits 3:0 lanes to clear.
fn insert_float<E: Encoding>(cpu: &mut Cpu, uop: &Uop, lane: u32) {
    let mut bytes = cpu.xmm(E::first(uop)).to_le_bytes();
    lane.put(&mut bytes, uop.imm as usize >> 4 & 3);
    for n in 0..4 {
        if uop.imm >> n & 1 != 0 {
            0u32.put(&mut bytes, n);
        }
    }
    E::put_xmm(cpu, uop.reg[0], u128::from_le_bytes(bytes));
}

fn insert_single<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = u32::get(&cpu.xmm(E::second(uop)).to_le_bytes(), uop.imm as usize >> 6 & 3);
    insert_float::<E>(cpu, uop, lane);
    Ok(())
}

fn insert_single_memory<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let lane = cpu.load::<u32>(uop)?;
    insert_float::<E>(cpu, uop, lane);
    Ok(())
}
