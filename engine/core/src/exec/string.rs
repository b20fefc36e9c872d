//! String instructions: MOVS, STOS, LODS, CMPS, SCAS, with REP, REPE and REPNE (SDM vol. 1, 7.3.9; vol. 2, REP).
//!
//! A repeated instruction works on as much of a page at once as both operands allow, when the direction flag is clear. It commits its
//! index registers after each piece, so faults and interrupts find them exact, and returns to the dispatcher after a bounded amount of
//! work. Where memory is not plain RAM it goes element by element.

use iced_x86::{Code, Instruction};

use crate::cpu::{pending, CodeSize, Cpu};
use crate::flags::Flags;
use crate::memory::order;
use crate::paging::AccessKind;
use crate::state::{gpr, rflags, seg};
use crate::uop::{flag, Exec, Handler, RegOffset, Stop, Uop};
use crate::word::Word;

const RAX: RegOffset = gpr::RAX as u8 * 8;

/// Bytes that a repeated instruction handles before it lets the dispatcher look at the CPU.
const WORK: u64 = 4096;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Code::*;
    Some(match insn.code() {
        Movsb_m8_m8 => pick::<Movs, u8>(insn),
        Movsw_m16_m16 => pick::<Movs, u16>(insn),
        Movsd_m32_m32 => pick::<Movs, u32>(insn),
        Movsq_m64_m64 => pick::<Movs, u64>(insn),
        Stosb_m8_AL => pick::<Stos, u8>(insn),
        Stosw_m16_AX => pick::<Stos, u16>(insn),
        Stosd_m32_EAX => pick::<Stos, u32>(insn),
        Stosq_m64_RAX => pick::<Stos, u64>(insn),
        Lodsb_AL_m8 => pick::<Lods, u8>(insn),
        Lodsw_AX_m16 => pick::<Lods, u16>(insn),
        Lodsd_EAX_m32 => pick::<Lods, u32>(insn),
        Lodsq_RAX_m64 => pick::<Lods, u64>(insn),
        Cmpsb_m8_m8 => pick::<Cmps, u8>(insn),
        Cmpsw_m16_m16 => pick::<Cmps, u16>(insn),
        Cmpsd_m32_m32 => pick::<Cmps, u32>(insn),
        Cmpsq_m64_m64 => pick::<Cmps, u64>(insn),
        Scasb_AL_m8 => pick::<Scas, u8>(insn),
        Scasw_AX_m16 => pick::<Scas, u16>(insn),
        Scasd_EAX_m32 => pick::<Scas, u32>(insn),
        Scasq_RAX_m64 => pick::<Scas, u64>(insn),
        _ => return None,
    })
}

fn pick<O: Operation, W: Word>(insn: &Instruction) -> Handler {
    if insn.has_rep_prefix() || insn.has_repne_prefix() {
        repeat::<O, W>
    } else {
        once::<O, W>
    }
}

/// One of the five. Methods work at RSI and RDI as they are, and do not move them.
trait Operation {
    /// Uses RSI.
    const SOURCE: bool;
    /// Uses RDI.
    const DESTINATION: bool;
    /// Ends a repetition by ZF.
    const COMPARES: bool;

    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec;

    /// Handles up to `wanted` elements upwards at once; returns how many. Zero asks for [`Operation::element`].
    fn piece<W: Word>(_cpu: &mut Cpu, _uop: &Uop, _wanted: u64) -> Exec<u64> {
        Ok(0)
    }
}

// ---- the index registers --------------------------------------------------------------------------------------------------------------

/// RCX, RSI or RDI as wide as the address size.
#[inline(always)]
fn index(cpu: &Cpu, uop: &Uop, number: usize) -> u64 {
    cpu.gpr(number) & uop.address_mask()
}

#[inline(always)]
fn add_to_index(cpu: &mut Cpu, uop: &Uop, number: usize, amount: u64) {
    let value = cpu.gpr(number).wrapping_add(amount);
    if uop.has(flag::ADDRESS_16) {
        cpu.set_reg(number as u8 * 8, value as u16);
    } else {
        cpu.set_gpr(number, value & uop.address_mask());
    }
}

/// Moves the index registers past `elements`.
#[inline(always)]
fn advance<O: Operation, W: Word>(cpu: &mut Cpu, uop: &Uop, elements: u64) {
    let bytes = elements.wrapping_mul(W::BYTES);
    let amount = if cpu.rflags & rflags::DF == 0 { bytes } else { bytes.wrapping_neg() };
    if O::SOURCE {
        add_to_index(cpu, uop, gpr::RSI, amount);
    }
    if O::DESTINATION {
        add_to_index(cpu, uop, gpr::RDI, amount);
    }
}

#[inline(always)]
fn source_address<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec<u64> {
    cpu.segment_address(uop.segment(), index(cpu, uop, gpr::RSI), W::BYTES, AccessKind::Read)
}

#[inline(always)]
fn read_source<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec<W> {
    let la = source_address::<W>(cpu, uop)?;
    cpu.read(uop.segment(), la)
}

#[inline(always)]
fn read_destination<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec<W> {
    let la = cpu.segment_address(seg::ES, index(cpu, uop, gpr::RDI), W::BYTES, AccessKind::Read)?;
    cpu.read(seg::ES, la)
}

#[inline(always)]
fn write_destination<W: Word>(cpu: &mut Cpu, uop: &Uop, value: W) -> Exec {
    let la = cpu.segment_address(seg::ES, index(cpu, uop, gpr::RDI), W::BYTES, AccessKind::Write)?;
    cpu.write(seg::ES, la, value)
}

/// Host memory behind an index register, and how many of `wanted` elements lie in it. It stays mapped until the instruction returns to the
/// dispatcher, because changes of the nested page table wait for that.
fn span<W: Word>(cpu: &mut Cpu, uop: &Uop, number: usize, wanted: u64, kind: AccessKind) -> Exec<(*mut u8, u64)> {
    const NONE: (*mut u8, u64) = (core::ptr::null_mut(), 0);
    let segment = if number == gpr::RDI { seg::ES } else { uop.segment() };
    let offset = index(cpu, uop, number);
    let bytes = (wanted * W::BYTES).min(uop.address_mask().wrapping_sub(offset));
    if bytes < W::BYTES {
        return Ok(NONE);
    }
    // Where the segment ends inside, single elements find out which one is outside.
    let Ok(la) = cpu.segment_address(segment, offset, bytes, kind) else { return Ok(NONE) };
    Ok(cpu.chunk(segment, la, bytes, kind)?.map_or(NONE, |(host, bytes)| (host, bytes / W::BYTES)))
}

// ---- repetition -----------------------------------------------------------------------------------------------------------------------

fn once<O: Operation, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    O::element::<W>(cpu, uop)?;
    advance::<O, W>(cpu, uop, 1);
    Ok(())
}

/// Whether a comparison of the last element ends the repetition.
#[inline(always)]
fn ended_by_flags<O: Operation>(cpu: &Cpu, uop: &Uop) -> bool {
    O::COMPARES && cpu.flags.zf() != uop.has(flag::REP)
}

fn repeat<O: Operation, W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if index(cpu, uop, gpr::RCX) == 0 {
        return Ok(());
    }
    let alone = cpu.pending & (pending::STEP | pending::EMULATE | pending::BREAKPOINTS) != 0;
    let mut room = if alone { 1 } else { WORK / W::BYTES };
    while room > 0 {
        let wanted = index(cpu, uop, gpr::RCX).min(room);
        let mut done = 0;
        if wanted > 1 && cpu.rflags & rflags::DF == 0 {
            // The elements of a piece have no order among themselves (SDM vol. 3, 9.2.4).
            order::settle();
            done = O::piece::<W>(cpu, uop, wanted)?;
            order::settle();
        }
        if done == 0 {
            O::element::<W>(cpu, uop)?;
            done = 1;
        }
        advance::<O, W>(cpu, uop, done);
        add_to_index(cpu, uop, gpr::RCX, done.wrapping_neg());
        if index(cpu, uop, gpr::RCX) == 0 || ended_by_flags::<O>(cpu, uop) {
            return Ok(());
        }
        room -= done;
    }
    Err(Stop::Again)
}

// ---- MOVS, STOS, LODS -----------------------------------------------------------------------------------------------------------------

struct Movs;

impl Operation for Movs {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
        let value: W = read_source(cpu, uop)?;
        write_destination(cpu, uop, value)
    }

    fn piece<W: Word>(cpu: &mut Cpu, uop: &Uop, wanted: u64) -> Exec<u64> {
        let (from, readable) = span::<W>(cpu, uop, gpr::RSI, wanted, AccessKind::Read)?;
        if readable == 0 {
            return Ok(0);
        }
        let (to, count) = span::<W>(cpu, uop, gpr::RDI, readable, AccessKind::Write)?;
        // SAFETY: `span` returned that many elements of mapped guest RAM on each side.
        unsafe { copy_upwards::<W>(from, to, (count * W::BYTES) as usize) };
        Ok(count)
    }
}

/// Copies as single elements from low to high addresses do: an overlap repeats what was just written.
///
/// # Safety
/// Both ranges must be mapped guest RAM.
unsafe fn copy_upwards<W: Word>(from: *const u8, to: *mut u8, bytes: usize) {
    let distance = (to as usize).wrapping_sub(from as usize);
    if distance >= bytes {
        // SAFETY: by the caller's promise. The target is not inside the source's rest, so a move is what single elements do.
        return unsafe { from.copy_to(to, bytes) };
    }
    if distance < W::BYTES as usize {
        for at in (0..bytes).step_by(W::BYTES as usize) {
            // SAFETY: by the caller's promise, `at` is inside both ranges.
            unsafe { to.add(at).cast::<W>().write_unaligned(from.add(at).cast::<W>().read_unaligned()) };
        }
        return;
    }
    let mut done = 0;
    while done < bytes {
        let count = (distance + done).min(bytes - done);
        // SAFETY: by the caller's promise. The source ends where the target begins, `distance + done` behind `from`.
        unsafe { from.copy_to_nonoverlapping(to.add(done), count) };
        done += count;
    }
}

struct Stos;

impl Operation for Stos {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
        let value: W = cpu.reg(RAX);
        write_destination(cpu, uop, value)
    }

    fn piece<W: Word>(cpu: &mut Cpu, uop: &Uop, wanted: u64) -> Exec<u64> {
        let value: W = cpu.reg(RAX);
        let (to, count) = span::<W>(cpu, uop, gpr::RDI, wanted, AccessKind::Write)?;
        for n in 0..count as usize {
            // SAFETY: `span` returned `count` elements of mapped guest RAM.
            unsafe { to.cast::<W>().add(n).write_unaligned(value) };
        }
        Ok(count)
    }
}

struct Lods;

impl Operation for Lods {
    const SOURCE: bool = true;
    const DESTINATION: bool = false;
    const COMPARES: bool = false;

    #[inline(always)]
    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
        let value: W = read_source(cpu, uop)?;
        cpu.set_reg(RAX, value);
        Ok(())
    }
}

// ---- CMPS and SCAS --------------------------------------------------------------------------------------------------------------------

/// Pairs that are compared at once, as long as none of them ends the repetition.
const TOGETHER: u64 = 32;

/// Compares pairs until one ends the repetition or `count` are done; sets the flags of the last one and returns how many were compared.
#[inline(always)]
fn compare_while<W: Word>(cpu: &mut Cpu, uop: &Uop, count: u64, pair: impl Fn(usize) -> (W, W)) -> u64 {
    let while_equal = uop.has(flag::REP);
    let mut done = 0;
    // Without a way out of the inner loop the compiler makes vector instructions of it.
    let ends = |at: u64| (at..at + TOGETHER).map(|n| pair(n as usize)).fold(false, |ends, (a, b)| ends | ((a == b) != while_equal));
    while count - done > TOGETHER && !ends(done) {
        done += TOGETHER;
    }
    while done < count {
        let (a, b) = pair(done as usize);
        done += 1;
        if done == count || (a == b) != while_equal {
            cpu.flags = Flags::sub(a, b, a.sub(b));
            break;
        }
    }
    done
}

struct Cmps;

impl Operation for Cmps {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const COMPARES: bool = true;

    #[inline(always)]
    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
        let a: W = read_source(cpu, uop)?;
        let b: W = read_destination(cpu, uop)?;
        cpu.flags = Flags::sub(a, b, a.sub(b));
        Ok(())
    }

    fn piece<W: Word>(cpu: &mut Cpu, uop: &Uop, wanted: u64) -> Exec<u64> {
        let (a, readable) = span::<W>(cpu, uop, gpr::RSI, wanted, AccessKind::Read)?;
        if readable == 0 {
            return Ok(0);
        }
        let (b, count) = span::<W>(cpu, uop, gpr::RDI, readable, AccessKind::Read)?;
        // SAFETY: `span` returned that many elements of mapped guest RAM on each side.
        let pair = |n| unsafe { (a.cast::<W>().add(n).read_unaligned(), b.cast::<W>().add(n).read_unaligned()) };
        Ok(compare_while(cpu, uop, count, pair))
    }
}

struct Scas;

impl Operation for Scas {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const COMPARES: bool = true;

    #[inline(always)]
    fn element<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
        let a: W = cpu.reg(RAX);
        let b: W = read_destination(cpu, uop)?;
        cpu.flags = Flags::sub(a, b, a.sub(b));
        Ok(())
    }

    fn piece<W: Word>(cpu: &mut Cpu, uop: &Uop, wanted: u64) -> Exec<u64> {
        let a: W = cpu.reg(RAX);
        let (b, count) = span::<W>(cpu, uop, gpr::RDI, wanted, AccessKind::Read)?;
        // SAFETY: `span` returned `count` elements of mapped guest RAM.
        let pair = |n| unsafe { (a, b.cast::<W>().add(n).read_unaligned()) };
        Ok(compare_while(cpu, uop, count, pair))
    }
}
