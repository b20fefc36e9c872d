//! x87 control: FNINIT, FNCLEX, FLDCW, FNSTCW, FNSTSW, FWAIT, stack pointer and tag instructions, EMMS (SDM vol. 1, 8.3.9).

use iced_x86::{Code, Instruction, Mnemonic};

use super::stack::status::{BUSY, CONDITIONS, EXCEPTIONS, STACK_FAULT, SUMMARY, TOP};
use crate::cpu::Cpu;
use crate::fault::vector;
use crate::state::cr0;
use crate::uop::{Exec, Handler, Uop};

/// Bits of the control word that software can change; bit 6 is always set.
const FCW_WRITABLE: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fninit => fninit,
        Mnemonic::Fnclex => fnclex,
        Mnemonic::Fldcw => fldcw,
        Mnemonic::Fnstcw => fnstcw,
        Mnemonic::Fnstsw if insn.code() == Code::Fnstsw_AX => fnstsw_ax,
        Mnemonic::Fnstsw => fnstsw_memory,
        Mnemonic::Wait => wait,
        Mnemonic::Fnop => fnop,
        // 8087 and 80287 instructions that later units ignore.
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => ignored,
        Mnemonic::Fincstp => fincstp,
        Mnemonic::Fdecstp => fdecstp,
        Mnemonic::Ffree => ffree,
        Mnemonic::Ffreep => ffreep,
        Mnemonic::Emms => emms,
        _ => return None,
    })
}

impl Cpu {
    /// The x87 state after FNINIT; data registers keep their bits.
    pub(in crate::exec) fn initialize_x87(&mut self) {
        let fpu = &mut self.state.fpu;
        (fpu.fcw, fpu.fsw, fpu.ftw) = (0x37f, 0, 0);
        (fpu.fop, fpu.fip, fpu.fdp) = (0, 0, 0);
    }

    /// Loads the control word, and finds out anew whether an exception waits.
    pub(in crate::exec) fn set_fcw(&mut self, value: u16) {
        self.state.fpu.fcw = value & FCW_WRITABLE | FCW_FIXED;
        self.summarize();
    }
}

fn fninit(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_x87()?;
    cpu.initialize_x87();
    Ok(())
}

fn fnclex(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_x87()?;
    cpu.state.fpu.fsw &= !(EXCEPTIONS | STACK_FAULT | SUMMARY | BUSY);
    Ok(())
}

fn fldcw(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    let value = cpu.load(uop)?;
    cpu.set_fcw(value);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_x87()?;
    cpu.store(uop, cpu.state.fpu.fcw)
}

fn fnstsw_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_x87()?;
    cpu.store(uop, cpu.state.fpu.fsw)
}

fn fnstsw_ax(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_x87()?;
    cpu.set_reg(uop.reg[0], cpu.state.fpu.fsw);
    Ok(())
}

/// FWAIT is the one x87 instruction that CR0.EM does not stop, and that CR0.TS stops only with CR0.MP.
fn wait(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.state.cr0 & (cr0::TS | cr0::MP) == cr0::TS | cr0::MP {
        return Err(cpu.raise(vector::NM));
    }
    cpu.check_pending_x87()
}

fn fnop(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.begin_x87()
}

fn ignored(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_x87()
}

fn fincstp(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    cpu.conclude(uop, 0);
    cpu.rotate(1);
    Ok(())
}

fn fdecstp(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    cpu.conclude(uop, 0);
    cpu.rotate(-1);
    Ok(())
}

fn ffree(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    cpu.free_st(uop.reg[0]);
    Ok(())
}

fn ffreep(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.begin_x87()?;
    cpu.free_st(uop.reg[0]);
    cpu.pop_x87(1);
    Ok(())
}

/// As other MMX instructions EMMS leaves TOP at 0 (SDM vol. 3, table 12-2).
fn emms(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    cpu.state.fpu.fsw &= !TOP;
    cpu.state.fpu.ftw = 0;
    Ok(())
}

/// The condition bits of the status word.
pub(super) fn set_conditions(cpu: &mut Cpu, conditions: u16) {
    cpu.state.fpu.fsw = cpu.state.fpu.fsw & !CONDITIONS | conditions;
}
