//! Data movement: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, BSWAP, MOVBE, XLAT, the CBW and CWD families, LAHF and SAHF, and stores with
//! hints (SDM vol. 1, 7.3.1; vol. 2 for each).

use core::cell::Cell;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::select::{condition, holds, in_memory, width};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::paging::AccessKind;
use crate::state::{gpr, rflags};
use crate::uop::{flag, Exec, Handler, RegOffset, Uop};
use crate::word::Word;

/// Register file offset of AH.
const AH: RegOffset = 1;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Mov => mov(insn),
        Movzx => zero_extension(insn),
        Movsx | Movsxd => sign_extension(insn),
        Lea => by_wide_width!(width(insn, 0), lea),
        Xchg if in_memory(insn, 0) => by_width!(width(insn, 1), xchg_mr),
        Xchg => by_width!(width(insn, 0), xchg_rr),
        Bswap => bswap(insn),
        Movbe if in_memory(insn, 0) => by_wide_width!(width(insn, 1), movbe_mr),
        Movbe => by_wide_width!(width(insn, 0), movbe_rm),
        Xlatb => Some(xlat),
        Salc => Some(set_al_from_carry),
        Cbw => Some(extend_accumulator::<u8, u16>),
        Cwde => Some(extend_accumulator::<u16, u32>),
        Cdqe => Some(extend_accumulator::<u32, u64>),
        Cwd => Some(sign_into_rdx::<u16>),
        Cdq => Some(sign_into_rdx::<u32>),
        Cqo => Some(sign_into_rdx::<u64>),
        Lahf => Some(lahf),
        Sahf => Some(sahf),
        Movnti => by_wide_width!(width(insn, 1), mov_mr),
        Movdiri => by_wide_width!(width(insn, 1), mov_mr),
        _ => conditional_move(insn),
    }
}

fn mov(insn: &Instruction) -> Option<Handler> {
    if !insn.op0_register().is_gpr() && insn.op0_kind() == OpKind::Register {
        return None; // segment, control and debug registers: other families
    }
    match (insn.op0_kind(), insn.op1_kind()) {
        (OpKind::Register, OpKind::Register) if insn.op1_register().is_gpr() => by_width!(insn.op0_register().size(), mov_rr),
        (OpKind::Register, OpKind::Memory) => by_width!(insn.op0_register().size(), mov_rm),
        (OpKind::Memory, OpKind::Register) if insn.op1_register().is_gpr() => by_width!(insn.op1_register().size(), mov_mr),
        (OpKind::Register, kind) if kind != OpKind::Register => by_width!(insn.op0_register().size(), mov_ri),
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

// ---- widening -------------------------------------------------------------------------------------------------------------------------

fn zero_extension(insn: &Instruction) -> Option<Handler> {
    // A 32-bit write clears the upper half, so it also serves 64-bit destinations.
    match (width(insn, 0), width(insn, 1), in_memory(insn, 1)) {
        (2, 1, false) => Some(movzx_rr::<u8, u16>),
        (2, 1, true) => Some(movzx_rm::<u8, u16>),
        (2, 2, false) => Some(mov_rr::<u16>),
        (2, 2, true) => Some(mov_rm::<u16>),
        (_, 1, false) => Some(movzx_rr::<u8, u32>),
        (_, 1, true) => Some(movzx_rm::<u8, u32>),
        (_, 2, false) => Some(movzx_rr::<u16, u32>),
        (_, 2, true) => Some(movzx_rm::<u16, u32>),
        _ => None,
    }
}

fn movzx_rr<S: Word, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: S = cpu.reg(uop.reg[1]);
    cpu.set_reg(uop.reg[0], D::truncate(value.zero_extend()));
    Ok(())
}

fn movzx_rm<S: Word, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: S = cpu.load(uop)?;
    cpu.set_reg(uop.reg[0], D::truncate(value.zero_extend()));
    Ok(())
}

fn sign_extension(insn: &Instruction) -> Option<Handler> {
    match (width(insn, 1), in_memory(insn, 1)) {
        (1, false) => by_wide_width!(width(insn, 0), movsx_rr, u8),
        (1, true) => by_wide_width!(width(insn, 0), movsx_rm, u8),
        (2, false) => by_wide_width!(width(insn, 0), movsx_rr, u16),
        (2, true) => by_wide_width!(width(insn, 0), movsx_rm, u16),
        (4, false) => by_wide_width!(width(insn, 0), movsx_rr, u32),
        (4, true) => by_wide_width!(width(insn, 0), movsx_rm, u32),
        _ => None,
    }
}

fn movsx_rr<S: Word, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: S = cpu.reg(uop.reg[1]);
    cpu.set_reg(uop.reg[0], D::truncate(value.sign_extend()));
    Ok(())
}

fn movsx_rm<S: Word, D: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: S = cpu.load(uop)?;
    cpu.set_reg(uop.reg[0], D::truncate(value.sign_extend()));
    Ok(())
}

/// CBW, CWDE, CDQE.
fn extend_accumulator<S: Word, D: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let value: S = cpu.reg(gpr::RAX as u8 * 8);
    cpu.set_reg(gpr::RAX as u8 * 8, D::truncate(value.sign_extend()));
    Ok(())
}

/// CWD, CDQ, CQO.
fn sign_into_rdx<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let negative = cpu.reg::<W>(gpr::RAX as u8 * 8).top_bit();
    cpu.set_reg(gpr::RDX as u8 * 8, if negative { !W::ZERO } else { W::ZERO });
    Ok(())
}

// ---- addresses and exchanges ----------------------------------------------------------------------------------------------------------

fn lea<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let address = if uop.has(flag::SLOW_ADDRESS) { cpu.effective_any(uop) } else { cpu.effective(uop) };
    cpu.set_reg(uop.reg[0], W::truncate(address));
    Ok(())
}

fn xchg_rr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (a, b): (W, W) = (cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]));
    cpu.set_reg(uop.reg[0], b);
    cpu.set_reg(uop.reg[1], a);
    Ok(())
}

/// XCHG with memory, which is locked without the prefix too.
fn xchg_mr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let locked = Uop { flags: uop.flags | flag::LOCK, ..*uop };
    let value: W = cpu.reg(uop.reg[1]);
    let found = Cell::new(W::ZERO);
    cpu.modify(&locked, |_, old| {
        found.set(old);
        value
    })?;
    cpu.set_reg(uop.reg[1], found.get());
    Ok(())
}

fn xlat(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let address = cpu.reg::<u64>(uop.base).wrapping_add(cpu.reg::<u8>(gpr::RAX as u8 * 8).into());
    let la = cpu.segment_address(uop.segment(), address & uop.address_mask(), 1, AccessKind::Read)?;
    let value: u8 = cpu.read(uop.segment(), la)?;
    cpu.set_reg(gpr::RAX as u8 * 8, value);
    Ok(())
}

// ---- byte order -----------------------------------------------------------------------------------------------------------------------

/// The bytes of `value` in reverse order.
#[inline(always)]
fn reverse<W: Word>(value: W) -> W {
    W::truncate(value.zero_extend().swap_bytes() >> (64 - W::BITS))
}

fn bswap(insn: &Instruction) -> Option<Handler> {
    match width(insn, 0) {
        2 => Some(bswap16),
        4 => Some(bswap_r::<u32>),
        8 => Some(bswap_r::<u64>),
        _ => None,
    }
}

fn bswap_r<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[0]);
    cpu.set_reg(uop.reg[0], reverse(value));
    Ok(())
}

/// BSWAP of 16 bits is undefined; processors clear the register.
fn bswap16(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.set_reg(uop.reg[0], 0u16);
    Ok(())
}

fn movbe_rm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.load(uop)?;
    cpu.set_reg(uop.reg[0], reverse(value));
    Ok(())
}

fn movbe_mr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[1]);
    cpu.store(uop, reverse(value))
}

/// SALC: undocumented, and on every x86 since the first.
fn set_al_from_carry(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.set_reg(gpr::RAX as u8 * 8, if cpu.flags.cf() { 0xffu8 } else { 0 });
    Ok(())
}

// ---- conditional moves ----------------------------------------------------------------------------------------------------------------

fn conditional_move(insn: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    if !matches!(
        insn.mnemonic(),
        Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
    ) {
        return None;
    }
    let condition = condition(insn)?;
    match (width(insn, 0), in_memory(insn, 1)) {
        (2, false) => by_condition!(condition, cmov_rr, u16),
        (4, false) => by_condition!(condition, cmov_rr, u32),
        (8, false) => by_condition!(condition, cmov_rr, u64),
        (2, true) => by_condition!(condition, cmov_rm, u16),
        (4, true) => by_condition!(condition, cmov_rm, u32),
        (8, true) => by_condition!(condition, cmov_rm, u64),
        _ => None,
    }
}

/// The destination is written even when the condition is false, which clears the upper half of a 32-bit one.
#[inline(always)]
fn move_if<const C: u8, W: Word>(cpu: &mut Cpu, uop: &Uop, value: W) {
    let old: W = cpu.reg(uop.reg[0]);
    cpu.set_reg(uop.reg[0], if holds::<C>(cpu.flags) { value } else { old });
}

fn cmov_rr<const C: u8, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[1]);
    move_if::<C, W>(cpu, uop, value);
    Ok(())
}

/// Memory is read whatever the condition.
fn cmov_rm<const C: u8, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.load(uop)?;
    move_if::<C, W>(cpu, uop, value);
    Ok(())
}

// ---- flags in AH ----------------------------------------------------------------------------------------------------------------------

fn lahf(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.set_reg(AH, (cpu.flags.bits() | rflags::FIXED) as u8);
    Ok(())
}

fn sahf(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let image = u64::from(cpu.reg::<u8>(AH));
    cpu.flags = Flags::from_bits(image & !rflags::OF | cpu.flags.bits() & rflags::OF);
    Ok(())
}
