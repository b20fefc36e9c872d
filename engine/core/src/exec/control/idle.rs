//! HLT, MONITOR and MWAIT (SDM vol. 2; vol. 3, 9.10.5).

use iced_x86::{Code, Instruction};

use crate::cpu::{pending, Cpu};
use crate::state::activity;
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::code;

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Hlt => halt,
        Code::Monitorw | Code::Monitord | Code::Monitorq => monitor,
        Code::Mwait => wait,
        _ => return None,
    })
}

fn halt(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    if cpu.control.intercepts(intercept::HLT) {
        return Err(if cpu.wait_awake() { Stop::Leave } else { cpu.exit(code::HLT, 0) });
    }
    cpu.state.activity = activity::HLT;
    cpu.pending |= pending::HALTED;
    Err(Stop::Leave)
}

fn require_monitor(cpu: &mut Cpu) -> Exec {
    if cpu.cpl() != 0 {
        return Err(cpu.undefined());
    }
    Ok(())
}

/// MONITOR arms nothing: MWAIT may end for any reason, and here it ends at once.
fn monitor(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    require_monitor(cpu)?;
    if cpu.control.intercepts(intercept::MONITOR) {
        return Err(cpu.exit(code::MONITOR, 0));
    }
    if cpu.gpr(crate::state::gpr::RCX) as u32 != 0 {
        return Err(cpu.general_protection());
    }
    Ok(())
}

fn wait(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    require_monitor(cpu)?;
    if cpu.control.intercepts(intercept::MWAIT) {
        return Err(cpu.exit(code::MWAIT, 0));
    }
    Ok(())
}
