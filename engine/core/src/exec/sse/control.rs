//! MXCSR, and stores that bypass the caches: LDMXCSR, STMXCSR, MOVNT*, MASKMOVQ, MASKMOVDQU (SDM vol. 1, 10.4.6 and 11.6).

use iced_x86::{Instruction, Mnemonic};

use super::moves::{load_whole, store_whole};
use super::operand::{by_encoding, whole_vector, Encoding};
use crate::cpu::Cpu;
use crate::exec::xsave::fxsave::MXCSR_MASK;
use crate::model::Silicon;
use crate::paging::AccessKind;
use crate::state::gpr;
use crate::uop::{flag, Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => by_encoding!(insn, ldmxcsr),
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => by_encoding!(insn, stmxcsr),
        Mnemonic::Movntps | Mnemonic::Movntpd | Mnemonic::Movntdq => whole_vector!(insn, store_whole, true),
        Mnemonic::Vmovntps | Mnemonic::Vmovntpd | Mnemonic::Vmovntdq => whole_vector!(insn, store_whole, true),
        Mnemonic::Movntdqa | Mnemonic::Vmovntdqa => whole_vector!(insn, load_whole, true),
        Mnemonic::Movntq => store_mm,
        Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => by_encoding!(insn, maskmovdqu),
        Mnemonic::Maskmovq => maskmovq,
        _ => return None,
    })
}

fn ldmxcsr<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let value: u32 = cpu.load(uop)?;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.general_protection());
    }
    cpu.state.fpu.mxcsr = value;
    Ok(())
}

fn stmxcsr<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    cpu.store(uop, cpu.state.fpu.mxcsr)
}

fn store_mm(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    cpu.store(uop, cpu.mm(uop.reg[1]))?;
    cpu.touch_mmx();
    Ok(())
}

fn maskmovdqu<E: Encoding>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let (value, mask) = (cpu.xmm(uop.reg[1]).to_le_bytes(), cpu.xmm(uop.reg[2]).to_le_bytes());
    store_selected(cpu, uop, &value, &mask)
}

fn maskmovq(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    if cpu.silicon == Silicon::Amd {
        cpu.touch_mmx(); // whatever comes of it
    }
    let (value, mask) = (cpu.mm(uop.reg[1]).to_le_bytes(), cpu.mm(uop.reg[2]).to_le_bytes());
    store_selected(cpu, uop, &value, &mask)?;
    cpu.touch_mmx();
    Ok(())
}

/// Stores at RDI the bytes whose mask byte has its top bit set. All of them are probed before the first is written, and by AMD's silicon
/// those that are left out too.
fn store_selected(cpu: &mut Cpu, uop: &Uop, value: &[u8], mask: &[u8]) -> Exec {
    let offset = match (uop.has(flag::ADDRESS_16), uop.has(flag::ADDRESS_32)) {
        (true, _) => cpu.gpr(gpr::RDI) & 0xffff,
        (_, true) => cpu.gpr(gpr::RDI) & 0xffff_ffff,
        _ => cpu.gpr(gpr::RDI),
    };
    let selected = |n: &usize| mask[*n] >> 7 != 0;
    if cpu.silicon == Silicon::Amd {
        let la = cpu.segment_address(uop.segment(), offset, value.len() as u64, AccessKind::Write)?;
        cpu.probe_write(uop.segment(), la, value.len() as u64)?;
    }
    for n in (0..value.len()).filter(selected) {
        let la = cpu.segment_address(uop.segment(), offset.wrapping_add(n as u64), 1, AccessKind::Write)?;
        cpu.probe_write(uop.segment(), la, 1)?;
    }
    for n in (0..value.len()).filter(selected) {
        let la = cpu.segment_address(uop.segment(), offset.wrapping_add(n as u64), 1, AccessKind::Write)?;
        cpu.write(uop.segment(), la, value[n])?;
    }
    Ok(())
}
