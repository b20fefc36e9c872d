//! Vector moves: MOVAPS, MOVUPS, MOVSS, MOVSD, MOVD, MOVQ, MOVLPS, MOVHPS, MOVDDUP and siblings (SDM vol. 1, 10.4.1.1 and 11.4.1.1).

use iced_x86::{Code, Instruction, Mnemonic};

use super::operand::{is_memory, is_mm, is_xmm, vector_source, Source};
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
        Mnemonic::Movaps | Mnemonic::Movapd | Mnemonic::Movdqa => match (load, store) {
            (true, _) => load_aligned,
            (_, true) => store_aligned,
            _ => copy,
        },
        Mnemonic::Movups | Mnemonic::Movupd | Mnemonic::Movdqu | Mnemonic::Lddqu => match (load, store) {
            (true, _) => load_128,
            (_, true) => store_128,
            _ => copy,
        },
        Mnemonic::Movss if load => load_32,
        Mnemonic::Movss if store => store_32,
        Mnemonic::Movss => merge_32,
        Mnemonic::Movsd => return movsd(insn),
        Mnemonic::Movd | Mnemonic::Movq => return movd_movq(insn),
        Mnemonic::Movlps | Mnemonic::Movlpd if load => load_low,
        Mnemonic::Movlps | Mnemonic::Movlpd => store_64,
        Mnemonic::Movhps | Mnemonic::Movhpd if load => load_high,
        Mnemonic::Movhps | Mnemonic::Movhpd => store_high,
        Mnemonic::Movhlps => high_to_low,
        Mnemonic::Movlhps => low_to_high,
        Mnemonic::Movdq2q => low_to_mm,
        Mnemonic::Movq2dq => mm_to_low,
        Mnemonic::Movddup => vector_source!(insn, duplicate_64),
        Mnemonic::Movsldup => vector_source!(insn, duplicate_even),
        Mnemonic::Movshdup => vector_source!(insn, duplicate_odd),
        _ => return None,
    })
}

/// The mnemonic is also a string instruction's.
fn movsd(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Movsd_xmm_xmmm64 if is_memory(insn, 1) => Some(load_64),
        Code::Movsd_xmmm64_xmm if is_memory(insn, 0) => Some(store_64),
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm => Some(merge_64),
        _ => None,
    }
}

fn movd_movq(insn: &Instruction) -> Option<Handler> {
    let wide = insn.mnemonic() == Mnemonic::Movq;
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
            (true, ..) => copy_64,
            (_, true, true) => load_64,
            (_, true, false) => load_32,
            (_, false, true) => gpr_to_xmm::<u64>,
            (_, false, false) => gpr_to_xmm::<u32>,
        }
    } else {
        match (is_memory(insn, 0), wide) {
            (true, true) => store_64,
            (true, false) => store_32,
            (false, true) => xmm_to_gpr::<u64>,
            (false, false) => xmm_to_gpr::<u32>,
        }
    })
}

// ---- 128 bits -----------------------------------------------------------------------------------------------------------------------

fn copy(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.xmm(uop.reg[1]);
    cpu.set_xmm(uop.reg[0], value);
    Ok(())
}

fn load_aligned(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load_aligned(uop)?;
    cpu.set_xmm(uop.reg[0], value);
    Ok(())
}

fn store_aligned(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.store_aligned(uop, cpu.xmm(uop.reg[1]))
}

fn load_128(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load::<u128>(uop)?;
    cpu.set_xmm(uop.reg[0], value);
    Ok(())
}

fn store_128(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.store(uop, cpu.xmm(uop.reg[1]))
}

// ---- the low lane -------------------------------------------------------------------------------------------------------------------

fn load_32(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load::<u32>(uop)?;
    cpu.set_xmm(uop.reg[0], value.into());
    Ok(())
}

fn load_64(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load::<u64>(uop)?;
    cpu.set_xmm(uop.reg[0], value.into());
    Ok(())
}

fn store_32(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.store(uop, cpu.xmm(uop.reg[1]) as u32)
}

fn store_64(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.store(uop, cpu.xmm(uop.reg[1]) as u64)
}

fn merge_32(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let merged = cpu.xmm(uop.reg[0]) & !LOW32 | cpu.xmm(uop.reg[1]) & LOW32;
    cpu.set_xmm(uop.reg[0], merged);
    Ok(())
}

fn merge_64(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let merged = cpu.xmm(uop.reg[0]) & !LOW64 | cpu.xmm(uop.reg[1]) & LOW64;
    cpu.set_xmm(uop.reg[0], merged);
    Ok(())
}

fn copy_64(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.xmm(uop.reg[1]) & LOW64;
    cpu.set_xmm(uop.reg[0], value);
    Ok(())
}

fn gpr_to_xmm<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    cpu.set_xmm(uop.reg[0], value.into());
    Ok(())
}

fn xmm_to_gpr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = W::truncate(cpu.xmm(uop.reg[1]) as u64);
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

// ---- halves -------------------------------------------------------------------------------------------------------------------------

fn load_low(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load::<u64>(uop)?;
    cpu.set_xmm(uop.reg[0], cpu.xmm(uop.reg[0]) & !LOW64 | u128::from(value));
    Ok(())
}

fn load_high(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let value = cpu.load::<u64>(uop)?;
    cpu.set_xmm(uop.reg[0], cpu.xmm(uop.reg[0]) & LOW64 | u128::from(value) << 64);
    Ok(())
}

fn store_high(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.store(uop, (cpu.xmm(uop.reg[1]) >> 64) as u64)
}

fn high_to_low(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.set_xmm(uop.reg[0], cpu.xmm(uop.reg[0]) & !LOW64 | cpu.xmm(uop.reg[1]) >> 64);
    Ok(())
}

fn low_to_high(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    cpu.set_xmm(uop.reg[0], cpu.xmm(uop.reg[0]) & LOW64 | cpu.xmm(uop.reg[1]) << 64);
    Ok(())
}

fn duplicate_64<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let low = S::xmm(cpu, uop)? & LOW64;
    cpu.set_xmm(uop.reg[0], low << 64 | low);
    Ok(())
}

/// Bits of the lanes 0 and 2.
const EVEN: u128 = LOW32 << 64 | LOW32;

fn duplicate_even<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let even = S::xmm(cpu, uop)? & EVEN;
    cpu.set_xmm(uop.reg[0], even << 32 | even);
    Ok(())
}

fn duplicate_odd<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let odd = S::xmm(cpu, uop)? & !EVEN;
    cpu.set_xmm(uop.reg[0], odd >> 32 | odd);
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
