//! Registers and operands of vector instructions, and the shapes that most of them have.
//!
//! An operation says what it computes (the traits below); `form` picks, when the instruction is decoded, the handler that feeds it from
//! the right registers or memory.

use iced_x86::{Instruction, OpKind};

use crate::cpu::Cpu;
use crate::paging::AccessKind;
use crate::uop::{Exec, Handler, Uop};

/// Bits 79:64 of an x87 register that holds an MMX value (SDM vol. 1, 9.2.1).
const MMX_EXPONENT: [u8; 2] = [0xff, 0xff];

impl Cpu {
    /// XMM register `n`.
    #[inline(always)]
    pub(super) fn xmm(&self, n: u8) -> u128 {
        let register = &self.state.fpu.vector[n as usize & 31];
        let mut low = [0; 16];
        low.copy_from_slice(&register[..16]);
        u128::from_le_bytes(low)
    }

    /// Writes XMM register `n` as legacy SSE does: the bytes above keep their value.
    #[inline(always)]
    pub(super) fn set_xmm(&mut self, n: u8, value: u128) {
        self.state.fpu.vector[n as usize & 31][..16].copy_from_slice(&value.to_le_bytes());
    }

    /// MMX register `n`.
    #[inline(always)]
    pub(super) fn mm(&self, n: u8) -> u64 {
        let mut low = [0; 8];
        low.copy_from_slice(&self.state.fpu.st[n as usize & 7][..8]);
        u64::from_le_bytes(low)
    }

    /// Writes MMX register `n`.
    #[inline(always)]
    pub(super) fn set_mm(&mut self, n: u8, value: u64) {
        let register = &mut self.state.fpu.st[n as usize & 7];
        register[..8].copy_from_slice(&value.to_le_bytes());
        register[8..10].copy_from_slice(&MMX_EXPONENT);
    }

    /// What every MMX instruction but EMMS does to the x87 state: TOP is 0 and no register is empty (SDM vol. 1, 9.5.1).
    #[inline(always)]
    pub(super) fn touch_mmx(&mut self) {
        self.state.fpu.fsw &= !(7 << 11);
        self.state.fpu.ftw = 0xff;
    }

    /// Reads a 16-byte memory operand that must be aligned, #GP(0) otherwise.
    #[inline(always)]
    pub(super) fn load_aligned(&mut self, uop: &Uop) -> Exec<u128> {
        let la = self.linear(uop, 16, AccessKind::Read)?;
        if la & 15 != 0 {
            return Err(self.general_protection());
        }
        self.read(uop.segment(), la)
    }

    /// Writes a 16-byte memory operand that must be aligned, #GP(0) otherwise.
    #[inline(always)]
    pub(super) fn store_aligned(&mut self, uop: &Uop, value: u128) -> Exec {
        let la = self.linear(uop, 16, AccessKind::Write)?;
        if la & 15 != 0 {
            return Err(self.general_protection());
        }
        self.write(uop.segment(), la, value)
    }
}

/// Where operand 1 comes from.
pub trait Source {
    /// All of an XMM operand; memory must be aligned.
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128>;
    /// An MMX operand, or the low 64 bits of an XMM operand.
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64>;
}

/// Operand 1 is a register.
pub struct Register;
/// Operand 1 is in memory.
pub struct Memory;

impl Source for Register {
    #[inline(always)]
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        Ok(cpu.xmm(uop.reg[1]))
    }
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        Ok(cpu.mm(uop.reg[1]))
    }
}

impl Source for Memory {
    #[inline(always)]
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        cpu.load_aligned(uop)
    }
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        cpu.load(uop)
    }
}

/// Operand 1 is 4 bytes of memory; the rest of the register reads as zero.
pub struct Memory32;
/// Operand 1 is 8 bytes of memory; the rest of the register reads as zero.
pub struct Memory64;

impl Source for Memory32 {
    #[inline(always)]
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        Ok(cpu.load::<u32>(uop)?.into())
    }
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        Ok(cpu.load::<u32>(uop)?.into())
    }
}

impl Source for Memory64 {
    #[inline(always)]
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        Ok(cpu.load::<u64>(uop)?.into())
    }
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        cpu.load(uop)
    }
}

/// An operation on two vectors, of 8 bytes (MMX) or 16 (XMM): `destination = apply(destination, source)`.
pub trait Binary {
    fn apply<const N: usize>(a: [u8; N], b: [u8; N]) -> [u8; N];
}

/// The same with an immediate byte.
pub trait Immediate {
    fn apply<const N: usize>(a: [u8; N], b: [u8; N], imm: u8) -> [u8; N];
}

/// Whether operand `n` is in memory.
pub fn is_memory(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Memory
}

/// Whether operand `n` is an MMX register.
pub fn is_mm(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm()
}

/// Whether operand `n` is an XMM register.
pub fn is_xmm(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_xmm()
}

/// Picks `$handler::<..., Source>` by where operand 1 of `$insn` is and how much of it is read.
macro_rules! vector_source {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {{
        use crate::exec::sse::operand::{Memory, Memory32, Memory64, Register};
        use crate::uop::Handler;
        match ($crate::exec::sse::operand::is_memory($insn, 1), $insn.memory_size().size()) {
            (false, _) => $handler::<$($generic,)* Register> as Handler,
            (_, 4) => $handler::<$($generic,)* Memory32>,
            (_, 8) => $handler::<$($generic,)* Memory64>,
            _ => $handler::<$($generic,)* Memory>,
        }
    }};
}
pub(super) use vector_source;

/// The handler of operation `O` on MMX or XMM registers.
pub fn binary<O: Binary>(insn: &Instruction) -> Option<Handler> {
    Some(if is_mm(insn, 0) { vector_source!(insn, binary_mm, O) } else { vector_source!(insn, binary_xmm, O) })
}

fn binary_xmm<O: Binary, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let b = S::xmm(cpu, uop)?;
    let a = cpu.xmm(uop.reg[0]);
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes())));
    Ok(())
}

fn binary_mm<O: Binary, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let b = S::mm(cpu, uop)?;
    let a = cpu.mm(uop.reg[0]);
    cpu.touch_mmx();
    cpu.set_mm(uop.reg[0], u64::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes())));
    Ok(())
}

/// The handler of operation `O` with an immediate on MMX or XMM registers.
pub fn immediate<O: Immediate>(insn: &Instruction) -> Option<Handler> {
    Some(if is_mm(insn, 0) { vector_source!(insn, immediate_mm, O) } else { vector_source!(insn, immediate_xmm, O) })
}

fn immediate_xmm<O: Immediate, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_sse()?;
    let b = S::xmm(cpu, uop)?;
    let a = cpu.xmm(uop.reg[0]);
    cpu.set_xmm(uop.reg[0], u128::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes(), uop.imm as u8)));
    Ok(())
}

fn immediate_mm<O: Immediate, S: Source>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_mmx()?;
    let b = S::mm(cpu, uop)?;
    let a = cpu.mm(uop.reg[0]);
    cpu.touch_mmx();
    cpu.set_mm(uop.reg[0], u64::from_le_bytes(O::apply(a.to_le_bytes(), b.to_le_bytes(), uop.imm as u8)));
    Ok(())
}

/// Declares operations by mnemonic, and the `handler` that picks among them:
/// `Mnemonic => |a, b| value` on two vectors, with `N` their length in bytes.
macro_rules! operations {
    ($($mnemonic:ident => |$a:ident, $b:ident| $value:expr;)*) => {
        /// The handler of an instruction of this file.
        pub fn handler(insn: &iced_x86::Instruction) -> Option<crate::uop::Handler> {
            match insn.mnemonic() {
                $(iced_x86::Mnemonic::$mnemonic => {
                    struct Operation;
                    impl crate::exec::sse::operand::Binary for Operation {
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $b: [u8; N]) -> [u8; N] {
                            $value
                        }
                    }
                    crate::exec::sse::operand::binary::<Operation>(insn)
                })*
                _ => None,
            }
        }
    };
}
pub(super) use operations;

/// [`operations`] with an immediate byte: `Mnemonic => |a, b, imm| value`.
macro_rules! immediate_operations {
    ($name:ident: $($mnemonic:ident => |$a:ident, $b:ident, $imm:ident| $value:expr;)*) => {
        fn $name(insn: &iced_x86::Instruction) -> Option<crate::uop::Handler> {
            match insn.mnemonic() {
                $(iced_x86::Mnemonic::$mnemonic => {
                    struct Operation;
                    impl crate::exec::sse::operand::Immediate for Operation {
                        #[inline(always)]
                        fn apply<const N: usize>($a: [u8; N], $b: [u8; N], $imm: u8) -> [u8; N] {
                            $value
                        }
                    }
                    crate::exec::sse::operand::immediate::<Operation>(insn)
                })*
                _ => None,
            }
        }
    };
}
pub(super) use immediate_operations;
