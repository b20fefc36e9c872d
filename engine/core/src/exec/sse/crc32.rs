//! CRC32 (SSE4.2): the Castagnoli polynomial, on general registers (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::operand::is_memory;
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// 11EDC6F41h with the bits of each byte reversed, as the instruction works on reflected data.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Remainders of every byte.
const TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            remainder = remainder >> 1 ^ if remainder & 1 != 0 { POLYNOMIAL } else { 0 };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    if insn.mnemonic() != Mnemonic::Crc32 {
        return None;
    }
    let memory = is_memory(insn, 1);
    let size = if memory { insn.memory_size().size() } else { insn.op1_register().size() };
    Some(match (memory, size) {
        (false, 1) => from_register::<u8>,
        (false, 2) => from_register::<u16>,
        (false, 4) => from_register::<u32>,
        (false, _) => from_register::<u64>,
        (true, 1) => from_memory::<u8>,
        (true, 2) => from_memory::<u16>,
        (true, 4) => from_memory::<u32>,
        (true, _) => from_memory::<u64>,
    })
}

/// Feeds the bytes of `data` to the remainder in operand 0, whose upper half becomes zero.
fn accumulate<W: Word>(cpu: &mut Cpu, uop: &Uop, data: W) {
    let bytes = data.zero_extend().to_le_bytes();
    let crc =
        bytes[..W::BYTES as usize].iter().fold(cpu.reg::<u32>(uop.reg[0]), |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)]);
    cpu.set_reg(uop.reg[0], crc);
}

fn from_register<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let data = cpu.reg::<W>(uop.reg[1]);
    accumulate(cpu, uop, data);
    Ok(())
}

fn from_memory<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let data = cpu.load::<W>(uop)?;
    accumulate(cpu, uop, data);
    Ok(())
}
