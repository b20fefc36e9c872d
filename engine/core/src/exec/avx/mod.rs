//! Instructions that only the VEX encoding has: the rest of AVX and AVX2, FMA and F16C (SDM vol. 1, ch. 14; vol. 2).
//!
//! VEX forms of SSE instructions are in `exec::sse`, beside the legacy forms.

mod broadcast;
mod compare;
mod fma;
mod gather;
mod half;
mod masked;
mod permute;
mod shift;
mod test;
mod zero;

use iced_x86::Instruction;

use super::sse::operand::{is_vex, Vector};
use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    const FAMILIES: [fn(&Instruction) -> Option<Handler>; 10] = [
        zero::handler,
        broadcast::handler,
        permute::handler,
        shift::handler,
        compare::handler,
        test::handler,
        masked::handler,
        gather::handler,
        fma::handler,
        half::handler,
    ];
    is_vex(insn).then(|| FAMILIES.iter().find_map(|family| family(insn))).flatten()
}

/// The bytes of a YMM register.
fn bytes([low, high]: Vector) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&low.to_le_bytes());
    bytes[16..].copy_from_slice(&high.to_le_bytes());
    bytes
}

/// A YMM register of these bytes.
fn vector(bytes: [u8; 32]) -> Vector {
    [0, 16].map(|at| {
        let mut half = [0; 16];
        half.copy_from_slice(&bytes[at..at + 16]);
        u128::from_le_bytes(half)
    })
}
