//! MOV from and to DRn (SDM vol. 3, 17.2 and 25.1.3).

use crate::cpu::breakpoint::{dr6, dr7};
use crate::cpu::Cpu;
use crate::fault::{vector, Fault};
use crate::state::cr4;
use crate::uop::{Exec, Stop, Uop};
use crate::virt::exits::code;
use crate::word::Word;

/// Bits of DR6 that can be written: B0 to B3, BD, BS and BT.
const DR6_BITS: u64 = 0xe00f;
/// Bits of DR7 that can be written, and the one that reads as one.
const DR7_BITS: u64 = 0xffff_2bff;
const DR7_FIXED: u64 = 1 << 10;

pub(super) fn read<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let number = check(cpu, uop.reg[1], uop.reg[0] / 8, false)?;
    let value = match number {
        6 => cpu.state.dr6,
        7 => cpu.state.dr7,
        _ => cpu.state.dr[usize::from(number)],
    };
    cpu.set_reg(uop.reg[0], W::truncate(value));
    Ok(())
}

pub(super) fn write<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let number = check(cpu, uop.reg[0], uop.reg[1] / 8, true)?;
    let value = cpu.reg::<W>(uop.reg[1]).zero_extend();
    match number {
        6 | 7 if value >> 32 != 0 => return Err(cpu.general_protection()),
        6 => cpu.state.dr6 = value & DR6_BITS | dr6::FIXED,
        7 => cpu.state.dr7 = value & DR7_BITS | DR7_FIXED,
        _ => cpu.state.dr[usize::from(number)] = value,
    }
    cpu.refresh_breakpoints();
    Err(Stop::Leave)
}

/// Checks an access to debug register `number` and gives the number of the register that it reaches. VMX exits come before the checks of
/// privilege and CR4.DE, SVM exits behind them.
fn check(cpu: &mut Cpu, number: u8, register: u8, write: bool) -> Exec<u8> {
    if number > 7 {
        return Err(cpu.undefined());
    }
    let amd = cpu.model.is_amd();
    if !amd {
        intercept(cpu, number, register, write)?;
    }
    if matches!(number, 4 | 5) && cpu.state.cr4 & cr4::DE != 0 {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    if amd {
        intercept(cpu, number, register, write)?;
    }
    if cpu.state.dr7 & dr7::GD != 0 {
        cpu.fault = Fault { vector: vector::DB, error: None, payload: dr6::BD };
        return Err(Stop::Fault);
    }
    Ok(if matches!(number, 4 | 5) { number + 2 } else { number })
}

fn intercept(cpu: &mut Cpu, number: u8, register: u8, write: bool) -> Exec {
    let watched = if write { cpu.control.dr_write } else { cpu.control.dr_read };
    if watched >> number & 1 == 0 {
        return Ok(());
    }
    if cpu.model.is_amd() {
        let direction = if write { 0x10 } else { 0 };
        return Err(cpu.exit_number(code::DR_ACCESS.svm + direction + u32::from(number), register.into()));
    }
    let qualification = u64::from(number) | u64::from(!write) << 4 | u64::from(register) << 8;
    Err(cpu.exit(code::DR_ACCESS, qualification))
}
