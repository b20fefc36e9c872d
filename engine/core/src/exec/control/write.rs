//! MOV to CRn, LMSW and CLTS, with the hypervisor's say in them (SDM vol. 3, 25.1.3, 25.3 and 25.6.6).

use super::load::{intercept_control, Access};
use crate::cpu::Cpu;
use crate::state::{cr0, cr4};
use crate::uop::{Exec, Stop, Uop};
use crate::word::Word;

/// MOV to CR3 that keeps the translations of its PCID.
const KEEP: u64 = 1 << 63;
/// Bits that LMSW loads.
const STATUS: u64 = cr0::PE | cr0::MP | cr0::EM | cr0::TS;
/// Bits of CR8.
const PRIORITY: u64 = 0xf;

pub(super) fn write_control<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let number = uop.reg[0];
    if !matches!(number, 0 | 2 | 4 | 8) {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    if cpu.control.cr_write >> number & 1 != 0 || touches_owned(cpu, number, value) {
        return Err(intercept_control(cpu, number, Access::Write, uop.reg[1] / 8));
    }
    match number {
        0 => cpu.set_cr0(value & !cpu.control.cr0_mask | cpu.state.cr0 & cpu.control.cr0_mask)?,
        2 => cpu.state.cr2 = value,
        4 => cpu.set_cr4(value & !cpu.control.cr4_mask | cpu.state.cr4 & cpu.control.cr4_mask)?,
        _ if value & !PRIORITY != 0 => return Err(cpu.general_protection()),
        _ => cpu.state.cr8 = value,
    }
    Err(Stop::Leave)
}

/// Whether a write wants a bit that the hypervisor owns to differ from what the guest sees.
fn touches_owned(cpu: &Cpu, number: u8, value: u64) -> bool {
    match number {
        0 => (value ^ cpu.control.cr0_shadow) & cpu.control.cr0_mask != 0,
        4 => (value ^ cpu.control.cr4_shadow) & cpu.control.cr4_mask != 0,
        _ => false,
    }
}

pub(super) fn write_cr3<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    if cpu.control.cr_write >> 3 & 1 != 0 {
        return Err(intercept_control(cpu, 3, Access::Write, uop.reg[1] / 8));
    }
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    let pcids = cpu.state.cr4 & cr4::PCIDE != 0;
    let keep = pcids && value & KEEP != 0;
    cpu.set_cr3(if pcids { value & !KEEP } else { value }, keep)?;
    Err(Stop::Leave)
}

pub(super) fn load_status<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let source: u16 = if MEMORY { cpu.load(uop)? } else { cpu.reg(uop.reg[0]) };
    let source = u64::from(source) & STATUS;
    let (mask, shadow) = (cpu.control.cr0_mask, cpu.control.cr0_shadow);
    // LMSW can set PE and cannot clear it.
    let loads = if source & cr0::PE != 0 { STATUS } else { STATUS & !cr0::PE };
    if cpu.control.cr_write & 1 != 0 || (source ^ shadow) & mask & loads != 0 {
        let stop = intercept_control(cpu, 0, Access::Lmsw, 0);
        if cpu.model.is_amd() {
            cpu.exit.info2 = source; // SVM's hypervisors decode the instruction
        } else {
            cpu.exit.qualification |= source << 16 | u64::from(MEMORY) << 6;
            cpu.exit.gla = if MEMORY { cpu.segment_base(uop.segment()).wrapping_add(cpu.effective_any(uop)) } else { 0 };
        }
        return Err(stop);
    }
    let loads = loads & !mask;
    cpu.set_cr0(cpu.state.cr0 & !loads | source & loads)?;
    Err(Stop::Leave)
}

pub(super) fn clear_task_switched(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let owned = cpu.control.cr0_mask & cr0::TS != 0;
    if cpu.control.cr_write & 1 != 0 || owned && cpu.control.cr0_shadow & cr0::TS != 0 {
        return Err(intercept_control(cpu, 0, Access::Clts, 0));
    }
    if !owned {
        cpu.state.cr0 &= !cr0::TS;
        cpu.refresh();
    }
    Err(Stop::Leave)
}
