//! Multiplication and division: MUL, IMUL, MULX, DIV, IDIV (SDM vol. 1, 7.3.2; vol. 2 for each).
//!
//! The flags that a division leaves, and SF, ZF, AF and PF of a product, are undefined: [`crate::model::silicon`] says what they are.

use iced_x86::{Instruction, Mnemonic};

use super::select::{in_memory, is_immediate, width, InMemory, InRegister, Source};
use crate::cpu::{CodeSize, Cpu};
use crate::fault::vector;
use crate::flags::Flags;
use crate::model::Silicon;
use crate::state::gpr;
use crate::uop::{Exec, Handler, RegOffset, Uop};
use crate::word::Word;

const RAX: RegOffset = gpr::RAX as u8 * 8;
const RDX: RegOffset = gpr::RDX as u8 * 8;
const AH: RegOffset = RAX + 1;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Mul => one_operand::<Mul>(insn),
        Mnemonic::Imul if insn.op_count() == 1 => one_operand::<Imul>(insn),
        Mnemonic::Imul if is_immediate(insn, 2) => by_wide_source!(insn, 1, imul_immediate),
        Mnemonic::Imul => by_wide_source!(insn, 1, imul),
        Mnemonic::Mulx => by_wide_source!(insn, 2, mulx),
        Mnemonic::Div => one_operand::<Div>(insn),
        Mnemonic::Idiv => one_operand::<Idiv>(insn),
        _ => None,
    }
}

/// An operation of a source with the accumulator pair.
trait Accumulate {
    /// The new low and high half, and the flags; `None` is a divide error.
    fn apply<W: Word>(silicon: Silicon, flags: Flags, low: W, high: W, source: W) -> Option<(W, W, Flags)>;
}

struct Mul;
struct Imul;
struct Div;
struct Idiv;

fn one_operand<O: Accumulate>(insn: &Instruction) -> Option<Handler> {
    match in_memory(insn, 0) {
        true => by_width!(width(insn, 0), accumulate, O, InMemory),
        false => by_width!(width(insn, 0), accumulate, O, InRegister),
    }
}

fn accumulate<O: Accumulate, S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    // The pair of 8-bit operands is AH:AL.
    let upper = if W::BITS == 8 { AH } else { RDX };
    let source = S::get::<W>(cpu, uop, 0)?;
    let Some((low, high, flags)) = O::apply(cpu.silicon, cpu.flags, cpu.reg(RAX), cpu.reg(upper), source) else {
        return Err(cpu.raise(vector::DE));
    };
    cpu.set_reg(RAX, low);
    cpu.set_reg(upper, high);
    cpu.flags = flags;
    Ok(())
}

// ---- products -------------------------------------------------------------------------------------------------------------------------

/// Low and high half of the unsigned product.
#[inline(always)]
fn multiply<W: Word>(a: W, b: W) -> (W, W) {
    let (a, b) = (a.zero_extend(), b.zero_extend());
    if W::BITS == 64 {
        let product = u128::from(a) * u128::from(b);
        return (W::truncate(product as u64), W::truncate((product >> 64) as u64));
    }
    let product = a * b;
    (W::truncate(product), W::truncate(product >> W::BITS))
}

/// Low and high half of the signed product.
#[inline(always)]
pub fn multiply_signed<W: Word>(a: W, b: W) -> (W, W) {
    let (a, b) = (a.sign_extend() as i64, b.sign_extend() as i64);
    if W::BITS == 64 {
        let product = i128::from(a) * i128::from(b);
        return (W::truncate(product as u64), W::truncate((product >> 64) as u64));
    }
    let product = a * b;
    (W::truncate(product as u64), W::truncate((product >> W::BITS) as u64))
}

/// Whether `high` is more than the sign of `low`.
#[inline(always)]
pub fn exceeds_sign<W: Word>(low: W, high: W) -> bool {
    high != if low.top_bit() { !W::ZERO } else { W::ZERO }
}

impl Accumulate for Mul {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, low: W, _: W, source: W) -> Option<(W, W, Flags)> {
        let (low, high) = multiply(low, source);
        Some((low, high, silicon.product(flags, low, high != W::ZERO)))
    }
}

impl Accumulate for Imul {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, low: W, _: W, source: W) -> Option<(W, W, Flags)> {
        let (low, high) = multiply_signed(low, source);
        Some((low, high, silicon.product(flags, low, exceeds_sign(low, high))))
    }
}

#[inline(always)]
fn set_product<W: Word>(cpu: &mut Cpu, uop: &Uop, a: W, b: W) {
    let (low, high) = multiply_signed(a, b);
    cpu.set_reg(uop.reg[0], low);
    cpu.flags = cpu.silicon.product(cpu.flags, low, exceeds_sign(low, high));
}

fn imul<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = S::get::<W>(cpu, uop, 1)?;
    set_product(cpu, uop, cpu.reg::<W>(uop.reg[0]), source);
    Ok(())
}

fn imul_immediate<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = S::get::<W>(cpu, uop, 1)?;
    set_product(cpu, uop, source, W::truncate(uop.imm));
    Ok(())
}

/// Where both destinations are one register, it gets the high half.
fn mulx<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let source = S::get::<W>(cpu, uop, 2)?;
    let (low, high) = multiply(cpu.reg::<W>(RDX), source);
    cpu.set_reg(uop.reg[1], low);
    cpu.set_reg(uop.reg[0], high);
    Ok(())
}

// ---- quotients ------------------------------------------------------------------------------------------------------------------------

impl Accumulate for Div {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, low: W, high: W, source: W) -> Option<(W, W, Flags)> {
        // Also true of a zero divisor: the quotient would not fit.
        if high >= source {
            return None;
        }
        let divisor = source.zero_extend();
        let (quotient, remainder) = if W::BITS < 64 || high == W::ZERO {
            let dividend = if W::BITS < 64 { high.zero_extend() << (W::BITS & 63) } else { 0 } | low.zero_extend();
            (dividend / divisor, dividend % divisor)
        } else {
            let dividend = u128::from(high.zero_extend()) << 64 | u128::from(low.zero_extend());
            ((dividend / u128::from(divisor)) as u64, (dividend % u128::from(divisor)) as u64)
        };
        Some((W::truncate(quotient), W::truncate(remainder), silicon.quotient(flags)))
    }
}

impl Accumulate for Idiv {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, low: W, high: W, source: W) -> Option<(W, W, Flags)> {
        let divisor = source.sign_extend() as i64;
        if W::BITS < 64 || !exceeds_sign(low, high) {
            let upper = if W::BITS < 64 { high.sign_extend() << (W::BITS & 63) } else { 0 };
            let dividend = (upper | low.zero_extend()) as i64;
            let quotient = dividend.checked_div(divisor)?;
            let narrow = W::truncate(quotient as u64);
            let fits = narrow.sign_extend() == quotient as u64;
            return fits.then(|| (narrow, W::truncate((dividend % divisor) as u64), silicon.quotient(flags)));
        }
        let dividend = (u128::from(high.zero_extend()) << 64 | u128::from(low.zero_extend())) as i128;
        let quotient = dividend.checked_div(divisor.into())?;
        let narrow = i64::try_from(quotient).ok()?;
        Some((W::truncate(narrow as u64), W::truncate((dividend % i128::from(divisor)) as u64), silicon.quotient(flags)))
    }
}
