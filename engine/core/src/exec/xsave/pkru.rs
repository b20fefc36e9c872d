//! RDPKRU and WRPKRU: the rights of protection keys (SDM vol. 2; vol. 3, 4.6.2).

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::state::{cr4, gpr};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rdpkru => read,
        Mnemonic::Wrpkru => write,
        _ => return None,
    })
}

impl Cpu {
    /// #UD without CR4.PKE, #GP(0) unless ECX is zero.
    fn require_pkru(&mut self) -> Exec {
        if self.state.cr4 & cr4::PKE == 0 {
            return Err(self.undefined());
        }
        if self.gpr(gpr::RCX) as u32 != 0 {
            return Err(self.general_protection());
        }
        Ok(())
    }

    /// Makes translations follow PKRU, which an instruction changed from `old`.
    pub(super) fn pkru_changed(&mut self, old: u32) {
        if self.state.fpu.pkru != old && self.state.cr4 & cr4::PKE != 0 {
            self.paging.pkru = self.state.fpu.pkru;
            self.tlb.flush();
            self.refresh_table();
        }
    }
}

fn read(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_pkru()?;
    cpu.set_gpr(gpr::RAX, cpu.state.fpu.pkru.into());
    cpu.set_gpr(gpr::RDX, 0);
    Ok(())
}

fn write(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_pkru()?;
    if cpu.gpr(gpr::RDX) as u32 != 0 {
        return Err(cpu.general_protection());
    }
    let old = cpu.state.fpu.pkru;
    cpu.state.fpu.pkru = cpu.gpr(gpr::RAX) as u32;
    cpu.pkru_changed(old);
    Ok(())
}
