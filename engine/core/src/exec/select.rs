//! How families pick specialised handlers while decoding: by operand width, and by condition (SDM vol. 1, app. B).

use iced_x86::{ConditionCode, Instruction, OpKind};

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::uop::{Exec, Uop};
use crate::word::Word;

/// Picks `$handler::<$type.., W>` for the width of `$bytes` bytes.
macro_rules! by_width {
    ($bytes:expr, $handler:ident $(, $type:ty)*) => {
        match $bytes {
            1 => Some($handler::<$($type,)* u8> as $crate::uop::Handler),
            2 => Some($handler::<$($type,)* u16> as $crate::uop::Handler),
            4 => Some($handler::<$($type,)* u32> as $crate::uop::Handler),
            8 => Some($handler::<$($type,)* u64> as $crate::uop::Handler),
            _ => None,
        }
    };
}

/// Picks `$handler::<.., W>` among 16, 32 and 64 bits.
macro_rules! by_wide_width {
    ($bytes:expr, $handler:ident $(, $type:ty)*) => {
        match $bytes {
            2 => Some($handler::<$($type,)* u16> as $crate::uop::Handler),
            4 => Some($handler::<$($type,)* u32> as $crate::uop::Handler),
            8 => Some($handler::<$($type,)* u64> as $crate::uop::Handler),
            _ => None,
        }
    };
}

/// Picks `$handler::<C, $type..>` for condition number `$condition`.
macro_rules! by_condition {
    ($condition:expr, $handler:ident $(, $type:ty)*) => {
        match $condition {
            0 => Some($handler::<0 $(, $type)*> as $crate::uop::Handler),
            1 => Some($handler::<1 $(, $type)*> as $crate::uop::Handler),
            2 => Some($handler::<2 $(, $type)*> as $crate::uop::Handler),
            3 => Some($handler::<3 $(, $type)*> as $crate::uop::Handler),
            4 => Some($handler::<4 $(, $type)*> as $crate::uop::Handler),
            5 => Some($handler::<5 $(, $type)*> as $crate::uop::Handler),
            6 => Some($handler::<6 $(, $type)*> as $crate::uop::Handler),
            7 => Some($handler::<7 $(, $type)*> as $crate::uop::Handler),
            8 => Some($handler::<8 $(, $type)*> as $crate::uop::Handler),
            9 => Some($handler::<9 $(, $type)*> as $crate::uop::Handler),
            10 => Some($handler::<10 $(, $type)*> as $crate::uop::Handler),
            11 => Some($handler::<11 $(, $type)*> as $crate::uop::Handler),
            12 => Some($handler::<12 $(, $type)*> as $crate::uop::Handler),
            13 => Some($handler::<13 $(, $type)*> as $crate::uop::Handler),
            14 => Some($handler::<14 $(, $type)*> as $crate::uop::Handler),
            15 => Some($handler::<15 $(, $type)*> as $crate::uop::Handler),
            _ => None,
        }
    };
}

/// Whether condition number `C`, as opcodes encode it, holds.
#[inline(always)]
pub fn holds<const C: u8>(flags: Flags) -> bool {
    let positive = match C >> 1 {
        0 => flags.of(),
        1 => flags.cf(),
        2 => flags.zf(),
        3 => flags.cf() | flags.zf(),
        4 => flags.sf(),
        5 => flags.pf(),
        6 => flags.sf() ^ flags.of(),
        _ => flags.zf() | (flags.sf() ^ flags.of()),
    };
    positive ^ (C & 1 != 0)
}

/// Number of an instruction's condition, as its opcode encodes it.
pub fn condition(insn: &Instruction) -> Option<u8> {
    use ConditionCode::*;
    const NUMBERED: [ConditionCode; 16] = [o, no, b, ae, e, ne, be, a, s, ns, p, np, l, ge, le, g];
    let code = insn.condition_code();
    NUMBERED.iter().position(|other| *other == code).map(|number| number as u8)
}

/// Width in bytes of operand `n`, which is a general register or memory; zero for others.
pub fn width(insn: &Instruction, n: u32) -> usize {
    match insn.op_kind(n) {
        OpKind::Register if insn.op_register(n).is_gpr() => insn.op_register(n).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => 0,
    }
}

/// Whether operand `n` is memory.
pub fn in_memory(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Memory
}

/// Whether operand `n` is an immediate.
pub fn is_immediate(insn: &Instruction, n: u32) -> bool {
    n < insn.op_count() && !matches!(insn.op_kind(n), OpKind::Register | OpKind::Memory)
}

/// Where a handler finds an operand that may be a register or memory.
pub trait Source {
    /// Operand `n`.
    fn get<W: Word>(cpu: &mut Cpu, uop: &Uop, n: usize) -> Exec<W>;
}

/// The operand is a register.
pub struct InRegister;

/// The operand is memory.
pub struct InMemory;

impl Source for InRegister {
    #[inline(always)]
    fn get<W: Word>(cpu: &mut Cpu, uop: &Uop, n: usize) -> Exec<W> {
        Ok(cpu.reg(uop.reg[n]))
    }
}

impl Source for InMemory {
    #[inline(always)]
    fn get<W: Word>(cpu: &mut Cpu, uop: &Uop, _n: usize) -> Exec<W> {
        cpu.load(uop)
    }
}

/// Picks `$handler::<$type.., S, W>` for where operand `$n` is and for its width of at least 16 bits.
macro_rules! by_wide_source {
    ($insn:expr, $n:expr, $handler:ident $(, $type:ty)*) => {
        if $crate::exec::select::in_memory($insn, $n) {
            by_wide_width!($crate::exec::select::width($insn, $n), $handler $(, $type)*, $crate::exec::select::InMemory)
        } else {
            by_wide_width!($crate::exec::select::width($insn, $n), $handler $(, $type)*, $crate::exec::select::InRegister)
        }
    };
}
