//! Bits: BT to BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, BMI1, BMI2 and CRC32 (SDM vol. 1, 7.3.7 and 7.3.9; vol. 2 for each).

use iced_x86::{Instruction, Mnemonic};

use super::select::{in_memory, is_immediate, width, InMemory, InRegister, Source};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::model::Silicon;
use crate::paging::AccessKind;
use crate::state::rflags;
use crate::uop::{flag, Exec, Handler, Uop};
use crate::word::Word;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Bt => bit_test(insn),
        Mnemonic::Bts => bit_change::<Set>(insn),
        Mnemonic::Btr => bit_change::<Reset>(insn),
        Mnemonic::Btc => bit_change::<Complement>(insn),
        Mnemonic::Bsf => by_wide_source!(insn, 1, scan, Forward),
        Mnemonic::Bsr => by_wide_source!(insn, 1, scan, Backward),
        Mnemonic::Tzcnt => by_wide_source!(insn, 1, count, TrailingZeros),
        Mnemonic::Lzcnt => by_wide_source!(insn, 1, count, LeadingZeros),
        Mnemonic::Popcnt => by_wide_source!(insn, 1, count, Population),
        Mnemonic::Blsi => by_wide_source!(insn, 1, count_vex, LowestSet),
        Mnemonic::Blsmsk => by_wide_source!(insn, 1, count_vex, MaskToLowestSet),
        Mnemonic::Blsr => by_wide_source!(insn, 1, count_vex, ResetLowestSet),
        Mnemonic::Andn => by_wide_source!(insn, 2, andn),
        Mnemonic::Bextr if is_immediate(insn, 2) => None, // TBM
        Mnemonic::Bextr => by_wide_source!(insn, 1, extract),
        Mnemonic::Bzhi => by_wide_source!(insn, 1, zero_high),
        Mnemonic::Pdep => by_wide_source!(insn, 2, deposit),
        Mnemonic::Pext => by_wide_source!(insn, 2, gather),
        Mnemonic::Crc32 if in_memory(insn, 1) => by_width!(width(insn, 1), crc32, InMemory),
        Mnemonic::Crc32 => by_width!(width(insn, 1), crc32, InRegister),
        _ => None,
    }
}

// ---- bit test -------------------------------------------------------------------------------------------------------------------------

/// What BTS, BTR and BTC do to the bit of `mask`.
trait Change {
    fn apply<W: Word>(value: W, mask: W) -> W;
}

struct Set;
struct Reset;
struct Complement;

impl Change for Set {
    #[inline(always)]
    fn apply<W: Word>(value: W, mask: W) -> W {
        value | mask
    }
}

impl Change for Reset {
    #[inline(always)]
    fn apply<W: Word>(value: W, mask: W) -> W {
        value & !mask
    }
}

impl Change for Complement {
    #[inline(always)]
    fn apply<W: Word>(value: W, mask: W) -> W {
        value ^ mask
    }
}

/// Where the bit's number is.
trait Index {
    fn get<W: Word>(cpu: &Cpu, uop: &Uop) -> W;
    /// Linear address of the word that holds bit `index` of the memory operand.
    fn address<W: Word>(cpu: &mut Cpu, uop: &Uop, index: W, kind: AccessKind) -> Exec<u64>;
}

struct ImmediateIndex;
struct RegisterIndex;

impl Index for ImmediateIndex {
    #[inline(always)]
    fn get<W: Word>(_: &Cpu, uop: &Uop) -> W {
        W::truncate(uop.imm)
    }
    #[inline(always)]
    fn address<W: Word>(cpu: &mut Cpu, uop: &Uop, _: W, kind: AccessKind) -> Exec<u64> {
        cpu.linear(uop, W::BYTES, kind)
    }
}

/// The memory operand is a string of bits, and the register a signed place in it.
impl Index for RegisterIndex {
    #[inline(always)]
    fn get<W: Word>(cpu: &Cpu, uop: &Uop) -> W {
        cpu.reg(uop.reg[1])
    }
    #[inline(always)]
    fn address<W: Word>(cpu: &mut Cpu, uop: &Uop, index: W, kind: AccessKind) -> Exec<u64> {
        let words = index.sign_extend() as i64 >> W::BITS.trailing_zeros();
        let distance = (words as u64).wrapping_mul(W::BYTES);
        if uop.has(flag::SLOW_ADDRESS) {
            let offset = cpu.effective_any(uop).wrapping_add(distance) & uop.address_mask();
            return cpu.segment_address(uop.segment(), offset, W::BYTES, kind);
        }
        Ok(cpu.effective(uop).wrapping_add(distance).wrapping_add(cpu.segment_base(uop.segment())))
    }
}

/// The word with only bit `index`, modulo the width, set.
#[inline(always)]
fn mask_of<W: Word>(index: W) -> W {
    W::ONE << (index.zero_extend() as u32 & (W::BITS - 1))
}

fn bit_test(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), is_immediate(insn, 1)) {
        (false, true) => by_wide_width!(width(insn, 0), test_r, ImmediateIndex),
        (false, false) => by_wide_width!(width(insn, 0), test_r, RegisterIndex),
        (true, true) => by_wide_width!(width(insn, 0), test_m, ImmediateIndex),
        (true, false) => by_wide_width!(width(insn, 1), test_m, RegisterIndex),
    }
}

fn test_r<I: Index, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[0]);
    cpu.flags = cpu.flags.with_carry(value & mask_of(I::get::<W>(cpu, uop)) != W::ZERO);
    Ok(())
}

fn test_m<I: Index, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let index: W = I::get(cpu, uop);
    let la = I::address(cpu, uop, index, AccessKind::Read)?;
    let value: W = cpu.read(uop.segment(), la)?;
    cpu.flags = cpu.flags.with_carry(value & mask_of(index) != W::ZERO);
    Ok(())
}

fn bit_change<C: Change>(insn: &Instruction) -> Option<Handler> {
    match (in_memory(insn, 0), is_immediate(insn, 1)) {
        (false, true) => by_wide_width!(width(insn, 0), change_r, C, ImmediateIndex),
        (false, false) => by_wide_width!(width(insn, 0), change_r, C, RegisterIndex),
        (true, true) => by_wide_width!(width(insn, 0), change_m, C, ImmediateIndex),
        (true, false) => by_wide_width!(width(insn, 1), change_m, C, RegisterIndex),
    }
}

fn change_r<C: Change, I: Index, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[0]);
    let mask = mask_of(I::get::<W>(cpu, uop));
    cpu.set_reg(uop.reg[0], C::apply(value, mask));
    cpu.flags = cpu.flags.with_carry(value & mask != W::ZERO);
    Ok(())
}

fn change_m<C: Change, I: Index, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let index: W = I::get(cpu, uop);
    let la = I::address(cpu, uop, index, AccessKind::Write)?;
    let mask = mask_of(index);
    let before = cpu.flags;
    cpu.modify_at(uop, la, |cpu, value: W| {
        cpu.flags = before.with_carry(value & mask != W::ZERO);
        C::apply(value, mask)
    })
}

// ---- scans and counts -----------------------------------------------------------------------------------------------------------------

/// BSF and BSR: the number of a bit of `source`, which is not zero.
trait Scan {
    fn apply<W: Word>(source: W) -> u32;
}

struct Forward;
struct Backward;

impl Scan for Forward {
    #[inline(always)]
    fn apply<W: Word>(source: W) -> u32 {
        source.zero_extend().trailing_zeros()
    }
}

impl Scan for Backward {
    #[inline(always)]
    fn apply<W: Word>(source: W) -> u32 {
        63 - source.zero_extend().leading_zeros()
    }
}

/// A zero source leaves the destination as it was, upper half included. Only ZF is defined.
fn scan<O: Scan, S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = S::get::<W>(cpu, uop, 1)?;
    let number = if source != W::ZERO { O::apply(source) } else { 0 };
    if source != W::ZERO {
        cpu.set_reg(uop.reg[0], W::truncate(number.into()));
    }
    cpu.flags = cpu.silicon.scan(source, number);
    Ok(())
}

/// Operations that make a result and flags of one source.
trait Counting {
    fn apply<W: Word>(silicon: Silicon, flags: Flags, source: W) -> (W, Flags);
}

struct TrailingZeros;
struct LeadingZeros;
struct Population;
struct LowestSet;
struct MaskToLowestSet;
struct ResetLowestSet;

#[inline(always)]
fn zeros<W: Word>(silicon: Silicon, flags: Flags, source: W, zeros: u32) -> (W, Flags) {
    let result = W::truncate(zeros.into());
    (result, silicon.zeros(flags, source, result))
}

impl Counting for TrailingZeros {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, source: W) -> (W, Flags) {
        zeros(silicon, flags, source, source.zero_extend().trailing_zeros().min(W::BITS))
    }
}

impl Counting for LeadingZeros {
    #[inline(always)]
    fn apply<W: Word>(silicon: Silicon, flags: Flags, source: W) -> (W, Flags) {
        zeros(silicon, flags, source, source.zero_extend().leading_zeros() - (64 - W::BITS))
    }
}

impl Counting for Population {
    /// ZF tells of the source; every other flag is clear, PF too.
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, _: Flags, source: W) -> (W, Flags) {
        let result = W::truncate(source.zero_extend().count_ones().into());
        let image = if source == W::ZERO { rflags::ZF } else { 0 };
        (result, Flags::from_bits(image))
    }
}

impl Counting for LowestSet {
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, _: Flags, source: W) -> (W, Flags) {
        let result = source & W::ZERO.sub(source);
        (result, Flags::logic(result).with_carry(source != W::ZERO))
    }
}

impl Counting for MaskToLowestSet {
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, _: Flags, source: W) -> (W, Flags) {
        let result = source ^ source.sub(W::ONE);
        (result, Flags::logic(result).with_carry(source == W::ZERO))
    }
}

impl Counting for ResetLowestSet {
    #[inline(always)]
    fn apply<W: Word>(_: Silicon, _: Flags, source: W) -> (W, Flags) {
        let result = source & source.sub(W::ONE);
        (result, Flags::logic(result).with_carry(source == W::ZERO))
    }
}

fn count<O: Counting, S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = S::get::<W>(cpu, uop, 1)?;
    let (result, flags) = O::apply(cpu.silicon, cpu.flags, source);
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = flags;
    Ok(())
}

fn count_vex<O: Counting, S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    count::<O, S, W>(cpu, uop)
}

// ---- BMI with two sources -------------------------------------------------------------------------------------------------------------

fn andn<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let result = !cpu.reg::<W>(uop.reg[1]) & S::get::<W>(cpu, uop, 2)?;
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = Flags::logic(result);
    Ok(())
}

/// The low `count` bits of `value`; all of them when there are not more.
#[inline(always)]
fn low_bits<W: Word>(value: W, count: u32) -> W {
    if count < W::BITS {
        value & W::truncate((1u64 << count) - 1)
    } else {
        value
    }
}

/// BEXTR: start in bits 7:0 of the control, length in bits 15:8.
fn extract<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let source = S::get::<W>(cpu, uop, 1)?;
    let control: u16 = cpu.reg(uop.reg[2]);
    let start = u32::from(control & 0xff);
    let shifted = if start < W::BITS { source >> start } else { W::ZERO };
    let result = low_bits(shifted, u32::from(control >> 8));
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = cpu.silicon.extract(result);
    Ok(())
}

fn zero_high<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let source = S::get::<W>(cpu, uop, 1)?;
    let count = u32::from(cpu.reg::<u8>(uop.reg[2]));
    let result = low_bits(source, count);
    cpu.set_reg(uop.reg[0], result);
    cpu.flags = Flags::logic(result).with_carry(count >= W::BITS);
    Ok(())
}

/// PDEP: the low bits of the source go to the places of the mask.
fn deposit<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let source = cpu.reg::<W>(uop.reg[1]).zero_extend();
    let mut mask = S::get::<W>(cpu, uop, 2)?.zero_extend();
    let (mut result, mut taken) = (0, 0);
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        if source >> taken & 1 != 0 {
            result |= place;
        }
        taken += 1;
        mask ^= place;
    }
    cpu.set_reg(uop.reg[0], W::truncate(result));
    Ok(())
}

/// PEXT: the bits at the places of the mask go to the low bits.
fn gather<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_vex()?;
    let source = cpu.reg::<W>(uop.reg[1]).zero_extend();
    let mut mask = S::get::<W>(cpu, uop, 2)?.zero_extend();
    let (mut result, mut filled) = (0, 0);
    while mask != 0 {
        let place = mask & mask.wrapping_neg();
        result |= u64::from(source & place != 0) << filled;
        filled += 1;
        mask ^= place;
    }
    cpu.set_reg(uop.reg[0], W::truncate(result));
    Ok(())
}

// ---- CRC32 ----------------------------------------------------------------------------------------------------------------------------

/// Polynomial of CRC-32C, 11EDC6F41, bit-reversed.
const CRC32C: u32 = 0x82f6_3b78;

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 != 0 { value >> 1 ^ CRC32C } else { value >> 1 };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
};

fn crc32<S: Source, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let source = S::get::<W>(cpu, uop, 1)?.zero_extend().to_le_bytes();
    let seed: u32 = cpu.reg(uop.reg[0]);
    let crc = source[..W::BYTES as usize].iter().fold(seed, |crc, byte| crc >> 8 ^ CRC_TABLE[usize::from(crc as u8 ^ byte)]);
    cpu.set_reg(uop.reg[0], crc);
    Ok(())
}
