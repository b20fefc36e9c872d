//! MMX and SSE up to SSE4.2, with AES, PCLMULQDQ and SHA beside them (SDM vol. 1, ch. 9-12; vol. 2).
//!
//! Integer operations are portable functions on lanes of `[u8; N]`: 8 bytes are an MMX register, 16 an XMM register, and each half of a
//! YMM register once VEX encodings exist, because AVX2 works on halves. Floating point runs on the host's own SSE2 under the guest's
//! MXCSR (`host`), so it is bit exact.

mod aes;
mod bitwise;
mod clmul;
mod compare;
mod control;
mod convert;
mod extend;
mod extract;
mod float;
mod horizontal;
mod host;
mod integer;
pub(in crate::exec) mod lanes;
mod moves;
mod operand;
mod round;
mod sha;
mod shift;
mod shuffle;
mod string;

use iced_x86::Instruction;

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
