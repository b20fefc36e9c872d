//! Lanes to and from general registers and memory: PEXTRx, PINSRx, EXTRACTPS, INSERTPS, PMOVMSKB, MOVMSKPS, MOVMSKPD (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::lanes::Lane;
use super::operand::{is_memory, is_mm};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let store = is_memory(insn, 0);
    let load = is_memory(insn, 1);
    Some(match insn.mnemonic() {
        Mnemonic::Pmovmskb if is_mm(insn, 1) => mask_mm,
        Mnemonic::Pmovmskb => mask::<u8>,
        Mnemonic::Movmskps => mask::<u32>,
        Mnemonic::Movmskpd => mask::<u64>,
        Mnemonic::Pextrw if is_mm(insn, 1) => extract_mm,
        Mnemonic::Pinsrw if is_mm(insn, 0) && load => insert_mm_memory,
        Mnemonic::Pinsrw if is_mm(insn, 0) => insert_mm,
        Mnemonic::Pextrb if store => extract_memory::<u8>,
        Mnemonic::Pextrw if store => extract_memory::<u16>,
        Mnemonic::Pextrd | Mnemonic::Extractps if store => extract_memory::<u32>,
        Mnemonic::Pextrq if store => extract_memory::<u64>,
        Mnemonic::Pextrb => extract::<u8>,
        Mnemonic::Pextrw => extract::<u16>,
        Mnemonic::Pextrd | Mnemonic::Extractps => extract::<u32>,
        Mnemonic::Pextrq => extract::<u64>,
        Mnemonic::Pinsrb if load => insert_memory::<u8>,
        Mnemonic::Pinsrw if load => insert_memory::<u16>,
        Mnemonic::Pinsrd if load => insert_memory::<u32>,
        Mnemonic::Pinsrq if load => insert_memory::<u64>,
        Mnemonic::Pinsrb => insert::<u8>,
        Mnemonic::Pinsrw => insert::<u16>,
        Mnemonic::Pinsrd => insert::<u32>,
        Mnemonic::Pinsrq => insert::<u64>,
        Mnemonic::Insertps if load => insert_single_memory,
        Mnemonic::Insertps => insert_single,
        _ => return None,
    })
}

/// The top bit of every lane; the general register is written whole.
fn mask<L: Lane>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let bytes = cpu.xmm(uop.reg[1]).to_le_bytes();
    let bits = top_bits::<L>(&bytes);
    cpu.set_reg::<u64>(uop.reg[0], bits);
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

fn extract<L: Lane + Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = L::get(&cpu.xmm(uop.reg[1]).to_le_bytes(), selected::<L>(uop));
    cpu.set_reg::<u64>(uop.reg[0], lane.zero_extend());
    Ok(())
}

fn extract_memory<L: Lane + Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = L::get(&cpu.xmm(uop.reg[1]).to_le_bytes(), selected::<L>(uop));
    cpu.store(uop, lane)
}

fn insert_lane<L: Lane>(cpu: &mut Cpu, uop: &Uop, lane: L) {
    let mut bytes = cpu.xmm(uop.reg[0]).to_le_bytes();
    lane.put(&mut bytes, selected::<L>(uop));
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(bytes));
}

fn insert<L: Lane + Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = cpu.reg::<L>(uop.reg[1]);
    insert_lane(cpu, uop, lane);
    Ok(())
}

fn insert_memory<L: Lane + Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = cpu.load::<L>(uop)?;
    insert_lane(cpu, uop, lane);
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
fn insert_float(cpu: &mut Cpu, uop: &Uop, lane: u32) {
    let mut bytes = cpu.xmm(uop.reg[0]).to_le_bytes();
    lane.put(&mut bytes, uop.imm as usize >> 4 & 3);
    for n in 0..4 {
        if uop.imm >> n & 1 != 0 {
            0u32.put(&mut bytes, n);
        }
    }
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(bytes));
}

fn insert_single(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = u32::get(&cpu.xmm(uop.reg[1]).to_le_bytes(), uop.imm as usize >> 6 & 3);
    insert_float(cpu, uop, lane);
    Ok(())
}

fn insert_single_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let lane = cpu.load::<u32>(uop)?;
    insert_float(cpu, uop, lane);
    Ok(())
}
