//! VCVTPS2PH (SDM vol. 2), which is exact about underflow although it ignores flush-to-zero.

use super::exact;
use super::sse::{self, simd, simd_once};
use crate::exec::float::mxcsr;

/// Four single-precision numbers as half-precision ones, and the flags raised.
pub fn halve(control: u32, source: u128) -> (u128, u32) {
    let run = |source: u128| {
        let (result, raised) = simd_once!(sse::control(control), "vcvtps2ph", sse::register(0), sse::register(source), imm 4);
        let tiny = mxcsr::traps_underflow(control) && is_tiny(control, source);
        (sse::value(result), raised | if tiny { mxcsr::UNDERFLOW } else { 0 })
    };
    let (result, flags) = run(source);
    let settled = || exact::settle("vcvtps2ph", control, [source], |[source]| run(source).1);
    (result, if exact::traps(control, flags) { settled() } else { flags })
}

/// Whether a single-precision number becomes a half-precision one that is not zero and, rounded to its precision but with any exponent, below
/// the normal ones (SDM vol. 1, 4.9.1.5). The instruction ignores flush-to-zero, which tells that of others.
fn is_tiny(control: u32, source: u128) -> bool {
    /// Exponent field of 2^-15, the last below the normal numbers, and by how much to move it among them.
    const BELOW: u32 = 112;
    const UP: u32 = 10;
    const EXPONENT: u32 = 23;
    (0..4).map(|n| (source >> (32 * n)) as u32).any(|single| {
        match single >> EXPONENT & 0xff {
            0 => single << 9 != 0 && control & mxcsr::DAZ == 0,
            BELOW => {
                let (moved, _) = simd!(control | mxcsr::MASKS, "vcvtps2ph", 0, u128::from(single + (UP << EXPONENT)), imm 4);
                // 2^-14 moved up is 2^-4, whose half-precision exponent field is 11.
                moved as u32 >> 10 & 0x1f < 11
            }
            exponent => exponent < BELOW,
        }
    })
}
