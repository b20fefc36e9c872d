//! From instruction bytes to micro-ops.
//!
//! The decoder is iced-x86; this module turns its instructions into the engine's operand encoding. Instructions are decoded at their
//! distance from the block's first byte, so a block serves every linear address that maps to it.

pub mod block;
pub mod cache;
pub(crate) mod feature;
pub mod liveness;

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::CodeSize;
use crate::exec;
use crate::model::Model;
use crate::uop::{flag, slot, Handler, Uop, RIP_STRIDE};

/// Longest instruction, in bytes.
pub const MAX_LENGTH: usize = 15;

/// Length of the instruction that `bytes` begin with; `None` if there is no such instruction, or if its end lies behind them.
///
/// This is the decoder that CPUs of `model` use, for hypervisors that have to step over an instruction whose length nobody told them.
pub fn length(bytes: &[u8], size: CodeSize, model: &Model) -> Option<usize> {
    let insn = block::decoder(bytes, size, model).decode();
    (!insn.is_invalid()).then(|| insn.len())
}

/// The micro-op of `insn`, which starts `insn.ip()` bytes behind the block's first byte. What `model` lacks is undefined.
pub fn lower(insn: &Instruction, size: CodeSize, model: &Model) -> Uop {
    let insn = &without_void_override(*insn, size);
    let run = if feature::offers(model, insn) { exec::handler(insn, size).unwrap_or(exec::unknown as Handler) } else { exec::undefined };
    let mut uop = Uop {
        run,
        imm: 0,
        disp: 0,
        code: insn.code() as u16,
        offset: insn.ip() as u16,
        reg: [0; 3],
        base: slot::ZERO * 8,
        index: slot::ZERO * 8,
        segment_scale: 6 << 2,
        flags: prefix_flags(insn, size),
        length: insn.len() as u8,
    };
    let mut immediates = 0;
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::Register if n < 3 => uop.reg[n as usize] = register(insn.op_register(n)),
            // The mask of a blend.
            OpKind::Register => uop.imm = register(insn.op_register(n)).into(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                let target = insn.near_branch_target();
                uop.imm = if insn.op_kind(n) == OpKind::NearBranch64 { target } else { target as i32 as i64 as u64 };
            }
            OpKind::FarBranch16 => (uop.imm, uop.disp) = (insn.far_branch16().into(), insn.far_branch_selector().into()),
            OpKind::FarBranch32 => (uop.imm, uop.disp) = (insn.far_branch32().into(), insn.far_branch_selector().into()),
            OpKind::Memory => memory(&mut uop, insn, size),
            OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => set_segment(&mut uop, insn.memory_segment()),
            OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => set_segment(&mut uop, insn.memory_segment()),
            kind if is_immediate(kind) => {
                // ENTER and EXTRQ/INSERTQ have two; the second fits the displacement field.
                if immediates == 0 {
                    uop.imm = insn.immediate(n);
                } else {
                    uop.disp = insn.immediate(n) as i32;
                }
                immediates += 1;
            }
            _ => {}
        }
    }
    uop.flags |= string_address_flags(insn);
    uop
}

/// 64-bit mode ignores overrides of segments that have no base there: an address from RSP or RBP stays one of the stack, with #SS
/// (SDM vol. 1, 3.3.4).
fn without_void_override(mut insn: Instruction, size: CodeSize) -> Instruction {
    let void = matches!(insn.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if size == CodeSize::Bits64 && void {
        insn.set_segment_prefix(Register::None);
    }
    insn
}

fn is_immediate(kind: OpKind) -> bool {
    use OpKind::*;
    matches!(
        kind,
        Immediate8
            | Immediate8_2nd
            | Immediate16
            | Immediate32
            | Immediate64
            | Immediate8to16
            | Immediate8to32
            | Immediate8to64
            | Immediate32to64
    )
}

fn prefix_flags(insn: &Instruction, size: CodeSize) -> u8 {
    let mut flags = 0;
    for (on, bit) in [
        (size == CodeSize::Bits64, flag::LONG),
        (insn.has_lock_prefix(), flag::LOCK),
        (insn.has_rep_prefix(), flag::REP),
        (insn.has_repne_prefix(), flag::REPNE),
    ] {
        if on {
            flags |= bit;
        }
    }
    flags
}

/// Address size of string instructions, whose memory operands are implicit.
fn string_address_flags(insn: &Instruction) -> u8 {
    use OpKind::*;
    (0..insn.op_count()).fold(0, |flags, n| {
        flags
            | match insn.op_kind(n) {
                MemorySegSI | MemorySegDI | MemoryESDI => flag::ADDRESS_16,
                MemorySegESI | MemorySegEDI | MemoryESEDI => flag::ADDRESS_32,
                _ => 0,
            }
    })
}

/// The engine's number of a register: `8 * n` (or `8 * n + 1`) for general registers, the register's own number for the others.
pub fn register(register: Register) -> u8 {
    let number = register.number() as u8;
    if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) {
        (register as u8 - Register::AH as u8) * 8 + 1
    } else if register.is_gpr8() {
        (register.full_register() as u8 - Register::RAX as u8) * 8
    } else if register.is_gpr() {
        number * 8
    } else {
        number
    }
}

fn set_segment(uop: &mut Uop, segment: Register) {
    uop.segment_scale = uop.segment_scale & 3 | (segment.number() as u8) << 2;
}

fn memory(uop: &mut Uop, insn: &Instruction, size: CodeSize) {
    let base = insn.memory_base();
    let index = insn.memory_index();
    let scale = insn.memory_index_scale().trailing_zeros() as u8;
    uop.segment_scale = scale;
    set_segment(uop, insn.memory_segment());
    let displacement = insn.memory_displacement64();
    if index != Register::None {
        uop.index = register(index);
    }
    if base.is_ip() {
        rip_relative(uop, displacement);
    } else {
        if base != Register::None {
            uop.base = register(base);
        }
        match i32::try_from(displacement as i64) {
            Ok(disp) => uop.disp = disp,
            // 32-bit addresses have their displacements zero-extended, and are truncated again.
            Err(_) if insn.memory_displ_size() != 8 => uop.disp = displacement as i32,
            Err(_) => {
                uop.imm = displacement;
                uop.flags |= flag::ABSOLUTE | flag::SLOW_ADDRESS;
            }
        }
    }
    let width = address_width(insn);
    if width != 64 || size != CodeSize::Bits64 {
        uop.flags |= flag::SLOW_ADDRESS;
    }
    match width {
        16 => uop.flags |= flag::ADDRESS_16,
        32 => uop.flags |= flag::ADDRESS_32,
        _ => {}
    }
}

/// A RIP-relative operand: `target` is relative to the block's first byte.
fn rip_relative(uop: &mut Uop, target: u64) {
    uop.base = slot::RIP * 8;
    if let Ok(disp) = i32::try_from(target as i64) {
        uop.disp = disp;
    } else {
        // Only the top of the displacement's range, moved up by the place in the block, gets here.
        uop.index = slot::STRIDE * 8;
        uop.segment_scale |= 1;
        uop.disp = (target as i64 - RIP_STRIDE) as i32;
    }
}

/// Address size of the memory operand, in bits.
fn address_width(insn: &Instruction) -> u32 {
    // The index of a gather is a vector.
    let named = [insn.memory_base(), insn.memory_index()].into_iter().find(|register| register.is_gpr() || register.is_ip());
    match named {
        Some(Register::EIP) => 32,
        Some(Register::RIP) => 64,
        Some(register) => register.size() as u32 * 8,
        None => match insn.memory_displ_size() {
            2 => 16,
            4 => 32,
            _ => 64,
        },
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn uop(bits: u32, bytes: &[u8]) -> Uop {
        let size = match bits {
            16 => CodeSize::Bits16,
            32 => CodeSize::Bits32,
            _ => CodeSize::Bits64,
        };
        lower(&Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE).decode(), size, &Model::default())
    }

    #[test]
    fn high_byte_registers_have_odd_offsets() {
        let mov_ah_cl = uop(64, &[0x88, 0xcc]);
        assert_eq!(mov_ah_cl.reg[..2], [1, 8]);
        let mov_spl_r15b = uop(64, &[0x44, 0x88, 0xfc]);
        assert_eq!(mov_spl_r15b.reg[..2], [32, 120]);
    }

    #[test]
    fn addresses_keep_their_width() {
        let slow = |bits, bytes: &[u8]| uop(bits, bytes).flags & (flag::SLOW_ADDRESS | flag::ADDRESS_16 | flag::ADDRESS_32);
        assert_eq!(slow(64, &[0x8b, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12]), 0);
        assert_eq!(slow(64, &[0x67, 0x8b, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12]), flag::SLOW_ADDRESS | flag::ADDRESS_32);
        assert_eq!(slow(64, &[0x67, 0x8b, 0x00]), flag::SLOW_ADDRESS | flag::ADDRESS_32);
        assert_eq!(slow(32, &[0x8b, 0x05, 0x78, 0x56, 0x34, 0xf2]), flag::SLOW_ADDRESS | flag::ADDRESS_32);
        assert_eq!(slow(16, &[0x8b, 0x00]), flag::SLOW_ADDRESS | flag::ADDRESS_16);
        assert_eq!(slow(16, &[0xa1, 0x34, 0x12]), flag::SLOW_ADDRESS | flag::ADDRESS_16);
    }

    #[test]
    fn rip_relative_operands_count_from_the_block() {
        let load = uop(64, &[0x48, 0x8b, 0x05, 0x10, 0, 0, 0]);
        assert_eq!((load.base, load.disp), (slot::RIP * 8, 0x17));
        let far = uop(64, &[0x48, 0x8b, 0x05, 0xff, 0xff, 0xff, 0x7f]);
        assert_eq!(i64::from(far.disp) + RIP_STRIDE, 0x7fff_ffff + 7);
        assert_eq!((far.index, far.segment_scale & 3), (slot::STRIDE * 8, 1));
        let backwards = uop(64, &[0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff]);
        assert_eq!(backwards.disp, 0);
    }

    #[test]
    fn branches_are_relative_to_the_block() {
        assert_eq!(uop(64, &[0xeb, 0xfe]).imm, 0);
        assert_eq!(uop(64, &[0xe8, 0xfb, 0xff, 0xff, 0xff]).imm as i64, 0);
        assert_eq!(uop(32, &[0xeb, 0xf0]).imm as i64, -14);
        assert_eq!(uop(16, &[0xeb, 0xf0]).imm as i64 & 0xffff, 0xfff2);
    }

    #[test]
    fn length_counts_prefixes_and_follows_the_code_size() {
        assert_eq!(length(&[0x66, 0x2e, 0x67, 0x48, 0x0f, 0xa2, 0x90], CodeSize::Bits64, &Model::default()), Some(6));
        let mov_eax_imm = [0xb8, 1, 2, 3, 4];
        assert_eq!(length(&mov_eax_imm, CodeSize::Bits32, &Model::default()), Some(5));
        assert_eq!(length(&mov_eax_imm, CodeSize::Bits16, &Model::default()), Some(3));
    }

    #[test]
    fn length_of_what_is_no_instruction_is_unknown() {
        assert_eq!(length(&[0x0f], CodeSize::Bits64, &Model::default()), None);
        assert_eq!(length(&[], CodeSize::Bits64, &Model::default()), None);
        assert_eq!(length(&[0x06], CodeSize::Bits64, &Model::default()), None);
        let mut too_long = [0x66; 16];
        too_long[14..].copy_from_slice(&[0x0f, 0xa2]);
        assert_eq!(length(&too_long, CodeSize::Bits64, &Model::default()), None);
        assert_eq!(length(&too_long[1..], CodeSize::Bits64, &Model::default()), Some(15));
    }

    #[test]
    fn a_64_bit_offset_is_absolute() {
        let load = uop(64, &[0x48, 0xa1, 8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(load.imm, 0x0102_0304_0506_0708);
        assert_ne!(load.flags & flag::ABSOLUTE, 0);
    }
}
