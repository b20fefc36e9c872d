//! F16C: VCVTPH2PS and VCVTPS2PH (SDM vol. 1, 14.4). The model offers them only where the host's units compute and have
//! them, or where software does.

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::Cpu;
use crate::exec::float::mxcsr;
use crate::exec::float::unit::{halve, simd};
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
