//! Vector moves: MOVAPS, MOVUPS, MOVSS, MOVSD, MOVD, MOVQ, MOVLPS, MOVHPS, MOVDDUP and siblings (SDM vol. 1, 10.4.1.1 and 11.4.1.1).

use iced_x86::{Code, Instruction, Mnemonic};

use super::operand::{by_encoding, is_memory, is_mm, is_xmm, vector_source, whole_vector, Encoding, Legacy, Source, Vex};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

const LOW64: u128 = u64::MAX as u128;
const LOW32: u128 = u32::MAX as u128;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    let load = is_memory(insn, 1);
    let store = is_memory(insn, 0);
    Some(match insn.mnemonic() {
        Mnemonic::Movaps | Mnemonic::Vmovaps | Mnemonic::Movapd | Mnemonic::Vmovapd | Mnemonic::Movdqa | Mnemonic::Vmovdqa => {
            match (load, store) {
                (true, _) => whole_vector!(insn, load_whole, true),
                (_, true) => whole_vector!(insn, store_whole, true),
                _ => vector_source!(insn, copy),
            }
        }
        Mnemonic::Movups
        | Mnemonic::Vmovups
        | Mnemonic::Movupd
        | Mnemonic::Vmovupd
        | Mnemonic::Movdqu
        | Mnemonic::Vmovdqu
        | Mnemonic::Lddqu
        | Mnemonic::Vlddqu => match (load, store) {
            (true, _) => whole_vector!(insn, load_whole, false),
            (_, true) => whole_vector!(insn, store_whole, false),
            _ => vector_source!(insn, copy),
        },
        Mnemonic::Movss | Mnemonic::Vmovss if load => by_encoding!(insn, load_32),
        Mnemonic::Movss | Mnemonic::Vmovss if store => by_encoding!(insn, store_32),
        Mnemonic::Movss | Mnemonic::Vmovss => by_encoding!(insn, merge_32),
        Mnemonic::Movsd => return movsd(insn),
        Mnemonic::Vmovsd if load => load_64::<Vex>,
        Mnemonic::Vmovsd if store => store_64::<Vex>,
        Mnemonic::Vmovsd => merge_64::<Vex>,
        Mnemonic::Movd | Mnemonic::Movq | Mnemonic::Vmovd | Mnemonic::Vmovq => return movd_movq(insn),
        // With a memory destination there are two operands, in the VEX encoding too.
        Mnemonic::Movlps | Mnemonic::Vmovlps | Mnemonic::Movlpd | Mnemonic::Vmovlpd if store => by_encoding!(insn, store_64),
        Mnemonic::Movlps | Mnemonic::Vmovlps | Mnemonic::Movlpd | Mnemonic::Vmovlpd => by_encoding!(insn, load_low),
        Mnemonic::Movhps | Mnemonic::Vmovhps | Mnemonic::Movhpd | Mnemonic::Vmovhpd if store => by_encoding!(insn, store_high),
        Mnemonic::Movhps | Mnemonic::Vmovhps | Mnemonic::Movhpd | Mnemonic::Vmovhpd => by_encoding!(insn, load_high),
        Mnemonic::Movhlps | Mnemonic::Vmovhlps => by_encoding!(insn, high_to_low),
        Mnemonic::Movlhps | Mnemonic::Vmovlhps => by_encoding!(insn, low_to_high),
        Mnemonic::Movdq2q => low_to_mm,
        Mnemonic::Movq2dq => mm_to_low,
        Mnemonic::Movddup | Mnemonic::Vmovddup => vector_source!(insn, duplicate_64),
        Mnemonic::Movsldup | Mnemonic::Vmovsldup => vector_source!(insn, duplicate_even),
        Mnemonic::Movshdup | Mnemonic::Vmovshdup => vector_source!(insn, duplicate_odd),
        _ => return None,
    })
}

/// The mnemonic is also a string instruction's.
fn movsd(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Movsd_xmm_xmmm64 if is_memory(insn, 1) => Some(load_64::<Legacy>),
        Code::Movsd_xmmm64_xmm if is_memory(insn, 0) => Some(store_64::<Legacy>),
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm => Some(merge_64::<Legacy>),
        _ => None,
    }
}

fn movd_movq(insn: &Instruction) -> Option<Handler> {
    let wide = matches!(insn.mnemonic(), Mnemonic::Movq | Mnemonic::Vmovq);
    Some(if is_mm(insn, 0) {
        match (is_mm(insn, 1), is_memory(insn, 1), wide) {
            (true, ..) => copy_mm,
            (_, true, true) => load_mm::<u64>,
            (_, true, false) => load_mm::<u32>,
            (_, false, true) => gpr_to_mm::<u64>,
            (_, false, false) => gpr_to_mm::<u32>,
        }
    } else if is_mm(insn, 1) {
        match (is_memory(insn, 0), wide) {
            (true, true) => store_mm::<u64>,
            (true, false) => store_mm::<u32>,
            (false, true) => mm_to_gpr::<u64>,
            (false, false) => mm_to_gpr::<u32>,
        }
    } else if is_xmm(insn, 0) {
        match (is_xmm(insn, 1), is_memory(insn, 1), wide) {
            (true, ..) => by_encoding!(insn, copy_64),
            (_, true, true) => by_encoding!(insn, load_64),
            (_, true, false) => by_encoding!(insn, load_32),
            (_, false, true) => by_encoding!(insn, gpr_to_xmm, u64),
            (_, false, false) => by_encoding!(insn, gpr_to_xmm, u32),
        }
    } else {
        match (is_memory(insn, 0), wide) {
            (true, true) => by_encoding!(insn, store_64),
            (true, false) => by_encoding!(insn, store_32),
            (false, true) => by_encoding!(insn, xmm_to_gpr, u64),
            (false, false) => by_encoding!(insn, xmm_to_gpr, u32),
        }
    })
}

// ---- whole vectors --------------------------------------------------------------------------------------------------------------------

fn copy<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let value = S::vector(cpu, uop)?;
    S::put(cpu, uop.reg[0], value);
    Ok(())
}

pub(super) fn load_whole<E: Encoding, const HALVES: usize, const ALIGNED: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load_vector::<HALVES, ALIGNED>(uop)?;
    E::put(cpu, uop.reg[0], value);
    Ok(())
}

pub(super) fn store_whole<E: Encoding, const HALVES: usize, const ALIGNED: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    cpu.store_vector::<HALVES, ALIGNED>(uop, cpu.ymm(uop.reg[1]))
}

// ---- the low lane -------------------------------------------------------------------------------------------------------------------

fn load_32<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load::<u32>(uop)?;
    E::put_xmm(cpu, uop.reg[0], value.into());
    Ok(())
}

fn load_64<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load::<u64>(uop)?;
    E::put_xmm(cpu, uop.reg[0], value.into());
    Ok(())
}

fn store_32<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    cpu.store(uop, cpu.xmm(uop.reg[1]) as u32)
}

fn store_64<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    cpu.store(uop, cpu.xmm(uop.reg[1]) as u64)
}

fn merge_32<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let merged = cpu.xmm(E::first(uop)) & !LOW32 | cpu.xmm(E::second(uop)) & LOW32;
    E::put_xmm(cpu, uop.reg[0], merged);
    Ok(())
}

fn merge_64<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let merged = cpu.xmm(E::first(uop)) & !LOW64 | cpu.xmm(E::second(uop)) & LOW64;
    E::put_xmm(cpu, uop.reg[0], merged);
    Ok(())
}

fn copy_64<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.xmm(uop.reg[1]) & LOW64;
    E::put_xmm(cpu, uop.reg[0], value);
    Ok(())
}

fn gpr_to_xmm<W: Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    E::put_xmm(cpu, uop.reg[0], value.into());
    Ok(())
}

fn xmm_to_gpr<W: Word, E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = W::truncate(cpu.xmm(uop.reg[1]) as u64);
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

// ---- halves -------------------------------------------------------------------------------------------------------------------------

fn load_low<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load::<u64>(uop)?;
    let value = cpu.xmm(E::first(uop)) & !LOW64 | u128::from(value);
    E::put_xmm(cpu, uop.reg[0], value);
    Ok(())
}

fn load_high<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.load::<u64>(uop)?;
    let value = cpu.xmm(E::first(uop)) & LOW64 | u128::from(value) << 64;
    E::put_xmm(cpu, uop.reg[0], value);
    Ok(())
}

fn store_high<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    cpu.store(uop, (cpu.xmm(uop.reg[1]) >> 64) as u64)
}

fn high_to_low<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.xmm(E::first(uop)) & !LOW64 | cpu.xmm(E::second(uop)) >> 64;
    E::put_xmm(cpu, uop.reg[0], value);
    Ok(())
}

fn low_to_high<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value = cpu.xmm(E::first(uop)) & LOW64 | cpu.xmm(E::second(uop)) << 64;
    E::put_xmm(cpu, uop.reg[0], value);
    Ok(())
}

fn duplicate_64<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?.map(|half| half & LOW64);
    S::put(cpu, uop.reg[0], b.map(|low| low << 64 | low));
    Ok(())
}

/// Bits of the lanes 0 and 2.
const EVEN: u128 = LOW32 << 64 | LOW32;

fn duplicate_even<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?.map(|half| half & EVEN);
    S::put(cpu, uop.reg[0], b.map(|even| even << 32 | even));
    Ok(())
}

fn duplicate_odd<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::vector(cpu, uop)?.map(|half| half & !EVEN);
    S::put(cpu, uop.reg[0], b.map(|odd| odd >> 32 | odd));
    Ok(())
}

// ---- MMX ----------------------------------------------------------------------------------------------------------------------------

fn write_mm(cpu: &mut Cpu, n: u8, value: u64) {
    cpu.touch_mmx();
    cpu.set_mm(n, value);
}

fn copy_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = cpu.mm(uop.reg[1]);
    write_mm(cpu, uop.reg[0], value);
    Ok(())
}

fn load_mm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = cpu.load::<W>(uop)?.zero_extend();
    write_mm(cpu, uop.reg[0], value);
    Ok(())
}

fn store_mm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    cpu.store(uop, W::truncate(cpu.mm(uop.reg[1])))?;
    cpu.touch_mmx();
    Ok(())
}

fn gpr_to_mm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    write_mm(cpu, uop.reg[0], value);
    Ok(())
}

fn mm_to_gpr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = W::truncate(cpu.mm(uop.reg[1]));
    cpu.touch_mmx();
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

fn low_to_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = cpu.xmm(uop.reg[1]) as u64;
    write_mm(cpu, uop.reg[0], value);
    Ok(())
}

fn mm_to_low(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let value = cpu.mm(uop.reg[1]);
    cpu.touch_mmx();
    cpu.set_xmm(uop.reg[0], value.into());
    Ok(())
}
