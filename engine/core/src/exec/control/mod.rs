//! Control and debug registers, the TLB, interrupt enable, HLT and the other instructions that steer the CPU.
//!
//! Sources: SDM vol. 3, 2.5 (control registers), 4.10 (TLB), 17.2 (debug registers), 25.1.3 and 25.6.6 (interception); SDM vol. 2.

mod debug;
mod enable;
mod idle;
mod invalidate;
mod load;
mod read;
mod write;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::CodeSize;
use crate::uop::Handler;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    registers(insn).or_else(|| enable::handler(insn)).or_else(|| invalidate::handler(insn)).or_else(|| idle::handler(insn))
}

fn registers(insn: &Instruction) -> Option<Handler> {
    let memory = insn.op0_kind() == OpKind::Memory;
    Some(match insn.code() {
        Code::Mov_r32_cr => read::read_control::<u32>,
        Code::Mov_r64_cr => read::read_control::<u64>,
        Code::Mov_cr_r32 if insn.op0_register() == Register::CR3 => write::write_cr3::<u32>,
        Code::Mov_cr_r64 if insn.op0_register() == Register::CR3 => write::write_cr3::<u64>,
        Code::Mov_cr_r32 => write::write_control::<u32>,
        Code::Mov_cr_r64 => write::write_control::<u64>,
        Code::Smsw_rm16 | Code::Smsw_r32m16 | Code::Smsw_r64m16 if memory => read::store_status,
        Code::Smsw_rm16 => read::read_status::<u16>,
        Code::Smsw_r32m16 => read::read_status::<u32>,
        Code::Smsw_r64m16 => read::read_status::<u64>,
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 if memory => write::load_status::<true>,
        Code::Lmsw_rm16 | Code::Lmsw_r32m16 | Code::Lmsw_r64m16 => write::load_status::<false>,
        Code::Clts => write::clear_task_switched,
        Code::Mov_r32_dr => debug::read::<u32>,
        Code::Mov_r64_dr => debug::read::<u64>,
        Code::Mov_dr_r32 => debug::write::<u32>,
        Code::Mov_dr_r64 => debug::write::<u64>,
        _ => return None,
    })
}

/// Whatever may change translation, the mode or what interrupts may do ends its block.
pub fn ends_block(insn: &Instruction) -> bool {
    match insn.mnemonic() {
        Mnemonic::Mov => matches!(insn.code(), Code::Mov_cr_r32 | Code::Mov_cr_r64 | Code::Mov_dr_r32 | Code::Mov_dr_r64),
        Mnemonic::Lmsw | Mnemonic::Clts | Mnemonic::Invlpg | Mnemonic::Invpcid | Mnemonic::Sti | Mnemonic::Hlt | Mnemonic::Serialize => {
            true
        }
        _ => false,
    }
}
