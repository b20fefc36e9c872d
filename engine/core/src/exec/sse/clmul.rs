//! PCLMULQDQ: carry-less multiplication (SDM vol. 2).

use super::form::immediate_operations;
use super::lanes::Lane;
use crate::uop::Handler;

/// The handler of an instruction of this file.
pub fn handler(insn: &iced_x86::Instruction) -> Option<Handler> {
    products(insn)
}

immediate_operations! { products:
    Pclmulqdq | Vpclmulqdq => |a, b, imm| multiply(a, b, imm);
}

/// The product of one half of `a` and one of `b` over GF(2). Both are 16 bytes: the instruction has no MMX form.
fn multiply<const N: usize>(a: [u8; N], b: [u8; N], imm: u8) -> [u8; N] {
    let x = u128::from(u64::get(&a, usize::from(imm & 1)));
    let y = u64::get(&b, usize::from(imm >> 4 & 1));
    let product = (0..64).filter(|n| y >> n & 1 != 0).fold(0u128, |sum, n| sum ^ x << n);
    let mut result = [0; N];
    result.copy_from_slice(&product.to_le_bytes()[..N]);
    result
}
