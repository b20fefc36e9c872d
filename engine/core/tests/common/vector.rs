//! Operands of vector and x87 instructions.

use super::Random;

fn significand(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => 1 << 63,
        1 => u64::MAX,
        2 => random.next() & 0xffff_ffff_0000_0000 | 1 << 63,
        _ => random.next() | 1 << 63,
    }
}

/// An x87 register: all classes of numbers.
pub fn float80(random: &mut Random) -> [u8; 10] {
    let sign = (random.next() as u16 & 1) << 15;
    let (exponent, significand) = match random.below(10) {
        0 => (0, 0),
        1 => (0x7fff, 1 << 63),
        2 => (0x7fff, 3 << 62 | random.next() >> 2),
        3 => (0x7fff, 1 << 63 | random.next() >> 2 | 1),
        4 => (0, random.next() >> 1),
        5 => (random.next() as u16 & 0x7fff, random.next()),
        6 => (random.below(0x7ffe) as u16 + 1, significand(random)),
        _ => (0x3fff - 20 + random.below(70) as u16, significand(random)),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&(sign | exponent).to_le_bytes());
    bytes
}

/// 64 bits that look like integers, singles or doubles at which operations turn.
pub fn lanes(random: &mut Random) -> u64 {
    const SINGLES: [u32; 14] = [
        0,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0001,
        0x7f80_0001,
        1,
        0x807f_ffff,
        0x0080_0000,
        0x7f7f_ffff,
        0x4f00_0000,
        0xcf00_0001,
    ];
    const DOUBLES: [u64; 12] = [
        1 << 63,
        0x3ff0_0000_0000_0000,
        0xbff8_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0001,
        0x7ff0_0000_0000_0001,
        0x000f_ffff_ffff_ffff,
        0x0010_0000_0000_0000,
        0x41e0_0000_0000_0000,
        0xc3e0_0000_0000_0001,
        0x3690_0000_0000_0000,
    ];
    let single = |random: &mut Random| match random.below(3) {
        0 => SINGLES[random.below(SINGLES.len() as u64) as usize],
        1 => (random.next() as f32 / 1e12) as i32 as u32,
        _ => ((random.next() as i32) as f32 / 65536.0).to_bits(),
    };
    match random.below(6) {
        0 => random.operand(),
        1 | 2 => u64::from(single(random)) << 32 | u64::from(single(random)),
        3 => DOUBLES[random.below(DOUBLES.len() as u64) as usize],
        4 => (random.next() as i64 as f64 / 65536.0).to_bits(),
        _ => random.next(),
    }
}
