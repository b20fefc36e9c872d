//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD, and the BMI2 forms without flags (SDM vol. 1, 7.3.6; vol. 2).
//!
//! Counts are masked to 5 bits, or 6 for 64-bit operands. A count of zero changes no flag. For other counts than 1, OF is undefined; here
//! it is that of the last single-bit step. What vendors differ in is said in [`crate::model::silicon`].

use iced_x86::{Instruction, Mnemonic};

use super::select::{in_memory, is_immediate, width, Source};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::model::Silicon;
use crate::state::gpr;
use crate::uop::{Exec, Handler, RegOffset, Uop};
use crate::word::Word;

const CL: RegOffset = gpr::RCX as u8 * 8;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(insn),
        Mnemonic::Shr => shift::<Shr>(insn),
        Mnemonic::Sar => shift::<Sar>(insn),
        Mnemonic::Rol => shift::<Rol>(insn),
        Mnemonic::Ror => shift::<Ror>(insn),
        Mnemonic::Rcl => shift::<Rcl>(insn),
        Mnemonic::Rcr => shift::<Rcr>(insn),
        Mnemonic::Shld => double_shift::<Shld>(insn),
        Mnemonic::Shrd => double_shift::<Shrd>(insn),
        Mnemonic::Shlx => by_wide_source!(insn, 1, flagless, Shl),
        Mnemonic::Shrx => by_wide_source!(insn, 1, flagless, Shr),
        Mnemonic::Sarx => by_wide_source!(insn, 1, flagless, Sar),
        Mnemonic::Rorx => by_wide_source!(insn, 1, rorx),
        _ => None,
    }
}

/// The bits of a count that shifts of a width look at.
#[inline(always)]
pub fn mask_count<W: Word>(count: u8) -> u32 {
    u32::from(count) & if W::BITS == 64 { 63 } else { 31 }
}

/// A shift or rotate by a masked count that is not zero.
pub trait Shift {
    fn apply<W: Word>(silicon: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags);
}

pub struct Shl;
pub struct Shr;
pub struct Sar;
pub struct Rol;
pub struct Ror;
struct Rcl;
struct Rcr;

impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, _: Flags, a: W, count: u32) -> (W, Flags) {
        let before = a.zero_extend() << (count - 1);
        let carry = before >> (W::BITS - 1) & 1 != 0;
        let result = W::truncate(before << 1);
        (result, silicon.shifted(Flags::shift(result, carry, carry ^ result.top_bit())))
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, _: Flags, a: W, count: u32) -> (W, Flags) {
        let before = a.zero_extend() >> (count - 1);
        let result = W::truncate(before >> 1);
        (result, silicon.shifted(Flags::shift(result, before & 1 != 0, W::truncate(before).top_bit())))
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, _: Flags, a: W, count: u32) -> (W, Flags) {
        let before = a.sign_extend() as i64 >> (count - 1);
        let result = W::truncate((before >> 1) as u64);
        (result, silicon.shifted(Flags::shift(result, before & 1 != 0, false)))
    }
}

/// `a` rotated left by less than its width.
#[inline(always)]
fn rotate_left<W: Word>(a: W, count: u32) -> W {
    if count == 0 {
        return a;
    }
    a << count | a >> (W::BITS - count)
}

/// Whether the two top bits differ: OF of rotates to the right.
#[inline(always)]
fn top_bits_differ<W: Word>(value: W) -> bool {
    (value ^ value << 1).top_bit()
}

impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags) {
        let result = rotate_left(a, count % W::BITS);
        let carry = result.zero_extend() & 1 != 0;
        (result, flags.with_carry_overflow(carry, carry ^ result.top_bit()))
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags) {
        let result = rotate_left(a, (W::BITS - count % W::BITS) % W::BITS);
        (result, flags.with_carry_overflow(result.top_bit(), top_bits_differ(result)))
    }
}

/// `a` with CF above it, rotated left by `count`, at most the width and one: the new value and carry.
#[inline(always)]
fn rotate_through_carry<W: Word>(carry: bool, a: W, count: u32) -> (W, bool) {
    let wide = u128::from(carry) << W::BITS | u128::from(a.zero_extend());
    let rotated = wide << count | wide >> (W::BITS + 1 - count);
    (W::truncate(rotated as u64), rotated >> W::BITS & 1 != 0)
}

impl Shift for Rcl {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags) {
        let count = count % (W::BITS + 1);
        if count == 0 && silicon == Silicon::Intel {
            return (a, flags);
        }
        let (result, carry) = rotate_through_carry(flags.cf(), a, count);
        (result, flags.with_carry_overflow(carry, carry ^ result.top_bit()))
    }
}

impl Shift for Rcr {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags) {
        let count = count % (W::BITS + 1);
        if count == 0 && silicon == Silicon::Intel {
            return (a, flags);
        }
        let (result, carry) = rotate_through_carry(flags.cf(), a, W::BITS + 1 - count);
        (result, flags.with_carry_overflow(carry, top_bits_differ(result)))
    }
}

// ---- forms ----------------------------------------------------------------------------------------------------------------------------

fn shift<O: Shift>(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), is_immediate(insn, 1)) {
        (false, true) => by_width!(width(insn, 0), shift_r, O, ByImmediate),
        (false, false) => by_width!(width(insn, 0), shift_r, O, ByCl),
        (true, true) => by_width!(width(insn, 0), shift_m, O, ByImmediate),
        (true, false) => by_width!(width(insn, 0), shift_m, O, ByCl),
    }
}

/// Where the count is.
pub trait Count: 'static {
    fn get(cpu: &Cpu, uop: &Uop) -> u8;
}

pub struct ByImmediate;
pub struct ByCl;

impl Count for ByImmediate {
    #[inline(always)]
    fn get(_: &Cpu, uop: &Uop) -> u8 {
        uop.imm as u8
    }
}

impl Count for ByCl {
    #[inline(always)]
    fn get(cpu: &Cpu, _: &Uop) -> u8 {
        cpu.reg(CL)
    }
}

/// A count of zero still writes the destination, which clears the upper half of a 32-bit register.
#[inline(always)]
pub fn apply<O: Shift, W: Word>(silicon: Silicon, flags: Flags, a: W, count: u32) -> (W, Flags) {
    if count == 0 {
        return (a, flags);
    }
    O::apply(silicon, flags, a, count)
}

fn shift_r<O: Shift, C: Count, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = mask_count::<W>(C::get(cpu, uop));
    let (result, flags) = apply::<O, W>(cpu.silicon, cpu.flags, cpu.reg(uop.reg[0]), count);
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = flags;
    Ok(())
}

fn shift_m<O: Shift, C: Count, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = mask_count::<W>(C::get(cpu, uop));
    let before = cpu.flags;
    cpu.modify(uop, |cpu, a: W| {
        let (result, flags) = apply::<O, W>(cpu.silicon, before, a, count);
        cpu.flags = flags;
        result
    })
}

// ---- SHLD and SHRD --------------------------------------------------------------------------------------------------------------------

/// A shift that fills with the bits of a second operand, by a masked count that is not zero.
trait DoubleShift {
    fn apply<W: Word>(silicon: Silicon, a: W, fill: W, count: u32) -> (W, Flags);
}

struct Shld;
struct Shrd;

/// What comes behind `fill`. Only 16-bit operands have counts that reach it, and what becomes of them is undefined.
#[inline(always)]
fn beyond<W: Word>(silicon: Silicon, a: W, fill: W) -> u128 {
    match (W::BITS, silicon) {
        (64, _) => 0,
        (_, Silicon::Intel) => a.zero_extend().into(),
        (_, Silicon::Amd) => fill.zero_extend().into(),
    }
}

/// `last`, the bit that was shifted out last, as CF.
#[inline(always)]
fn double_carry<W: Word>(silicon: Silicon, last: bool, count: u32) -> bool {
    last && (silicon == Silicon::Intel || count <= W::BITS)
}

impl DoubleShift for Shld {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, a: W, fill: W, count: u32) -> (W, Flags) {
        let (value, next) = (u128::from(a.zero_extend()), u128::from(fill.zero_extend()));
        let again = beyond(silicon, a, fill) << 128u32.saturating_sub(3 * W::BITS);
        let before = (value << (128 - W::BITS) | next << (128 - 2 * W::BITS) | again) << (count - 1);
        let result = W::truncate((before << 1 >> (128 - W::BITS)) as u64);
        let carry = double_carry::<W>(silicon, before >> 127 != 0, count);
        let overflow = match silicon {
            Silicon::Intel => (result ^ a).top_bit(),
            Silicon::Amd => carry ^ (count < W::BITS && result.top_bit()),
        };
        (result, silicon.shifted(Flags::shift(result, carry, overflow)))
    }
}

impl DoubleShift for Shrd {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, a: W, fill: W, count: u32) -> (W, Flags) {
        let (value, next) = (u128::from(a.zero_extend()), u128::from(fill.zero_extend()));
        let again = beyond(silicon, a, fill) << (2 * W::BITS % 128);
        let before = (value | next << W::BITS | again) >> (count - 1);
        let result = W::truncate((before >> 1) as u64);
        let overflow = match silicon {
            Silicon::Intel => (result ^ a).top_bit(),
            Silicon::Amd => top_bits_differ(result),
        };
        (result, silicon.shifted(Flags::shift(result, double_carry::<W>(silicon, before & 1 != 0, count), overflow)))
    }
}

fn double_shift<O: DoubleShift>(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), is_immediate(insn, 2)) {
        (false, true) => by_wide_width!(width(insn, 1), double_r, O, ByImmediate),
        (false, false) => by_wide_width!(width(insn, 1), double_r, O, ByCl),
        (true, true) => by_wide_width!(width(insn, 1), double_m, O, ByImmediate),
        (true, false) => by_wide_width!(width(insn, 1), double_m, O, ByCl),
    }
}

#[inline(always)]
fn apply_double<O: DoubleShift, W: Word>(silicon: Silicon, flags: Flags, a: W, fill: W, count: u32) -> (W, Flags) {
    if count == 0 {
        return (a, flags);
    }
    O::apply(silicon, a, fill, count)
}

fn double_r<O: DoubleShift, C: Count, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = mask_count::<W>(C::get(cpu, uop));
    let (result, flags) = apply_double::<O, W>(cpu.silicon, cpu.flags, cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]), count);
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = flags;
    Ok(())
}

fn double_m<O: DoubleShift, C: Count, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let count = mask_count::<W>(C::get(cpu, uop));
    let fill: W = cpu.reg(uop.reg[1]);
    let before = cpu.flags;
    cpu.modify(uop, |cpu, a: W| {
        let (result, flags) = apply_double::<O, W>(cpu.silicon, before, a, fill, count);
        cpu.flags = flags;
        result
    })
}

// ---- BMI2 -----------------------------------------------------------------------------------------------------------------------------

fn flagless<O: Shift, S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let a = S::get::<W>(cpu, uop, 1)?;
    let count = mask_count::<W>(cpu.reg(uop.reg[2]));
    let (result, _) = apply::<O, W>(cpu.silicon, cpu.flags, a, count);
    cpu.set_reg(uop.reg[0], result);
    Ok(())
}

fn rorx<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let a = S::get::<W>(cpu, uop, 1)?;
    let (result, _) = apply::<Ror, W>(cpu.silicon, cpu.flags, a, mask_count::<W>(uop.imm as u8));
    cpu.set_reg(uop.reg[0], result);
    Ok(())
}
