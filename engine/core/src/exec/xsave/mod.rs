//! Saving and restoring the x87, SSE and AVX state: FXSAVE and XSAVE families, XCR0 (SDM vol. 1, ch. 10.5 and 13).

mod area;
mod component;
pub(in crate::exec) mod fxsave;
mod pkru;
mod restore;
mod save;
mod xcr;

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    fxsave::handler(insn)
        .or_else(|| save::handler(insn))
        .or_else(|| restore::handler(insn))
        .or_else(|| xcr::handler(insn))
        .or_else(|| pkru::handler(insn))
}

/// Instructions of this family after which the dispatcher must look at the CPU.
pub fn ends_block(insn: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(insn.mnemonic(), Xsetbv | Fxrstor | Fxrstor64 | Xrstor | Xrstor64 | Xrstors | Xrstors64)
}
