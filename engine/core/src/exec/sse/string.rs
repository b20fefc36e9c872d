//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM vol. 1, ch. 14; vol. 2, 4.1).

use iced_x86::{Code, Instruction};

use super::lanes::{build, Lane};
use super::operand::{is_memory, Encoding, Legacy, Vex};
use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::gpr;
use crate::state::rflags::{CF, OF, SF, ZF};
use crate::uop::{Exec, Handler, Uop};

/// The handler of an instruction of this file.
pub fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Pcmpistri_xmm_xmmm128_imm8 => form::<Legacy, Implicit, Index>(insn),
        Code::Pcmpistrm_xmm_xmmm128_imm8 => form::<Legacy, Implicit, Mask>(insn),
        Code::Pcmpestri_xmm_xmmm128_imm8 => form::<Legacy, Explicit<u32>, Index>(insn),
        Code::Pcmpestri64_xmm_xmmm128_imm8 => form::<Legacy, Explicit<u64>, Index>(insn),
        Code::Pcmpestrm_xmm_xmmm128_imm8 => form::<Legacy, Explicit<u32>, Mask>(insn),
        Code::Pcmpestrm64_xmm_xmmm128_imm8 => form::<Legacy, Explicit<u64>, Mask>(insn),
        Code::VEX_Vpcmpistri_xmm_xmmm128_imm8 => form::<Vex, Implicit, Index>(insn),
        Code::VEX_Vpcmpistrm_xmm_xmmm128_imm8 => form::<Vex, Implicit, Mask>(insn),
        Code::VEX_Vpcmpestri_xmm_xmmm128_imm8 => form::<Vex, Explicit<u32>, Index>(insn),
        Code::VEX_Vpcmpestri64_xmm_xmmm128_imm8 => form::<Vex, Explicit<u64>, Index>(insn),
        Code::VEX_Vpcmpestrm_xmm_xmmm128_imm8 => form::<Vex, Explicit<u32>, Mask>(insn),
        Code::VEX_Vpcmpestrm64_xmm_xmmm128_imm8 => form::<Vex, Explicit<u64>, Mask>(insn),
        _ => return None,
    })
}

fn form<E: Encoding, L: Lengths, O: Output>(insn: &Instruction) -> Handler {
    if is_memory(insn, 1) {
        compare::<E, Memory, L, O>
    } else {
        compare::<E, Register, L, O>
    }
}

// ---- operands -----------------------------------------------------------------------------------------------------------------------

/// Where operand 1 is; memory need not be aligned.
trait Operand {
    fn get(cpu: &mut Cpu, uop: &Uop) -> Exec<u128>;
}
struct Register;
struct Memory;
impl Operand for Register {
    fn get(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        Ok(cpu.xmm(uop.reg[1]))
    }
}
impl Operand for Memory {
    fn get(cpu: &mut Cpu, uop: &Uop) -> Exec<u128> {
        cpu.load(uop)
    }
}

/// Elements of one string, sign- or zero-extended, and how many of them are valid.
struct Elements {
    values: [i32; 16],
    valid: usize,
}

/// Bits of the immediate.
mod imm {
    pub const WORDS: u8 = 1;
    pub const SIGNED: u8 = 2;
    pub const NEGATE: u8 = 1 << 4;
    pub const ONLY_VALID: u8 = 1 << 5;
    pub const TOP: u8 = 1 << 6;
}

/// Elements of a vector in the format of the immediate.
fn values(vector: u128, format: u8) -> [i32; 16] {
    let bytes = vector.to_le_bytes();
    let element = |n: usize| match (format & imm::WORDS != 0, format & imm::SIGNED != 0) {
        (false, false) => i32::from(bytes[n]),
        (false, true) => i32::from(bytes[n] as i8),
        (true, false) => i32::from(u16::get(&bytes, n % 8)),
        (true, true) => i32::from(i16::get(&bytes, n % 8)),
    };
    std::array::from_fn(element)
}

/// Elements of a vector in the format of the immediate.
fn count(format: u8) -> usize {
    if format & imm::WORDS != 0 {
        8
    } else {
        16
    }
}

/// How the lengths of the strings are told.
trait Lengths {
    /// Valid elements of the first and of the second string.
    fn of(cpu: &Cpu, a: &[i32; 16], b: &[i32; 16], count: usize) -> (usize, usize);
}

/// Each string ends before its first zero.
struct Implicit;
impl Lengths for Implicit {
    fn of(_cpu: &Cpu, a: &[i32; 16], b: &[i32; 16], count: usize) -> (usize, usize) {
        let length = |values: &[i32; 16]| values[..count].iter().position(|value| *value == 0).unwrap_or(count);
        (length(a), length(b))
    }
}

/// Absolute values of RAX and RDX, or EAX and EDX without REX.W, up to the size of a vector.
struct Explicit<W>(core::marker::PhantomData<W>);
impl Lengths for Explicit<u32> {
    fn of(cpu: &Cpu, _a: &[i32; 16], _b: &[i32; 16], count: usize) -> (usize, usize) {
        let length = |number| ((cpu.gpr(number) as i32).unsigned_abs() as usize).min(count);
        (length(gpr::RAX), length(gpr::RDX))
    }
}
impl Lengths for Explicit<u64> {
    fn of(cpu: &Cpu, _a: &[i32; 16], _b: &[i32; 16], count: usize) -> (usize, usize) {
        let length = |number| (cpu.gpr(number) as i64).unsigned_abs().min(count as u64) as usize;
        (length(gpr::RAX), length(gpr::RDX))
    }
}

// ---- comparison ---------------------------------------------------------------------------------------------------------------------

/// Result bits before polarity (IntRes1): bit n belongs to element n of `b`.
fn aggregate(a: &Elements, b: &Elements, mode: u8, count: usize) -> u32 {
    let in_any = |n: usize| n < b.valid && a.values[..a.valid].contains(&b.values[n]);
    let in_range = |n: usize| {
        let inside = |range: &[i32]| range[0] <= b.values[n] && b.values[n] <= range[1];
        n < b.valid && a.values[..a.valid].chunks_exact(2).any(inside)
    };
    let equal = |n: usize| match (n < a.valid, n < b.valid) {
        (true, true) => a.values[n] == b.values[n],
        (false, false) => true,
        _ => false,
    };
    let substring = |n: usize| (0..a.valid.min(count - n)).all(|k| n + k < b.valid && a.values[k] == b.values[n + k]);
    (0..count).fold(0, |bits, n| {
        let set = match mode >> 2 & 3 {
            0 => in_any(n),
            1 => in_range(n),
            2 => equal(n),
            _ => substring(n),
        };
        bits | u32::from(set) << n
    })
}

/// Result bits (IntRes2).
fn result_bits(a: &Elements, b: &Elements, mode: u8, count: usize) -> u32 {
    let bits = aggregate(a, b, mode, count);
    let all = (1 << count) - 1;
    let flipped = match (mode & imm::NEGATE != 0, mode & imm::ONLY_VALID != 0) {
        (false, _) => 0,
        (true, false) => all,
        (true, true) => (1 << b.valid) - 1,
    };
    bits ^ flipped
}

/// Where the result goes.
trait Output {
    fn put<E: Encoding>(cpu: &mut Cpu, bits: u32, mode: u8, count: usize);
}

/// ECX: place of the lowest or highest bit, or the number of elements.
struct Index;
impl Output for Index {
    fn put<E: Encoding>(cpu: &mut Cpu, bits: u32, mode: u8, count: usize) {
        let index = match (bits, mode & imm::TOP != 0) {
            (0, _) => count as u32,
            (_, false) => bits.trailing_zeros(),
            (_, true) => 31 - bits.leading_zeros(),
        };
        cpu.set_gpr(gpr::RCX, index.into());
    }
}

/// XMM0: the bits themselves, or a mask of elements.
struct Mask;
impl Output for Mask {
    fn put<E: Encoding>(cpu: &mut Cpu, bits: u32, mode: u8, _count: usize) {
        let mask = match (mode & imm::TOP != 0, mode & imm::WORDS != 0) {
            (false, _) => bits.into(),
            (true, false) => u128::from_le_bytes(build(|n| if bits >> n & 1 != 0 { u8::MAX } else { 0 })),
            (true, true) => u128::from_le_bytes(build(|n| if bits >> n & 1 != 0 { u16::MAX } else { 0 })),
        };
        E::put_xmm(cpu, 0, mask);
    }
}

fn compare<E: Encoding, S: Operand, L: Lengths, O: Output>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    E::require(cpu)?;
    let second = S::get(cpu, uop)?;
    let mode = uop.imm as u8;
    let count = count(mode);
    let (a, b) = (values(cpu.xmm(uop.reg[0]), mode), values(second, mode));
    let (valid_a, valid_b) = L::of(cpu, &a, &b, count);
    let (a, b) = (Elements { values: a, valid: valid_a }, Elements { values: b, valid: valid_b });
    let bits = result_bits(&a, &b, mode, count);
    O::put::<E>(cpu, bits, mode, count);
    let image = [(bits != 0, CF), (valid_b < count, ZF), (valid_a < count, SF), (bits & 1 != 0, OF)];
    cpu.flags = Flags::from_bits(image.into_iter().fold(0, |image, (set, flag)| if set { image | flag } else { image }));
    Ok(())
}
