//! MMX and SSE up to SSE4.2, with AES, PCLMULQDQ and SHA beside them, and the VEX encodings of all that have one (SDM vol. 1, ch. 9-12
//! and 14; vol. 2). What VEX alone can say is in `exec::avx`.
//!
//! Integer operations are portable functions on lanes of `[u8; N]`: 8 bytes are an MMX register, 16 an XMM register or half of a YMM
//! register. Floating point is `exec::float`'s.

mod aes;
mod bitwise;
mod clmul;
mod compare;
mod control;
mod convert;
mod extend;
mod extract;
pub(in crate::exec) mod float;
pub(in crate::exec) mod form;
mod horizontal;
mod integer;
pub(in crate::exec) mod lanes;
mod moves;
pub(in crate::exec) mod operand;
mod round;
mod sha;
mod shift;
mod shuffle;
mod string;

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    const FAMILIES: [fn(&Instruction) -> Option<Handler>; 17] = [
        moves::handler,
        integer::handler,
        control::handler,
        bitwise::handler,
        shuffle::handler,
        shift::handler,
        extract::handler,
        float::handler,
        compare::handler,
        convert::handler,
        horizontal::handler,
        extend::handler,
        round::handler,
        string::handler,
        aes::handler,
        clmul::handler,
        sha::handler,
    ];
    FAMILIES.iter().find_map(|family| family(insn))
}

/// Whether the dispatcher must look at the CPU after this instruction: LDMXCSR changes what other vector instructions do.
pub fn ends_block(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr)
}
