//! VZEROUPPER and VZEROALL (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vzeroupper => zero::<16>,
        Mnemonic::Vzeroall => zero::<0>,
        _ => return None,
    })
}

/// Clears the vector registers from byte `FROM` on.
fn zero<const FROM: usize>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let count = cpu.xmm_count();
    for register in &mut cpu.state.fpu.vector[..count] {
        register[FROM..].fill(0);
    }
    Ok(())
}
