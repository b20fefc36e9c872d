//! The guest's flags in host code.
//!
//! They are in the host's flags, in `Native::flags`, or an instruction makes them again, which a [`Recipe`] describes; in several of these,
//! or dead. What the interpreter would see at an instruction that may fault, exit or leave the block is in memory when it looks: state is
//! precise at every instruction. Cold code follows the recipe then, so that flags that nobody looks at cost nothing, from block to block.

use iced_x86::Register::{AH, AL, AX, EAX, R13, R14, R14L, R15, R15D, R15L, RAX, RBP};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use super::asm::{byte_ptr, word_ptr, Memory, Operand};
use super::block::makes_flags;
use super::emit::{cpu_field, in_memory, Emitter};
use super::native::{FLAGS, FLAG_OPERANDS};
use super::plan::Plan;
use super::registers::{host, is_high_byte, resized};
use crate::model::Silicon;

/// How OF follows from an instruction where host processors differ.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    Host,
    Clear,
    /// The host's if R15D is 1, and clear otherwise.
    HostIfOne,
    /// CF differs from SF: shifts to the left.
    CarryFromSign,
}

/// How the guest's flags come from the host's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    Exact,
    /// Shifts: AF is the model's, and OF as it says.
    Shift(Overflow),
    /// Multiplications: CF and OF are the host's, the others those of the low half of the product.
    Product,
    /// The same where the others stay.
    ProductAlone,
    /// CF is the host's, OF is clear, and the others are those of the result.
    CarryAndResult,
    /// CF and ZF are the host's, OF stays, and the others are clear.
    CarryAndZero,
    /// CF and OF are clear, and the others are those of the result.
    Result,
    /// ZF and PF are those of the result, AF is set, and the others are clear.
    Field,
    /// ZF is the host's, PF that of the result, or set with ZF, and the others are clear.
    Found,
}

impl Rule {
    /// Whether flags stay, although the host may change them.
    pub fn keeps_flags(self) -> bool {
        matches!(self, Rule::ProductAlone | Rule::CarryAndZero)
    }
}

/// Places of flags in the upper byte of their stored form.
const STORED_CARRY: i32 = 1;
const STORED_PARITY_SHIFT: u8 = 2;
const STORED_HALF_CARRY: i32 = 0x10;
const STORED_ZERO_SHIFT: u8 = 6;

/// Where an operand of a [`Recipe`] is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// A 64-bit guest register.
    Register(Register),
    /// A copy in `Native`, of this number.
    Kept(usize),
    Immediate(i64),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Operation {
    Compare,
    Test,
    /// An addition, of which the first operand is the sum.
    Sum,
    /// A subtraction, of which the first operand is the difference.
    Difference,
}

/// How the guest's flags can be made again: the operation that made them, and where its operands still are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recipe {
    operation: Operation,
    bytes: usize,
    operands: [Source; 2],
}

impl Recipe {
    /// The recipe for the flags that `insn` has just made, if its operands tell.
    pub fn of(insn: &Instruction) -> Option<Self> {
        let target = register(insn, 0)?;
        let bytes = insn.op0_register().size();
        let same = register(insn, 1) == Some(target);
        let result = Recipe { operation: Operation::Test, bytes, operands: [Source::Register(target); 2] };
        let operation = match insn.mnemonic() {
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => return Some(result),
            Mnemonic::Sub if same => return Some(result),
            Mnemonic::Cmp => Operation::Compare,
            Mnemonic::Test => Operation::Test,
            Mnemonic::Sub => Operation::Difference,
            Mnemonic::Add if !same => Operation::Sum,
            _ => return None,
        };
        let second = match insn.op1_kind() {
            OpKind::Register => Source::Register(register(insn, 1)?),
            OpKind::Memory => return None,
            _ => Source::Immediate(insn.immediate(1) as i64),
        };
        Some(Recipe { operation, bytes, operands: [Source::Register(target), second] })
    }

    /// Whether an operand is a register of which `is_written` is true.
    pub fn loses(&self, is_written: impl Fn(Register) -> bool) -> bool {
        self.operands.iter().any(|source| matches!(source, Source::Register(guest) if is_written(*guest)))
    }
}

/// The 64-bit register of which operand `n` is the lower part.
fn register(insn: &Instruction, n: u32) -> Option<Register> {
    let named = (insn.op_kind(n) == OpKind::Register).then(|| insn.op_register(n))?;
    (named.is_gpr() && !is_high_byte(named)).then(|| named.full_register())
}

/// Where the guest's flags are.
#[derive(Clone, Copy)]
pub struct Whereabouts {
    /// In the host's flags.
    pub host: bool,
    /// In `Native::flags`.
    pub saved: bool,
    pub recipe: Option<Recipe>,
}

impl Whereabouts {
    /// Those of who comes with a recipe, and without one in memory.
    pub fn on_arrival(recipe: Option<Recipe>) -> Self {
        Whereabouts { host: false, saved: recipe.is_none(), recipe }
    }
}

/// For each instruction, and for the end behind them: the flags that come there must be in memory before they are replaced, whatever is
/// done until then.
pub fn settled(instructions: &[Instruction], plans: &[Plan]) -> Vec<bool> {
    let mut settled = vec![true; instructions.len() + 1];
    for (n, (insn, plan)) in instructions.iter().zip(plans).enumerate().rev() {
        use Plan::*;
        settled[n] = match plan {
            Interpret | ShiftByCl | Divide | PushFlags | JumpIndirect | CallRelative | CallIndirect | Return | SystemCall
            | SystemReturn => true,
            Same(rule) if rule.keeps_flags() => true,
            Conditional | JumpRelative => false,
            _ => settled[n + 1] && !makes_flags(insn, *plan),
        };
    }
    settled
}

impl Emitter<'_> {
    /// Keeps the guest's flags in memory, from where the interpreter takes them.
    pub fn save_flags(&mut self) {
        if !self.flags.saved && (self.flags.host || self.flags.recipe.is_some()) {
            self.need_flags();
            self.store_flags(Overflow::Host, None);
        }
    }

    /// Stores the guest's flags, which are the host's but for OF, and AF where `half_carry` tells it.
    fn store_flags(&mut self, overflow: Overflow, half_carry: Option<bool>) {
        let a = &mut *self.asm;
        a.mov(R13, RAX);
        a.lahf();
        match overflow {
            Overflow::Host => a.setcc(ConditionCode::o, AL),
            Overflow::Clear => a.mov(AL, 0),
            Overflow::HostIfOne => {
                a.setcc(ConditionCode::o, AL);
                a.cmp(R15D, 1);
                a.setcc(ConditionCode::e, R15L);
                a.and(AL, R15L);
            }
            Overflow::CarryFromSign => {
                a.mov(AL, AH);
                a.rol(AL, 1);
                a.xor(AL, AH);
                a.and(AL, 1);
            }
        }
        match half_carry {
            Some(true) => a.or(AH, STORED_HALF_CARRY),
            Some(false) => a.and(AH, !STORED_HALF_CARRY),
            None => {}
        }
        self.keep_stored_flags(R13)
    }

    /// A shift by something else than zero has left the guest's flags in the host's, but for AF, and for OF, of which `overflow` tells.
    pub fn store_flags_of_shift(&mut self, overflow: Overflow) {
        self.flags = Whereabouts { host: false, saved: false, recipe: None };
        self.store_flags(overflow, Some(self.silicon.sets_half_carry()));
    }

    /// Stores the flags of `result`, with the host's CF if `carry`.
    fn store_result_flags(&mut self, result: Register, carry: bool) {
        let result = if result.full_register() == Register::RAX { resized(Register::R14, result) } else { result };
        let a = &mut *self.asm;
        a.mov(R14, RAX);
        a.setcc(ConditionCode::b, AL);
        a.test(result, result);
        a.lahf();
        if carry {
            a.or(AH, AL);
        }
        a.mov(AL, 0);
        self.keep_stored_flags(R14)
    }

    /// Stores the flags of a multiplication with the low half `product`.
    fn store_product_flags(&mut self, product: Register) {
        let low = if product.full_register() == Register::RAX { resized(Register::R14, product) } else { product };
        let a = &mut *self.asm;
        a.mov(R14, RAX);
        a.setcc(ConditionCode::o, AL);
        a.test(low, low);
        a.lahf();
        a.or(AH, AL);
        self.keep_stored_flags(R14)
    }

    /// Changes CF and OF of the stored flags to the host's.
    fn store_carry_overflow(&mut self) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::o, R14L);
        a.and(byte_ptr(RBP, FLAGS as i32 + 1), !STORED_CARRY);
        a.or(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        a.mov(byte_ptr(RBP, FLAGS as i32), R14L);
        self.flags.saved = true;
    }

    /// Changes all of the stored flags but OF: CF and ZF are the host's, the others clear.
    fn store_carry_zero(&mut self) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::b, R14L);
        a.setcc(ConditionCode::e, R15L);
        a.shl(R15L, STORED_ZERO_SHIFT);
        a.or(R14L, R15L);
        a.mov(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        self.flags.saved = true;
    }

    /// Stores ZF and PF of `result`, a set AF, and the others clear.
    fn store_field_flags(&mut self, result: Register) {
        let a = &mut *self.asm;
        a.test(result, result);
        a.setcc(ConditionCode::e, R14L);
        a.setcc(ConditionCode::p, R15L);
        self.store_zero_parity(STORED_HALF_CARRY);
    }

    /// Stores the host's ZF, PF of `result` or of zero, and the others clear.
    fn store_found_flags(&mut self, result: Register) {
        let a = &mut *self.asm;
        a.setcc(ConditionCode::e, R14L);
        a.test(result, result);
        a.setcc(ConditionCode::p, R15L);
        a.or(R15L, R14L);
        self.store_zero_parity(0);
    }

    /// Stores ZF from R14, PF from R15, and `others`.
    fn store_zero_parity(&mut self, others: i32) {
        let a = &mut *self.asm;
        a.shl(R14L, STORED_ZERO_SHIFT);
        a.shl(R15L, STORED_PARITY_SHIFT);
        a.or(R14L, R15L);
        a.or(R14L, others);
        a.mov(byte_ptr(RBP, FLAGS as i32 + 1), R14L);
        a.mov(byte_ptr(RBP, FLAGS as i32), 0);
        self.flags.saved = true;
    }

    /// Changes the stored flags as a quotient does.
    pub fn store_flags_of_quotient(&mut self) {
        if self.silicon == Silicon::Amd {
            self.flags.recipe = None;
            self.asm.and(byte_ptr(RBP, FLAGS as i32 + 1), STORED_CARRY);
            self.asm.or(byte_ptr(RBP, FLAGS as i32 + 1), STORED_HALF_CARRY);
        }
    }

    /// Ends a sequence that has made the flags' stored form in AX: puts it in its place, and RAX back from `rax_copy`.
    fn keep_stored_flags(&mut self, rax_copy: Register) {
        self.asm.mov(word_ptr(RBP, FLAGS as i32), AX);
        self.asm.mov(RAX, rax_copy);
        self.flags.saved = true;
    }

    /// Makes the host's flags the guest's.
    pub fn need_flags(&mut self) {
        match self.flags {
            Whereabouts { host: true, .. } => {}
            Whereabouts { recipe: Some(recipe), .. } => self.follow_recipe(recipe),
            _ => self.restore_flags(),
        }
        self.flags.host = true;
    }

    /// The host's flags from memory. Changes R15.
    pub(super) fn restore_flags(&mut self) {
        let a = &mut *self.asm;
        a.mov(R15, RAX);
        a.movzx(EAX, word_ptr(RBP, FLAGS as i32));
        a.add(AL, 0x7f);
        a.sahf();
        a.mov(RAX, R15)
    }

    /// The host's flags from `recipe`. Changes R15.
    fn follow_recipe(&mut self, recipe: Recipe) {
        let Recipe { operation, bytes, operands: [first, second] } = recipe;
        let part = |full: Register| resized(full, SIZED[bytes.trailing_zeros() as usize]);
        let copy = match (operation, full_place(first)) {
            (Operation::Compare, Operand::Register(place)) => place,
            (Operation::Test, Operand::Register(place)) if first == second => place,
            (_, place) => {
                self.asm.mov(R15, place);
                R15
            }
        };
        let (copy, second) = (part(copy), operand(second, bytes));
        let a = &mut *self.asm;
        match operation {
            Operation::Compare => a.cmp(copy, second),
            Operation::Test if recipe.operands[0] == recipe.operands[1] => a.test(copy, copy),
            Operation::Test => a.and(copy, second),
            Operation::Sum => {
                a.sub(copy, second);
                a.add(copy, second);
            }
            Operation::Difference => {
                a.add(copy, second);
                a.cmp(copy, second);
            }
        }
    }

    /// Host code is about to destroy the host's flags; `live` tells whether the guest's are seen again.
    pub fn clobber_flags(&mut self, live: bool) {
        if !live {
            self.flags.recipe = None;
        } else if self.flags.recipe.is_none() {
            self.save_flags();
        }
        self.flags.host = false;
    }

    /// The same where they must be in memory then.
    pub fn flush_flags(&mut self, live: bool) {
        if live {
            self.save_flags();
        }
        self.clobber_flags(live);
    }

    /// An instruction is about to change registers, and not the flags, which are seen again: operands of the recipe are kept elsewhere.
    pub fn keep_operands(&mut self, is_written: impl Fn(Register) -> bool) {
        let Some(mut recipe) = self.flags.recipe.filter(|recipe| !self.flags.saved && recipe.loses(&is_written)) else { return };
        for n in 0..recipe.operands.len() {
            let source = recipe.operands[n];
            let Source::Register(guest) = source else { continue };
            if is_written(guest) {
                let value = host(guest).unwrap_or(R15);
                if value == R15 {
                    self.asm.mov(R15, in_memory(guest));
                }
                self.asm.mov(kept(n), value);
                recipe.operands.iter_mut().filter(|other| **other == source).for_each(|other| *other = Source::Kept(n));
            }
        }
        self.flags.recipe = Some(recipe);
    }

    /// An instruction has changed registers, and not the flags.
    pub fn lose_operands(&mut self, is_written: impl Fn(Register) -> bool) {
        self.flags.recipe = self.flags.recipe.filter(|recipe| !recipe.loses(is_written));
    }

    /// The flags that the last instruction has left in the host's can be made again by `recipe`.
    pub fn remember(&mut self, recipe: Option<Recipe>) {
        self.flags.recipe = recipe.filter(|_| self.flags.host);
    }

    /// An instruction has left the guest's flags in the host's, as `rule` tells; `result` is its first register.
    pub fn new_flags(&mut self, rule: Rule, result: Register, live: bool) {
        self.flags = Whereabouts { host: live && rule == Rule::Exact, saved: false, recipe: None };
        match rule {
            Rule::Shift(overflow) if live => self.store_flags(overflow, Some(self.silicon.sets_half_carry())),
            Rule::Product if live => self.store_product_flags(result),
            Rule::ProductAlone if live => self.store_carry_overflow(),
            Rule::CarryAndResult if live => self.store_result_flags(result, true),
            Rule::CarryAndZero if live => self.store_carry_zero(),
            Rule::Result if live => self.store_result_flags(result, false),
            Rule::Field if live => self.store_field_flags(result),
            Rule::Found if live => self.store_found_flags(result),
            _ => {}
        }
    }
}

/// Registers of 1, 2, 4 and 8 bytes.
const SIZED: [Register; 4] = [AL, AX, EAX, RAX];

/// The copy of operand `n` of a recipe.
fn kept(n: usize) -> Memory {
    cpu_field(FLAG_OPERANDS + 8 * n)
}

/// Where all 64 bits of an operand are.
fn full_place(source: Source) -> Operand {
    match source {
        Source::Register(guest) => host(guest).map_or_else(|| in_memory(guest).into(), Operand::from),
        Source::Kept(n) => kept(n).into(),
        Source::Immediate(value) => Operand::Immediate(value),
    }
}

/// The lower `bytes` bytes of an operand.
fn operand(source: Source, bytes: usize) -> Operand {
    match full_place(source) {
        Operand::Register(full) => resized(full, SIZED[bytes.trailing_zeros() as usize]).into(),
        Operand::Memory(memory) => memory.of(bytes).into(),
        immediate => immediate,
    }
}
