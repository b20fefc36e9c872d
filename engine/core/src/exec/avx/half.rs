//! F16C: VCVTPH2PS and VCVTPS2PH (SDM vol. 1, 14.4), on the host's own unit: the model offers them only where the host has them.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::sse::exact;
use crate::exec::sse::host::{self, mxcsr, simd};
use crate::exec::sse::operand::{is_memory, is_ymm, Source, VexMemory, VexRegister};
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match (insn.mnemonic(), is_memory(insn, 0), is_memory(insn, 1)) {
        (Mnemonic::Vcvtph2ps, _, true) if is_ymm(insn, 0) => to_single::<VexMemory<16>, 2>,
        (Mnemonic::Vcvtph2ps, _, true) => to_single::<VexMemory<8>, 1>,
        (Mnemonic::Vcvtph2ps, ..) if is_ymm(insn, 0) => to_single::<VexRegister<1, 1>, 2>,
        (Mnemonic::Vcvtph2ps, ..) => to_single::<VexRegister<1, 1>, 1>,
        (Mnemonic::Vcvtps2ph, true, _) if is_ymm(insn, 1) => to_half_memory::<2>,
        (Mnemonic::Vcvtps2ph, true, _) => to_half_memory::<1>,
        (Mnemonic::Vcvtps2ph, ..) if is_ymm(insn, 1) => to_half::<2>,
        (Mnemonic::Vcvtps2ph, ..) => to_half::<1>,
        _ => return None,
    })
}

fn to_single<S: Source, const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let b = S::xmm(cpu, uop)?;
    let mxcsr = cpu.state.fpu.mxcsr;
    let (low, raised) = simd!(mxcsr, "vcvtph2ps", 0, b);
    let (high, more) = if HALVES == 2 { simd!(mxcsr, "vcvtph2ps", 0, b >> 64) } else { (0, 0) };
    cpu.raise_simd(raised | more)?;
    S::put(cpu, uop.reg[0], [low, high]);
    Ok(())
}

/// Immediate: round as MXCSR says, not as bits 1:0 do.
const BY_MXCSR: u64 = 4;

/// The source register as half-precision numbers, 8 bytes for each half of the register, and the flags raised.
fn halved<const HALVES: usize>(cpu: &Cpu, uop: &Uop) -> (u128, u32) {
    let guest = cpu.state.fpu.mxcsr;
    let rounding = (uop.imm as u32 & 3) << mxcsr::ROUNDING_SHIFT;
    let control = if uop.imm & BY_MXCSR != 0 { guest } else { guest & !mxcsr::ROUNDING | rounding };
    let [low, high] = cpu.ymm(uop.reg[1]);
    let (low, raised) = halve(control, low);
    let (high, more) = if HALVES == 2 { halve(control, high) } else { (0, 0) };
    (high << 64 | low, raised | more)
}

/// Four single-precision numbers as half-precision ones, and the flags raised.
fn halve(control: u32, source: u128) -> (u128, u32) {
    let run = |source: u128| {
        let (result, raised) = host::simd_once!(host::control(control), "vcvtps2ph", host::register(0), host::register(source), imm 4);
        let tiny = host::traps_underflow(control) && is_tiny(control, source);
        (host::value(result), raised | if tiny { mxcsr::UNDERFLOW } else { 0 })
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

fn to_half<const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let (value, raised) = halved::<HALVES>(cpu, uop);
    cpu.raise_simd(raised)?;
    cpu.set_ymm(uop.reg[0], [value, 0]);
    Ok(())
}

/// The store is probed first, so that a fault leaves MXCSR alone.
fn to_half_memory<const HALVES: usize>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let bytes = 8 * HALVES as u64;
    let la = cpu.linear(uop, bytes, AccessKind::Write)?;
    cpu.probe_write(uop.segment(), la, bytes)?;
    let (value, raised) = halved::<HALVES>(cpu, uop);
    cpu.raise_simd(raised)?;
    if HALVES == 2 {
        cpu.write(uop.segment(), la, value)
    } else {
        cpu.write(uop.segment(), la, value as u64)
    }
}
