//! Registers and memory operands of vector instructions, legacy and VEX (SDM vol. 1, 9.2, 10.2 and 14.1; vol. 2, 2.3 and 2.4).
//!
//! A handler is generic over an [`Encoding`] or, where its last source may be a register or memory, over a [`Source`]. Both say which
//! registers are the operands and what becomes of the bytes above the result. Vectors are worked on by halves of 16 bytes, because
//! that is how AVX2 is defined: a YMM register is two XMM registers side by side.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, OpKind};

use crate::cpu::Cpu;
use crate::model::Silicon;
use crate::paging::AccessKind;
use crate::uop::{Exec, Uop};

/// Bits 79:64 of an x87 register that holds an MMX value (SDM vol. 1, 9.2.1).
const MMX_EXPONENT: [u8; 2] = [0xff, 0xff];

/// The two halves of a YMM register, the low one first. An XMM value is the low half.
pub type Vector = [u128; 2];

impl Cpu {
    /// XMM register `n`.
    #[inline(always)]
    pub(in crate::exec) fn xmm(&self, n: u8) -> u128 {
        self.half(n, 0)
    }

    #[inline(always)]
    fn half(&self, n: u8, half: usize) -> u128 {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.state.fpu.vector[n as usize & 31][16 * half..][..16]);
        u128::from_le_bytes(bytes)
    }

    /// YMM register `n`.
    #[inline(always)]
    pub(in crate::exec) fn ymm(&self, n: u8) -> Vector {
        [self.half(n, 0), self.half(n, 1)]
    }

    /// Writes XMM register `n` as legacy SSE does: the bytes above keep their value.
    #[inline(always)]
    pub(in crate::exec) fn set_xmm(&mut self, n: u8, value: u128) {
        self.state.fpu.vector[n as usize & 31][..16].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes YMM register `n` as VEX instructions do: the bytes above become zero.
    #[inline(always)]
    pub(in crate::exec) fn set_ymm(&mut self, n: u8, [low, high]: Vector) {
        let register = &mut self.state.fpu.vector[n as usize & 31];
        register[..16].copy_from_slice(&low.to_le_bytes());
        register[16..32].copy_from_slice(&high.to_le_bytes());
        register[32..].fill(0);
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

    /// Address of a memory operand of `HALVES` times 16 bytes. `ALIGNED`: #GP(0) where it is not aligned to its size.
    #[inline(always)]
    fn vector_address<const HALVES: usize, const ALIGNED: bool>(&mut self, uop: &Uop, kind: AccessKind) -> Exec<u64> {
        let bytes = 16 * HALVES as u64;
        let la = self.linear(uop, bytes, kind)?;
        if ALIGNED && la & (bytes - 1) != 0 && !self.takes_misaligned(uop) {
            return Err(self.general_protection());
        }
        Ok(la)
    }

    /// The operands of the SHA instructions may be anywhere for AMD's silicon.
    #[cold]
    fn takes_misaligned(&self, uop: &Uop) -> bool {
        let is_sha = |code: Code| code.cpuid_features().contains(&CpuidFeature::SHA);
        self.silicon == Silicon::Amd && Code::try_from(usize::from(uop.code)).is_ok_and(is_sha)
    }

    /// Reads a memory operand of `HALVES` times 16 bytes.
    #[inline(always)]
    pub(in crate::exec) fn load_vector<const HALVES: usize, const ALIGNED: bool>(&mut self, uop: &Uop) -> Exec<Vector> {
        let la = self.vector_address::<HALVES, ALIGNED>(uop, AccessKind::Read)?;
        let low = self.read(uop.segment(), la)?;
        let high = if HALVES == 2 { self.read(uop.segment(), la.wrapping_add(16))? } else { 0 };
        Ok([low, high])
    }

    /// Writes a memory operand of `HALVES` times 16 bytes.
    #[inline(always)]
    pub(in crate::exec) fn store_vector<const HALVES: usize, const ALIGNED: bool>(&mut self, uop: &Uop, value: Vector) -> Exec {
        let la = self.vector_address::<HALVES, ALIGNED>(uop, AccessKind::Write)?;
        if HALVES == 2 {
            self.probe_write(uop.segment(), la, 32)?;
        }
        self.write(uop.segment(), la, value[0])?;
        if HALVES == 2 {
            self.write(uop.segment(), la.wrapping_add(16), value[1])?;
        }
        Ok(())
    }
}

/// How an instruction is encoded: which registers are its sources, and what its result does to the bytes above.
pub trait Encoding {
    /// Raises what keeps the instruction from running.
    fn require(cpu: &mut Cpu) -> Exec;
    /// Register of the first source.
    fn first(uop: &Uop) -> u8;
    /// Register of the second source of an instruction that has two.
    fn second(uop: &Uop) -> u8;
    /// Register of the mask of a variable blend.
    fn mask(uop: &Uop) -> u8;
    /// Writes a result.
    fn put(cpu: &mut Cpu, n: u8, value: Vector);
    /// Writes a result of 16 bytes.
    #[inline(always)]
    fn put_xmm(cpu: &mut Cpu, n: u8, value: u128) {
        Self::put(cpu, n, [value, 0]);
    }
}

/// SSE: the destination is the first source, and keeps what is above the result.
pub struct Legacy;
/// VEX: the destination is an operand of its own, and is zero above the result.
pub struct Vex;

impl Encoding for Legacy {
    #[inline(always)]
    fn require(cpu: &mut Cpu) -> Exec {
        cpu.require_sse()
    }
    #[inline(always)]
    fn first(uop: &Uop) -> u8 {
        uop.reg[0]
    }
    #[inline(always)]
    fn second(uop: &Uop) -> u8 {
        uop.reg[1]
    }
    #[inline(always)]
    fn mask(_uop: &Uop) -> u8 {
        0
    }
    #[inline(always)]
    fn put(cpu: &mut Cpu, n: u8, value: Vector) {
        cpu.set_xmm(n, value[0]);
    }
}

impl Encoding for Vex {
    #[inline(always)]
    fn require(cpu: &mut Cpu) -> Exec {
        cpu.require_avx()
    }
    #[inline(always)]
    fn first(uop: &Uop) -> u8 {
        uop.reg[1]
    }
    #[inline(always)]
    fn second(uop: &Uop) -> u8 {
        uop.reg[2]
    }
    #[inline(always)]
    fn mask(uop: &Uop) -> u8 {
        uop.imm as u8
    }
    #[inline(always)]
    fn put(cpu: &mut Cpu, n: u8, value: Vector) {
        cpu.set_ymm(n, value);
    }
}

/// Where the last source comes from, with the encoding.
pub trait Source {
    type Encoding: Encoding;
    /// How many halves the instruction works on.
    const HALVES: usize;
    /// The source; what is above it in the two halves reads as zero.
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector>;
    /// The low half of the source.
    #[inline(always)]
    fn xmm(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        Ok(Self::vector(cpu, uop)?[0])
    }
    #[inline(always)]
    fn require(cpu: &mut Cpu) -> Exec {
        Self::Encoding::require(cpu)
    }
    /// The first source.
    #[inline(always)]
    fn first(cpu: &Cpu, uop: &Uop) -> Vector {
        cpu.ymm(Self::Encoding::first(uop))
    }
    #[inline(always)]
    fn put(cpu: &mut Cpu, n: u8, value: Vector) {
        Self::Encoding::put(cpu, n, value);
    }
    #[inline(always)]
    fn put_xmm(cpu: &mut Cpu, n: u8, value: u128) {
        Self::Encoding::put_xmm(cpu, n, value);
    }
}

/// A vector whose half `n` is `half(n)`, for as many halves as `S` works on.
#[inline(always)]
pub fn halves<S: Source>(half: impl Fn(usize) -> u128) -> Vector {
    [half(0), if S::HALVES == 2 { half(1) } else { 0 }]
}

/// The source of a legacy instruction is register operand 1.
pub struct Register;
/// The source of a legacy instruction is in memory and must be aligned.
pub struct Memory;
/// The source of a legacy instruction is 4 bytes of memory.
pub struct Memory32;
/// The source of a legacy instruction is 8 bytes of memory.
pub struct Memory64;
/// The source of a VEX instruction is register operand `N`.
pub struct VexRegister<const N: usize, const HALVES: usize>;
/// The source of a VEX instruction is `BYTES` of memory, aligned or not.
pub struct VexMemory<const BYTES: usize>;

impl Source for Register {
    type Encoding = Legacy;
    const HALVES: usize = 1;
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        Ok([cpu.xmm(uop.reg[1]), 0])
    }
}

impl Source for Memory {
    type Encoding = Legacy;
    const HALVES: usize = 1;
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        cpu.load_vector::<1, true>(uop)
    }
}

impl Source for Memory32 {
    type Encoding = Legacy;
    const HALVES: usize = 1;
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        Ok([cpu.load::<u32>(uop)?.into(), 0])
    }
}

impl Source for Memory64 {
    type Encoding = Legacy;
    const HALVES: usize = 1;
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        Ok([cpu.load::<u64>(uop)?.into(), 0])
    }
}

impl<const N: usize, const HALVES: usize> Source for VexRegister<N, HALVES> {
    type Encoding = Vex;
    const HALVES: usize = HALVES;
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        Ok(if HALVES == 2 { cpu.ymm(uop.reg[N]) } else { [cpu.xmm(uop.reg[N]), 0] })
    }
}

impl<const BYTES: usize> Source for VexMemory<BYTES> {
    type Encoding = Vex;
    const HALVES: usize = BYTES.div_ceil(16);
    #[inline(always)]
    fn vector(cpu: &mut Cpu, uop: &Uop) -> Exec<Vector> {
        match BYTES {
            1 => Ok([cpu.load::<u8>(uop)?.into(), 0]),
            2 => Ok([cpu.load::<u16>(uop)?.into(), 0]),
            4 => Ok([cpu.load::<u32>(uop)?.into(), 0]),
            8 => Ok([cpu.load::<u64>(uop)?.into(), 0]),
            16 => cpu.load_vector::<1, false>(uop),
            _ => cpu.load_vector::<2, false>(uop),
        }
    }
}

/// Where the source of an instruction on MMX registers comes from.
pub trait MmxSource {
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64>;
}

impl MmxSource for Register {
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        Ok(cpu.mm(uop.reg[1]))
    }
}

impl MmxSource for Memory64 {
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        cpu.load(uop)
    }
}

impl MmxSource for Memory32 {
    #[inline(always)]
    fn mm(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
        Ok(cpu.load::<u32>(uop)?.into())
    }
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

/// Whether operand `n` is a YMM register.
pub fn is_ymm(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_ymm()
}

/// Whether operand `n` is an immediate byte.
pub fn is_byte(insn: &Instruction, n: u32) -> bool {
    insn.op_kind(n) == OpKind::Immediate8
}

/// Whether any operand is a YMM register.
pub fn is_wide(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| is_ymm(insn, n))
}

/// Whether an instruction has a VEX prefix.
pub fn is_vex(insn: &Instruction) -> bool {
    insn.code().encoding() == EncodingKind::VEX
}

/// Whether the last source of a VEX instruction is operand 2, not 1.
pub fn has_three_operands(insn: &Instruction) -> bool {
    insn.op_count() > 2 && !is_byte(insn, 2)
}

/// Picks `$handler::<..., Encoding>` by the encoding of `$insn`.
macro_rules! by_encoding {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {{
        use crate::exec::sse::operand::{is_vex, Legacy, Vex};
        use crate::uop::Handler;
        if is_vex($insn) {
            $handler::<$($generic,)* Vex> as Handler
        } else {
            $handler::<$($generic,)* Legacy>
        }
    }};
}
pub(super) use by_encoding;

/// Picks `$handler::<Encoding, HALVES, $aligned>` for a whole vector.
macro_rules! whole_vector {
    ($insn:expr, $handler:ident, $aligned:literal) => {{
        use crate::exec::sse::operand::{is_vex, is_wide, Legacy, Vex};
        use crate::uop::Handler;
        match (is_vex($insn), is_wide($insn)) {
            (false, _) => $handler::<Legacy, 1, $aligned> as Handler,
            (true, false) => $handler::<Vex, 1, $aligned>,
            (true, true) => $handler::<Vex, 2, $aligned>,
        }
    }};
}
pub(super) use whole_vector;

/// Picks `$handler::<..., MmxSource>` by where operand 1 of `$insn` is.
macro_rules! mmx_source {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {{
        use crate::exec::sse::operand::{is_memory, Memory32, Memory64, Register};
        use crate::uop::Handler;
        match (is_memory($insn, 1), $insn.memory_size().size()) {
            (false, _) => $handler::<$($generic,)* Register> as Handler,
            (_, 4) => $handler::<$($generic,)* Memory32>,
            _ => $handler::<$($generic,)* Memory64>,
        }
    }};
}
pub(super) use mmx_source;

/// Picks `$handler::<..., Source>` for a legacy instruction, by where operand 1 of `$insn` is and how much of it is read.
macro_rules! legacy_source {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {{
        use crate::exec::sse::operand::{is_memory, Memory, Memory32, Memory64, Register};
        use crate::uop::Handler;
        match (is_memory($insn, 1), $insn.memory_size().size()) {
            (false, _) => $handler::<$($generic,)* Register> as Handler,
            (_, 4) => $handler::<$($generic,)* Memory32>,
            (_, 8) => $handler::<$($generic,)* Memory64>,
            _ => $handler::<$($generic,)* Memory>,
        }
    }};
}
pub(super) use legacy_source;

/// Picks `$handler::<..., Source>` for a VEX instruction, by where its last source is and how much of it is read.
macro_rules! vex_source {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {{
        use crate::exec::sse::operand::{has_three_operands, is_memory, is_wide, VexMemory, VexRegister};
        use crate::uop::Handler;
        let three = has_three_operands($insn);
        match (is_memory($insn, 1 + u32::from(three)), $insn.memory_size().size(), three, is_wide($insn)) {
            (false, _, false, false) => $handler::<$($generic,)* VexRegister<1, 1>> as Handler,
            (false, _, false, true) => $handler::<$($generic,)* VexRegister<1, 2>>,
            (false, _, true, false) => $handler::<$($generic,)* VexRegister<2, 1>>,
            (false, _, true, true) => $handler::<$($generic,)* VexRegister<2, 2>>,
            (_, 4, ..) => $handler::<$($generic,)* VexMemory<4>>,
            (_, 8, ..) => $handler::<$($generic,)* VexMemory<8>>,
            (_, 16, ..) => $handler::<$($generic,)* VexMemory<16>>,
            _ => $handler::<$($generic,)* VexMemory<32>>,
        }
    }};
}
pub(in crate::exec) use vex_source;

/// [`vex_source`] or [`legacy_source`], by the encoding.
macro_rules! vector_source {
    ($insn:expr, $handler:ident $(, $generic:ty)*) => {
        if $crate::exec::sse::operand::is_vex($insn) {
            $crate::exec::sse::operand::vex_source!($insn, $handler $(, $generic)*)
        } else {
            $crate::exec::sse::operand::legacy_source!($insn, $handler $(, $generic)*)
        }
    };
}
pub(super) use vector_source;
