//! SHA extensions: steps of SHA-1 and SHA-256 (SDM vol. 1, 12.14; FIPS 180-4). Lanes are 32-bit words; the manual's "A" is the top one.

use iced_x86::{Instruction, Mnemonic};

use super::form::{immediate_operations, operations};
use super::lanes::{build, Lane};
use super::operand::{legacy_source, Source};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Sha256rnds2 => Some(legacy_source!(insn, two_rounds)),
        _ => schedule::handler(insn).or_else(|| sha1_rounds(insn)),
    }
}

/// The four words of a vector.
#[inline(always)]
fn words<const N: usize>(a: [u8; N]) -> [u32; 4] {
    std::array::from_fn(|n| u32::get(&a, n % (N / 4)))
}

#[inline(always)]
fn vector<const N: usize>(words: [u32; 4]) -> [u8; N] {
    build(|n| words[n])
}

mod schedule {
    use super::{operations, sigma0, sigma1, vector, words};

    operations! {
        Sha1nexte => |a, b| {
            let [b0, b1, b2, b3] = words(b);
            vector([b0, b1, b2, b3.wrapping_add(words(a)[3].rotate_left(30))])
        };
        Sha1msg1 => |a, b| {
            let (a, b) = (words(a), words(b));
            vector([b[2] ^ a[0], b[3] ^ a[1], a[0] ^ a[2], a[1] ^ a[3]])
        };
        Sha1msg2 => |a, b| {
            let (a, b) = (words(a), words(b));
            let w16 = (a[3] ^ b[2]).rotate_left(1);
            let w17 = (a[2] ^ b[1]).rotate_left(1);
            let w18 = (a[1] ^ b[0]).rotate_left(1);
            vector([(a[0] ^ w16).rotate_left(1), w18, w17, w16])
        };
        Sha256msg1 => |a, b| {
            let (a, b) = (words(a), words(b));
            let next = [a[1], a[2], a[3], b[0]];
            vector(std::array::from_fn(|n| a[n].wrapping_add(sigma0(next[n]))))
        };
        Sha256msg2 => |a, b| {
            let (a, b) = (words(a), words(b));
            let w16 = a[0].wrapping_add(sigma1(b[2]));
            let w17 = a[1].wrapping_add(sigma1(b[3]));
            let w18 = a[2].wrapping_add(sigma1(w16));
            let w19 = a[3].wrapping_add(sigma1(w17));
            vector([w16, w17, w18, w19])
        };
    }
}

#[inline(always)]
fn sigma0(x: u32) -> u32 {
    x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3
}

#[inline(always)]
fn sigma1(x: u32) -> u32 {
    x.rotate_right(17) ^ x.rotate_right(19) ^ x >> 10
}

#[inline(always)]
fn choose(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ !x & z
}

#[inline(always)]
fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ x & z ^ y & z
}

immediate_operations! { sha1_rounds:
    Sha1rnds4 => |a, b, imm| vector(four_rounds(words(a), words(b), imm & 3));
}

/// Four rounds of SHA-1; the message words have E added to the first already.
fn four_rounds(state: [u32; 4], message: [u32; 4], stage: u8) -> [u32; 4] {
    const CONSTANTS: [u32; 4] = [0x5a82_7999, 0x6ed9_eba1, 0x8f1b_bcdc, 0xca62_c1d6];
    let [mut d, mut c, mut b, mut a] = state;
    let mut e = 0u32;
    for word in message.into_iter().rev() {
        let f = match stage {
            0 => choose(b, c, d),
            2 => majority(b, c, d),
            _ => b ^ c ^ d,
        };
        let next = f.wrapping_add(a.rotate_left(5)).wrapping_add(word).wrapping_add(e).wrapping_add(CONSTANTS[usize::from(stage)]);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    [d, c, b, a]
}

/// Two rounds of SHA-256 on ABEF (operand 1) and CDGH (operand 0), with message plus constant in XMM0.
fn two_rounds<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let [mut f, mut e, mut b, mut a] = words(S::xmm(cpu, uop)?.to_le_bytes());
    let [mut h, mut g, mut d, mut c] = words(cpu.xmm(uop.reg[0]).to_le_bytes());
    let message = words(cpu.xmm(0).to_le_bytes());
    for word in &message[..2] {
        let upper1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let upper0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let first = choose(e, f, g).wrapping_add(upper1).wrapping_add(*word).wrapping_add(h);
        let second = majority(a, b, c).wrapping_add(upper0);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(first), c, b, a, first.wrapping_add(second));
    }
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(vector([f, e, b, a])));
    Ok(())
}
