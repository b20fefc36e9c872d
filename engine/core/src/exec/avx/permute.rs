//! Lanes to other places: VPERMILPS, VPERMD, VPERMQ, VPERM2F128, VINSERTF128, VEXTRACTF128, VPBLENDD and siblings (SDM vol. 2).

use iced_x86::{Instruction, Mnemonic};

use super::{bytes, vector};
use crate::cpu::Cpu;
use crate::exec::sse::form::{immediate_operations, operations};
use crate::exec::sse::lanes::{build, Lane};
use crate::exec::sse::operand::{is_byte, is_memory, vex_source, Source};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Vpermd | Mnemonic::Vpermps => vex_source!(insn, permute_32),
        Mnemonic::Vpermq | Mnemonic::Vpermpd => vex_source!(insn, permute_64),
        Mnemonic::Vperm2f128 | Mnemonic::Vperm2i128 => vex_source!(insn, permute_128),
        Mnemonic::Vinsertf128 | Mnemonic::Vinserti128 => vex_source!(insn, insert),
        Mnemonic::Vextractf128 | Mnemonic::Vextracti128 if is_memory(insn, 0) => extract_to_memory,
        Mnemonic::Vextractf128 | Mnemonic::Vextracti128 => extract,
        _ if is_byte(insn, insn.op_count().wrapping_sub(1)) => return by_immediate(insn),
        _ => return by_vector::handler(insn),
    })
}

mod by_vector {
    use super::{build, operations, Lane};

    operations! {
        Vpermilps => |a, b| build(|n| u32::get(&a, usize::from(b[4 * n] & 3)));
        Vpermilpd => |a, b| build(|n| u64::get(&a, usize::from(b[8 * n] >> 1 & 1)));
    }
}

immediate_operations! { by_immediate:
    Vpermilps => |_a, b, imm| build(|n| u32::get(&b, usize::from(imm >> (2 * n) & 3)));
    Vpermilpd by 2 => |_a, b, imm| build(|n| u64::get(&b, usize::from(imm >> n & 1)));
    Vpblendd by 4 => |a, b, imm| build(|n| u32::get(if imm >> n & 1 != 0 { &b } else { &a }, n));
}

/// The indices are the first source, the lanes the second.
fn permute_32<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let lanes = bytes(S::vector(cpu, uop)?);
    let indices = bytes(S::first(cpu, uop));
    S::put(cpu, uop.reg[0], vector(build(|n| u32::get(&lanes, usize::from(indices[4 * n] & 7)))));
    Ok(())
}

fn permute_64<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let lanes = bytes(S::vector(cpu, uop)?);
    S::put(cpu, uop.reg[0], vector(build(|n| u64::get(&lanes, uop.imm as usize >> (2 * n) & 3))));
    Ok(())
}

/// Each nibble of the immediate selects one of four halves, or zero.
fn permute_128<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let [b_low, b_high] = S::vector(cpu, uop)?;
    let [a_low, a_high] = S::first(cpu, uop);
    let chosen = |nibble: u64| if nibble & 8 != 0 { 0 } else { [a_low, a_high, b_low, b_high][nibble as usize & 3] };
    S::put(cpu, uop.reg[0], [chosen(uop.imm), chosen(uop.imm >> 4)]);
    Ok(())
}

fn insert<S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    S::require(cpu)?;
    let half = S::xmm(cpu, uop)?;
    let mut result = S::first(cpu, uop);
    result[uop.imm as usize & 1] = half;
    S::put(cpu, uop.reg[0], result);
    Ok(())
}

fn extract(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let half = cpu.ymm(uop.reg[1])[uop.imm as usize & 1];
    cpu.set_ymm(uop.reg[0], [half, 0]);
    Ok(())
}

fn extract_to_memory(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_avx()?;
    let half = cpu.ymm(uop.reg[1])[uop.imm as usize & 1];
    cpu.store_vector::<1, false>(uop, [half, 0])
}
