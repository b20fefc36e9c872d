//! XGETBV and XSETBV (SDM vol. 2; vol. 1, 13.3).

use iced_x86::{Instruction, Mnemonic};

use super::component::bit;
use crate::cpu::Cpu;
use crate::model::Feature;
use crate::state::{cr4, gpr};
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::code;

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Xgetbv => xgetbv,
        Mnemonic::Xsetbv => xsetbv,
        _ => return None,
    })
}

/// Whether XCR0 may have this value on silicon that supports the components of `supported`.
pub fn valid_xcr0(value: u64, supported: u64) -> bool {
    let avx512 = value & bit::AVX512;
    value & bit::X87 != 0
        && value & !supported == 0
        && (value & bit::AVX == 0 || value & bit::SSE != 0)
        && (avx512 == 0 || avx512 == bit::AVX512 && value & bit::AVX != 0)
}

fn xgetbv(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.undefined());
    }
    let value = match cpu.gpr(gpr::RCX) as u32 {
        0 => cpu.state.xcr0,
        1 if cpu.model.has(Feature::Xgetbv1) => cpu.state.xcr0 & cpu.components_in_use(),
        _ => return Err(cpu.general_protection()),
    };
    cpu.set_gpr(gpr::RAX, value & 0xffff_ffff);
    cpu.set_gpr(gpr::RDX, value >> 32);
    Ok(())
}

/// VMX exits on every XSETBV that neither #UD nor privilege stops; SVM on intercepted ones.
fn xsetbv(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if cpu.state.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    if !cpu.model.is_amd() || cpu.control.intercepts(intercept::XSETBV) {
        return Err(cpu.exit(code::XSETBV, 0));
    }
    let value = cpu.gpr(gpr::RDX) << 32 | cpu.gpr(gpr::RAX) & 0xffff_ffff;
    if cpu.gpr(gpr::RCX) as u32 != 0 || !valid_xcr0(value, cpu.model.xcr0_supported()) {
        return Err(cpu.general_protection());
    }
    cpu.state.xcr0 = value;
    cpu.refresh();
    Err(Stop::Leave)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_values_that_silicon_refuses() {
        let all = bit::X87 | bit::SSE | bit::AVX | bit::AVX512;
        for value in [1, 3, 7, all] {
            assert!(valid_xcr0(value, all), "{value:#x}");
        }
        for value in [0, 2, 5, 8, 0x27, 0xe3, 1 << 63 | 1] {
            assert!(!valid_xcr0(value, all), "{value:#x}");
        }
        assert!(!valid_xcr0(7, 3));
    }
}
