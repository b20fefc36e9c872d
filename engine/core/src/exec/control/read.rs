//! MOV from CRn and SMSW, as the hypervisor lets the guest see the registers (SDM vol. 3, 25.3 and 25.6.6).

use super::load::{intercept_control, Access};
use crate::cpu::Cpu;
use crate::uop::{Exec, Uop};
use crate::word::Word;

pub(super) fn read_control<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let number = uop.reg[1];
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    if cpu.control.cr_read >> number & 1 != 0 {
        return Err(intercept_control(cpu, number, Access::Read, uop.reg[0] / 8));
    }
    let value = match number {
        0 => visible_cr0(cpu),
        2 => cpu.state.cr2,
        3 => cpu.state.cr3,
        4 => cpu.state.cr4 & !cpu.control.cr4_mask | cpu.control.cr4_shadow & cpu.control.cr4_mask,
        _ => cpu.state.cr8,
    };
    cpu.set_reg(uop.reg[0], W::truncate(value));
    Ok(())
}

/// CR0 with the bits that the hypervisor owns taken from its shadow.
fn visible_cr0(cpu: &Cpu) -> u64 {
    cpu.state.cr0 & !cpu.control.cr0_mask | cpu.control.cr0_shadow & cpu.control.cr0_mask
}

pub(super) fn read_status<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.check_umip()?;
    let value = visible_cr0(cpu);
    cpu.set_reg(uop.reg[0], W::truncate(value));
    Ok(())
}

pub(super) fn store_status(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.check_umip()?;
    let value = visible_cr0(cpu);
    cpu.store(uop, value as u16)
}
