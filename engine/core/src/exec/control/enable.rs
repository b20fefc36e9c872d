//! CLI, STI, CLAC and STAC (SDM vol. 2; vol. 3, 6.8.1 and 4.6.1).

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::state::{cr4, interruptibility, rflags};
use crate::uop::{Exec, Handler, Stop, Uop};

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Cli => disable,
        Code::Sti => enable,
        Code::Clac => check_user_pages,
        Code::Stac => allow_user_pages,
        _ => return None,
    })
}

fn disable(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.cpl() > cpu.io_privilege() {
        return disable_virtual(cpu);
    }
    cpu.rflags &= !rflags::IF;
    Ok(())
}

fn enable(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.cpl() > cpu.io_privilege() {
        return enable_virtual(cpu);
    }
    if cpu.rflags & rflags::IF != 0 {
        return Ok(());
    }
    cpu.rflags |= rflags::IF;
    cpu.shadow(interruptibility::STI);
    Err(Stop::Leave)
}

/// Whether CLI and STI without the privilege work on VIF (SDM vol. 3, 20.3.3.5 and 20.4).
fn has_virtual_interrupts(cpu: &Cpu) -> bool {
    if cpu.virtual_8086() {
        cpu.state.cr4 & cr4::VME != 0
    } else {
        cpu.cpl() == 3 && cpu.state.cr4 & cr4::PVI != 0
    }
}

#[cold]
fn disable_virtual(cpu: &mut Cpu) -> Exec {
    if !has_virtual_interrupts(cpu) {
        return Err(cpu.general_protection());
    }
    cpu.rflags &= !rflags::VIF;
    Ok(())
}

#[cold]
fn enable_virtual(cpu: &mut Cpu) -> Exec {
    if !has_virtual_interrupts(cpu) || cpu.rflags & rflags::VIP != 0 {
        return Err(cpu.general_protection());
    }
    cpu.rflags |= rflags::VIF;
    Ok(())
}

fn check_user_pages(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    require_smap(cpu)?;
    cpu.rflags &= !rflags::AC;
    cpu.refresh_table();
    Ok(())
}

fn allow_user_pages(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    require_smap(cpu)?;
    cpu.rflags |= rflags::AC;
    cpu.refresh_table();
    Ok(())
}

#[inline(always)]
fn require_smap(cpu: &mut Cpu) -> Exec {
    if cpu.cpl() != 0 {
        return Err(cpu.undefined());
    }
    Ok(())
}
