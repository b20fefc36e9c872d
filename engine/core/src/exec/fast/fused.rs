//! A comparison of registers, or of memory with an immediate, and the conditional branch behind it, in one call.
//!
//! Both keep a micro-op of their own: `Cpu::at` is on the branch when it runs, and a single step takes one of them.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::{compare_mi, compare_ri, compare_rr};
use super::operand::{is_based, Based};
use super::{next, Body, Outcome};
use crate::cpu::Cpu;
use crate::exec::alu::{And, Binary, Sub};
use crate::exec::branch::jcc;
use crate::exec::select::{condition, in_memory, is_immediate, width};
use crate::uop::{Exec, Handler, Stop, Uop};

/// The condition of a conditional branch of 64-bit code; `None` for other instructions.
pub fn branch_condition(insn: &Instruction) -> Option<u8> {
    condition(insn).filter(|_| insn.is_jcc_short_or_near() && insn.op0_kind() == OpKind::NearBranch64)
}

/// The handler of comparison `insn`, behind which a branch on `condition` comes.
pub fn handler(insn: &Instruction, uop: &Uop, condition: u8) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Cmp => comparison::<Sub>(insn, uop, condition),
        Mnemonic::Test => comparison::<And>(insn, uop, condition),
        _ => None,
    }
}

fn comparison<O: Binary>(insn: &Instruction, uop: &Uop, condition: u8) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1), width(insn, 0)) {
        (false, false, false, 1) => fused(compare_rr::<O, u8>, condition),
        (false, false, false, 4) => fused(compare_rr::<O, u32>, condition),
        (false, false, false, 8) => fused(compare_rr::<O, u64>, condition),
        (false, _, true, 1) => fused(compare_ri::<O, u8>, condition),
        (false, _, true, 4) => fused(compare_ri::<O, u32>, condition),
        (false, _, true, 8) => fused(compare_ri::<O, u64>, condition),
        (true, _, true, 1) if is_based(uop) => fused(compare_mi::<O, Based, u8>, condition),
        (true, _, true, 4) if is_based(uop) => fused(compare_mi::<O, Based, u32>, condition),
        (true, _, true, 8) if is_based(uop) => fused(compare_mi::<O, Based, u64>, condition),
        _ => None,
    }
}

/// The handler that runs `body` and then a branch on `condition`.
fn fused<B: Body>(body: B, condition: u8) -> Option<Handler> {
    macro_rules! on {
        ($($number:literal)+) => {
            match condition {
                $($number => Some(fuse::<B, $number> as Handler),)+
                _ => None,
            }
        };
    }
    super::assert_function_item(body);
    on!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
}

fn fuse<B: Body, const C: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    // SAFETY: `fused` had a value of this type, and it has no bytes.
    let body: B = unsafe { core::mem::zeroed() };
    if body(cpu, uop) == Outcome::GiveUp {
        return Err(Stop::Slow);
    }
    // SAFETY: the decoder found a branch behind this instruction, in the same block.
    let branch = unsafe { next(uop) };
    cpu.at = branch;
    jcc::<C, u64>(cpu, branch)
}
