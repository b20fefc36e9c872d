//! STI of 64-bit code where a NOP follows. The reference is `exec::control`.
//!
//! The interrupt shadow covers the NOP, at which nothing can happen, and both are in one block: nobody sees it.

use iced_x86::{Instruction, Mnemonic};

use super::{chained, Outcome};
use crate::cpu::Cpu;
use crate::decode::block::is_nop;
use crate::state::rflags;
use crate::uop::{Handler, Uop};

pub fn handler(insn: &Instruction, following: Option<&Instruction>) -> Option<Handler> {
    (insn.mnemonic() == Mnemonic::Sti && following.is_some_and(is_nop)).then(|| chained(enable))
}

fn enable(cpu: &mut Cpu, _uop: &Uop) -> Outcome {
    if cpu.cpl() > cpu.io_privilege() {
        return Outcome::GiveUp;
    }
    cpu.rflags |= rflags::IF;
    Outcome::Done
}
