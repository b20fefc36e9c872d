//! LOOP to itself, the delay loop of old: as many turns at once as a block may have instructions. The reference is `exec::branch`.

use iced_x86::{Code, Instruction};

use crate::cpu::Cpu;
use crate::decode::block::MAX_INSTRUCTIONS;
use crate::state::gpr;
use crate::uop::{Exec, Handler, Stop, Uop};

/// Only a block of its own may stay in place; the second turn begins one.
pub fn handler(insn: &Instruction, uop: &Uop) -> Option<Handler> {
    (insn.code() == Code::Loop_rel8_64_RCX && uop.offset == 0 && uop.imm == 0).then_some(count_down)
}

fn count_down(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = cpu.gpr(gpr::RCX);
    let more = count.wrapping_sub(1).min(MAX_INSTRUCTIONS as u64 - 1);
    let left = count.wrapping_sub(more + 1);
    cpu.set_gpr(gpr::RCX, left);
    cpu.budget -= more as i64; // the block has paid for one turn
    if left == 0 {
        cpu.set_rip_64(cpu.rip().wrapping_add(uop.next_offset()));
    }
    Err(Stop::Next)
}
