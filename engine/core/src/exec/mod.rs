//! Execution: one file per family of instructions.
//!
//! Each family offers `handler(insn, size)`, which picks the handler of an instruction it knows, once, when the instruction is decoded.
//! A handler does all its reads and checks before its first write, so that an instruction that faults or exits has changed nothing.

#[macro_use]
pub mod select;

pub mod alu;
pub mod avx;
pub mod bits;
pub mod bound;
pub mod branch;
pub mod control;
pub mod decimal;
pub mod direct;
pub mod exchange;
pub mod far;
pub mod fast;
pub mod fence;
pub mod float;
pub mod io;
pub mod mov;
pub mod msr;
pub mod muldiv;
pub mod segment;
pub mod shift;
pub mod sse;
pub mod stack;
pub mod string;
pub mod syscall;
pub mod x87;
pub mod xsave;

use iced_x86::{Code, Instruction};

use crate::cpu::{CodeSize, Cpu};
use crate::uop::{Exec, Handler, Stop, Uop};

/// The handler of an instruction; `None` where the engine has none.
pub fn handler(insn: &Instruction, size: CodeSize) -> Option<Handler> {
    const FAMILIES: [fn(&Instruction, CodeSize) -> Option<Handler>; 23] = [
        mov::handler,
        alu::handler,
        branch::handler,
        stack::handler,
        shift::handler,
        bits::handler,
        muldiv::handler,
        string::handler,
        sse::handler,
        avx::handler,
        x87::handler,
        xsave::handler,
        io::handler,
        msr::handler,
        control::handler,
        segment::handler,
        far::handler,
        syscall::handler,
        fence::handler,
        exchange::handler,
        decimal::handler,
        bound::handler,
        direct::handler,
    ];
    FAMILIES.iter().find_map(|family| family(insn, size))
}

/// Whether the dispatcher must look at the CPU after this instruction although it is not a branch: it may change the mode, the
/// privilege, the address space, what interrupts may do, or the control words of floating point.
pub fn ends_block(insn: &Instruction) -> bool {
    stack::ends_block(insn)
        || control::ends_block(insn)
        || segment::ends_block(insn)
        || far::ends_block(insn)
        || msr::ends_block(insn)
        || xsave::ends_block(insn)
        || sse::ends_block(insn)
        || x87::ends_block(insn)
}

/// Handler of the micro-op behind a block that does not end in a branch.
pub fn fall_through(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let next = cpu.rip_at(uop.imm);
    cpu.set_rip(next);
    Err(Stop::Next)
}

/// Handler of every micro-op of a block that died: the dispatcher goes on at this instruction with fresh code.
pub fn resume(_cpu: &mut Cpu, _uop: &Uop) -> Exec {
    Err(Stop::Retry)
}

/// Handler of an instruction with a hidden breakpoint: leaves the guest, or the instruction to its reference handler.
pub fn breakpoint(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.meet_breakpoint()?;
    Err(Stop::Slow)
}

/// Handler of an instruction that the CPU model lacks.
pub fn undefined(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    Err(cpu.undefined())
}

/// Handler of an instruction that the engine lacks: #UD, and one line in the log per opcode.
pub fn unknown(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let code = Code::try_from(usize::from(uop.code)).unwrap_or(Code::INVALID);
    if code != Code::INVALID && cpu.unknown_opcodes.insert(uop.code) {
        log::warn!("the engine lacks {code:?}; the guest gets #UD at {:#x}", cpu.rip_at(uop.offset.into()));
    }
    Err(cpu.undefined())
}
