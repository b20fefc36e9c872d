//! AES-NI: one round of the cipher per instruction (SDM vol. 1, 12.13; FIPS 197).

use super::form::{immediate_operations, operations};
use super::lanes::{build, Lane};
use crate::uop::Handler;

/// The handler of an instruction of this file.
pub fn handler(insn: &iced_x86::Instruction) -> Option<Handler> {
    rounds::handler(insn).or_else(|| assist(insn))
}

mod rounds {
    use super::{inverse_mix, inverse_rows, mix, operations, rows, substitute, xor, INVERSE, SBOX};

    operations! {
        Aesenc | Vaesenc => |a, b| xor(mix(substitute(rows(a), &SBOX)), b);
        Aesenclast | Vaesenclast => |a, b| xor(substitute(rows(a), &SBOX), b);
        Aesdec | Vaesdec => |a, b| xor(inverse_mix(substitute(inverse_rows(a), &INVERSE)), b);
        Aesdeclast | Vaesdeclast => |a, b| xor(substitute(inverse_rows(a), &INVERSE), b);
        Aesimc | Vaesimc => |_a, b| inverse_mix(b);
    }
}

immediate_operations! { assist:
    Aeskeygenassist | Vaeskeygenassist => |_a, b, imm| build(|n| {
        let word = u32::get(&substitute(b, &SBOX), (n | 1) % (N / 4));
        if n & 1 == 0 { word } else { word.rotate_right(8) ^ u32::from(imm) }
    });
}

/// Product in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
const fn multiply(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = a << 1 ^ if a & 0x80 != 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

/// SubBytes: the inverse in the field, then an affine map. The powers of 3 and of its inverse meet every element with its inverse.
const SBOX: [u8; 256] = {
    let mut table = [0; 256];
    let (mut element, mut inverse) = (1u8, 1u8);
    let mut n = 0;
    while n < 255 {
        let rotated = inverse.rotate_left(1) ^ inverse.rotate_left(2) ^ inverse.rotate_left(3) ^ inverse.rotate_left(4);
        table[element as usize] = inverse ^ rotated ^ 0x63;
        element = multiply(element, 3);
        inverse = multiply(inverse, 0xf6);
        n += 1;
    }
    table[0] = 0x63;
    table
};

/// InvSubBytes.
const INVERSE: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        table[SBOX[n] as usize] = n as u8;
        n += 1;
    }
    table
};

#[inline]
fn substitute<const N: usize>(a: [u8; N], table: &[u8; 256]) -> [u8; N] {
    a.map(|byte| table[usize::from(byte)])
}

/// ShiftRows: row r of column c comes from column c + r.
#[inline]
fn rows<const N: usize>(a: [u8; N]) -> [u8; N] {
    build(|n| a[(n + 4 * (n % 4)) % N])
}

#[inline]
fn inverse_rows<const N: usize>(a: [u8; N]) -> [u8; N] {
    build(|n| a[(n + 3 * N - 4 * (n % 4)) % N])
}

/// Multiplies each column by the circulant matrix with this first row.
#[inline]
fn columns<const N: usize>(a: [u8; N], row: [u8; 4]) -> [u8; N] {
    build(|n| {
        let column = n & !3;
        (0..4).fold(0u8, |sum, k| sum ^ multiply(a[column + k], row[(k + 4 - n % 4) % 4]))
    })
}

#[inline]
fn mix<const N: usize>(a: [u8; N]) -> [u8; N] {
    columns(a, [2, 3, 1, 1])
}

#[inline]
fn inverse_mix<const N: usize>(a: [u8; N]) -> [u8; N] {
    columns(a, [14, 11, 13, 9])
}

#[inline]
fn xor<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N] {
    build(|n| a[n] ^ b[n])
}
