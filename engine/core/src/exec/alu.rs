//! Integer arithmetic and logic: ADD to CMP, TEST, INC, DEC, NEG, NOT, XADD, ADCX, ADOX, SETcc and the single flags
//! (SDM vol. 1, 7.3.2 to 7.3.5; vol. 2 for each). Compare-and-exchange and decimal arithmetic are in `exchange` and `decimal`.

use core::cell::Cell;

use iced_x86::{Instruction, Mnemonic};

use super::select::{condition, holds, in_memory, is_immediate, width};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::state::rflags;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Mnemonic::Add => binary::<self::Add>(insn),
        Mnemonic::Or => binary::<self::Or>(insn),
        Mnemonic::Adc => binary::<self::Adc>(insn),
        Mnemonic::Sbb => binary::<self::Sbb>(insn),
        Mnemonic::And => binary::<self::And>(insn),
        Mnemonic::Sub => binary::<self::Sub>(insn),
        Mnemonic::Xor => binary::<self::Xor>(insn),
        Cmp => comparison::<self::Sub>(insn),
        Test => comparison::<self::And>(insn),
        Mnemonic::Inc => unary::<self::Inc>(insn),
        Mnemonic::Dec => unary::<self::Dec>(insn),
        Mnemonic::Neg => unary::<self::Neg>(insn),
        Mnemonic::Not => unary::<self::Not>(insn),
        Xadd if in_memory(insn, 0) => by_width!(width(insn, 1), xadd_mr),
        Xadd => by_width!(width(insn, 0), xadd_rr),
        Adcx if in_memory(insn, 1) => by_wide_width!(width(insn, 0), adx_rm, self::Adc),
        Adcx => by_wide_width!(width(insn, 0), adx_rr, self::Adc),
        Adox if in_memory(insn, 1) => by_wide_width!(width(insn, 0), adx_rm, OverflowChain),
        Adox => by_wide_width!(width(insn, 0), adx_rr, OverflowChain),
        Cmc => Some(cmc),
        Clc => Some(clc),
        Stc => Some(stc),
        Cld => Some(cld),
        Std => Some(std),
        _ => set_on_condition(insn),
    }
}

// ---- two operands ---------------------------------------------------------------------------------------------------------------------

/// An operation on two operands: its result, and the flags that it leaves.
pub trait Binary: 'static {
    fn apply<W: Word>(flags: Flags, a: W, b: W) -> (W, Flags);
}

/// Declares operations as `Name(flags, a, b) => result, flags`.
macro_rules! operations {
    ($trait:ident: $($(#[$doc:meta])* $name:ident($flags:pat, $($operand:ident),+) => $body:expr;)+) => {
        $(
            $(#[$doc])*
            pub struct $name;
            impl $trait for $name {
                #[inline(always)]
                fn apply<W: Word>($flags: Flags, $($operand: W),+) -> (W, Flags) {
                    $body
                }
            }
        )+
    };
}

operations! { Binary:
    Add(_, a, b) => { let r = a.add(b); (r, Flags::add(a, b, r)) };
    Sub(_, a, b) => { let r = a.sub(b); (r, Flags::sub(a, b, r)) };
    Adc(flags, a, b) => { let r = a.add(b).add(W::truncate(flags.cf().into())); (r, Flags::add(a, b, r)) };
    Sbb(flags, a, b) => { let r = a.sub(b).sub(W::truncate(flags.cf().into())); (r, Flags::sub(a, b, r)) };
    And(_, a, b) => { let r = a & b; (r, Flags::logic(r)) };
    Or(_, a, b) => { let r = a | b; (r, Flags::logic(r)) };
    Xor(_, a, b) => { let r = a ^ b; (r, Flags::logic(r)) };
}

fn binary<O: Binary>(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1)) {
        (true, _, true) => by_width!(width(insn, 0), binary_mi, O),
        (true, _, false) => by_width!(width(insn, 1), binary_mr, O),
        (_, true, _) => by_width!(width(insn, 0), binary_rm, O),
        (_, _, true) => by_width!(width(insn, 0), binary_ri, O),
        _ => by_width!(width(insn, 0), binary_rr, O),
    }
}

#[inline(always)]
fn apply_to_register<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop, b: W) {
    let (result, flags) = O::apply::<W>(cpu.flags, cpu.reg(uop.reg[0]), b);
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = flags;
}

#[inline(always)]
fn apply_to_memory<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop, b: W) -> Exec {
    // The closure may run again, so the flags that it reads are the ones from before.
    let before = cpu.flags;
    cpu.modify(uop, |cpu, a: W| {
        let (result, flags) = O::apply::<W>(before, a, b);
        cpu.flags = flags;
        result
    })
}

fn binary_rr<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    apply_to_register::<O, W>(cpu, uop, cpu.reg(uop.reg[1]));
    Ok(())
}

fn binary_ri<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    apply_to_register::<O, W>(cpu, uop, W::truncate(uop.imm));
    Ok(())
}

fn binary_rm<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let b = cpu.load(uop)?;
    apply_to_register::<O, W>(cpu, uop, b);
    Ok(())
}

fn binary_mr<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    apply_to_memory::<O, W>(cpu, uop, cpu.reg(uop.reg[1]))
}

fn binary_mi<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    apply_to_memory::<O, W>(cpu, uop, W::truncate(uop.imm))
}

// ---- CMP and TEST: flags only ---------------------------------------------------------------------------------------------------------

fn comparison<O: Binary>(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), in_memory(insn, 1), is_immediate(insn, 1)) {
        (true, _, true) => by_width!(width(insn, 0), compare_mi, O),
        (true, _, false) => by_width!(width(insn, 1), compare_mr, O),
        (_, true, _) => by_width!(width(insn, 0), compare_rm, O),
        (_, _, true) => by_width!(width(insn, 0), compare_ri, O),
        _ => by_width!(width(insn, 0), compare_rr, O),
    }
}

#[inline(always)]
fn compare<O: Binary, W: Word>(cpu: &mut Cpu, a: W, b: W) -> Exec {
    cpu.flags = O::apply::<W>(cpu.flags, a, b).1;
    Ok(())
}

fn compare_rr<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]))
}

fn compare_ri<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), W::truncate(uop.imm))
}

fn compare_rm<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let b = cpu.load(uop)?;
    compare::<O, W>(cpu, cpu.reg(uop.reg[0]), b)
}

fn compare_mr<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let a = cpu.load(uop)?;
    compare::<O, W>(cpu, a, cpu.reg(uop.reg[1]))
}

fn compare_mi<O: Binary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let a = cpu.load(uop)?;
    compare::<O, W>(cpu, a, W::truncate(uop.imm))
}

// ---- one operand ----------------------------------------------------------------------------------------------------------------------

/// An operation on one operand.
pub trait Unary: 'static {
    fn apply<W: Word>(flags: Flags, a: W) -> (W, Flags);
}

operations! { Unary:
    Inc(flags, a) => { let r = a.add(W::ONE); (r, Flags::add(a, W::ONE, r).with_carry_of(flags)) };
    Dec(flags, a) => { let r = a.sub(W::ONE); (r, Flags::sub(a, W::ONE, r).with_carry_of(flags)) };
    Neg(_, a) => { let r = W::ZERO.sub(a); (r, Flags::sub(W::ZERO, a, r)) };
    /// The only one here that leaves the flags alone.
    Not(flags, a) => (!a, flags);
}

fn unary<O: Unary>(insn: &Instruction) -> Option<Handler> {
    match in_memory(insn, 0) {
        true => by_width!(width(insn, 0), unary_m, O),
        false => by_width!(width(insn, 0), unary_r, O),
    }
}

fn unary_r<O: Unary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (result, flags) = O::apply::<W>(cpu.flags, cpu.reg(uop.reg[0]));
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = flags;
    Ok(())
}

fn unary_m<O: Unary, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let before = cpu.flags;
    cpu.modify(uop, |cpu, a: W| {
        let (result, flags) = O::apply::<W>(before, a);
        cpu.flags = flags;
        result
    })
}

// ---- XADD, ADCX, ADOX -----------------------------------------------------------------------------------------------------------------

fn xadd_rr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (a, b): (W, W) = (cpu.reg(uop.reg[0]), cpu.reg(uop.reg[1]));
    let (sum, flags) = Add::apply(cpu.flags, a, b);
    cpu.set_reg(uop.reg[1], a);
    cpu.set_reg(uop.reg[0], sum);
    cpu.flags = flags;
    Ok(())
}

fn xadd_mr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let b: W = cpu.reg(uop.reg[1]);
    let found = Cell::new(W::ZERO);
    cpu.modify(uop, |cpu, a: W| {
        let (sum, flags) = Add::apply(cpu.flags, a, b);
        found.set(a);
        cpu.flags = flags;
        sum
    })?;
    cpu.set_reg(uop.reg[1], found.get());
    Ok(())
}

/// Addition with a carry chain in one flag; the others stay.
trait CarryChain {
    fn carry_in(flags: Flags) -> bool;
    fn with_carry_out(flags: Flags, carry: bool) -> Flags;
}

impl CarryChain for Adc {
    #[inline(always)]
    fn carry_in(flags: Flags) -> bool {
        flags.cf()
    }
    #[inline(always)]
    fn with_carry_out(flags: Flags, carry: bool) -> Flags {
        flags.with_carry(carry)
    }
}

/// ADOX: the chain is in OF.
struct OverflowChain;

impl CarryChain for OverflowChain {
    #[inline(always)]
    fn carry_in(flags: Flags) -> bool {
        flags.of()
    }
    #[inline(always)]
    fn with_carry_out(flags: Flags, carry: bool) -> Flags {
        flags.with_carry_overflow(flags.cf(), carry)
    }
}

#[inline(always)]
fn add_chained<C: CarryChain, W: Word>(cpu: &mut Cpu, uop: &Uop, b: W) {
    let a: W = cpu.reg(uop.reg[0]);
    let sum = a.add(b).add(W::truncate(C::carry_in(cpu.flags).into()));
    let carry = Flags::add(a, b, sum).cf();
    cpu.set_reg(uop.reg[0], sum);
    cpu.flags = C::with_carry_out(cpu.flags, carry);
}

fn adx_rr<C: CarryChain, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    add_chained::<C, W>(cpu, uop, cpu.reg(uop.reg[1]));
    Ok(())
}

fn adx_rm<C: CarryChain, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let b = cpu.load(uop)?;
    add_chained::<C, W>(cpu, uop, b);
    Ok(())
}

// ---- SETcc and single flags -----------------------------------------------------------------------------------------------------------

fn set_on_condition(insn: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    if !matches!(
        insn.mnemonic(),
        Seta | Setae | Setb | Setbe | Sete | Setg | Setge | Setl | Setle | Setne | Setno | Setnp | Setns | Seto | Setp | Sets
    ) {
        return None;
    }
    match in_memory(insn, 0) {
        true => by_condition!(condition(insn)?, set_m),
        false => by_condition!(condition(insn)?, set_r),
    }
}

fn set_r<const C: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.set_reg(uop.reg[0], u8::from(holds::<C>(cpu.flags)));
    Ok(())
}

fn set_m<const C: u8>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.store(uop, u8::from(holds::<C>(cpu.flags)))
}

fn cmc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.flags = cpu.flags.with_carry(!cpu.flags.cf());
    Ok(())
}

fn clc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.flags = cpu.flags.with_carry(false);
    Ok(())
}

fn stc(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.flags = cpu.flags.with_carry(true);
    Ok(())
}

fn cld(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.rflags &= !rflags::DF;
    Ok(())
}

fn std(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cpu.rflags |= rflags::DF;
    Ok(())
}
