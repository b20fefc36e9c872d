//! Operands of vector instructions.

use super::Random;

/// 64 bits that look like integers, singles or doubles at which operations turn.
pub fn lanes(random: &mut Random) -> u64 {
    const SINGLES: [u32; 12] = [
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
        0x7f7f_ffff,
        0x4f00_0000,
    ];
    const DOUBLES: [u64; 10] = [
        1 << 63,
        0x3ff0_0000_0000_0000,
        0xbff8_0000_0000_0000,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0001,
        0x7ff0_0000_0000_0001,
        0x000f_ffff_ffff_ffff,
        0x41e0_0000_0000_0000,
        0x3690_0000_0000_0000,
    ];
    let single = |random: &mut Random| match random.below(3) {
        0 => SINGLES[random.below(12) as usize],
        1 => (random.next() as f32 / 1e12) as i32 as u32,
        _ => ((random.next() as i32) as f32 / 65536.0).to_bits(),
    };
    match random.below(5) {
        0 => random.operand(),
        1 => u64::from(single(random)) << 32 | u64::from(single(random)),
        2 => DOUBLES[random.below(10) as usize],
        3 => (random.next() as i64 as f64 / 65536.0).to_bits(),
        _ => random.next(),
    }
}
