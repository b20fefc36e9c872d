//! The micro-op: one decoded guest instruction, ready to run.
//!
//! A block is a straight line of micro-ops with one entry. A micro-op names its guest instruction (`code`), its operands as offsets into
//! the register file, and the handler that executes it. State is precise between any two micro-ops. `code` and the operand fields are all
//! that a translator needs, so handlers stay an implementation detail of the interpreter.

use crate::cpu::Cpu;

/// Why a handler does not want the next micro-op of its block to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stop {
    /// The block is finished and `Cpu::rip` is the next instruction.
    Next = 1,
    /// The instruction is complete; the dispatcher must look at the CPU again before the following one.
    Leave,
    /// The instruction raised the exception in `Cpu::fault` and changed nothing.
    Fault,
    /// The instruction caused the VM exit in `Cpu::exit` and changed nothing.
    Exit,
    /// The instruction made progress (a REP iteration) and goes on at the same RIP after the dispatcher looked at the CPU.
    Again,
    /// Nothing happened: a fast handler leaves the instruction to the reference handler.
    Slow,
    /// Nothing happened: the block died before this instruction, which runs again from fresh code.
    Retry,
}

/// Result of a handler or of one of its steps.
pub type Exec<T = ()> = Result<T, Stop>;

/// A handler: executes one micro-op.
pub type Handler = fn(&mut Cpu, &Uop) -> Exec;

/// Offset of a general register of any width in the register file: `8 * number`, or `8 * number + 1` for AH, CH, DH, BH.
pub type RegOffset = u8;

/// Register file slots behind the sixteen general registers.
pub mod slot {
    /// Always zero: the base or index that an address does not have.
    pub const ZERO: u8 = 16;
    /// RIP of the first instruction of the running block.
    pub const RIP: u8 = 17;
    /// Constant that pulls a RIP-relative displacement back into 32 bits.
    pub const STRIDE: u8 = 18;
    pub const COUNT: usize = 19;
}

/// Value of slot STRIDE, times two: more than the largest offset of a block's end.
pub const RIP_STRIDE: i64 = 2 << 12;

/// Bits of `Uop::flags`.
pub mod flag {
    /// The address needs more than base + index + displacement: 16- or 32-bit addresses, or segment checks.
    pub const SLOW_ADDRESS: u8 = 1;
    /// Addresses are truncated to 32 bits.
    pub const ADDRESS_32: u8 = 2;
    /// Addresses are truncated to 16 bits.
    pub const ADDRESS_16: u8 = 4;
    pub const LOCK: u8 = 8;
    pub const REP: u8 = 16;
    pub const REPNE: u8 = 32;
    /// The absolute address is in `imm` (MOV with a 64-bit offset).
    pub const ABSOLUTE: u8 = 64;
    /// The code segment is 64-bit: RIP, near branches and the stack are 64 bits wide.
    pub const LONG: u8 = 128;
}

/// One decoded instruction. Field meaning beyond the operands belongs to the handler.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Uop {
    pub run: Handler,
    /// The immediate operand, sign-extended; for near branches the target relative to the block's first byte.
    pub imm: u64,
    /// Displacement of the memory operand; a second immediate where an instruction has two.
    pub disp: i32,
    /// `iced_x86::Code` of the instruction.
    pub code: u16,
    /// Distance of the instruction's first byte from the block's first byte.
    pub offset: u16,
    /// Register of operand 0..2: a `RegOffset` for general registers, else the register's number.
    pub reg: [u8; 3],
    /// `RegOffset` of the base of the memory operand.
    pub base: RegOffset,
    /// `RegOffset` of the index of the memory operand.
    pub index: RegOffset,
    /// Bits 1:0 scale; bits 4:2 segment number (6: none, base zero).
    pub segment_scale: u8,
    pub flags: u8,
    /// Length in bytes.
    pub length: u8,
}

const _: () = assert!(size_of::<Uop>() == 32);

impl Uop {
    /// Segment number of the memory operand, 6 for none.
    #[inline(always)]
    pub fn segment(&self) -> usize {
        (self.segment_scale >> 2) as usize
    }
    /// Distance of the next instruction from the block's first byte.
    #[inline(always)]
    pub fn next_offset(&self) -> u64 {
        self.offset as u64 + self.length as u64
    }
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
    /// Bits of an address that the instruction's address size keeps.
    #[inline(always)]
    pub fn address_mask(&self) -> u64 {
        if self.has(flag::ADDRESS_16) {
            0xffff
        } else if self.has(flag::ADDRESS_32) {
            0xffff_ffff
        } else {
            u64::MAX
        }
    }
}
