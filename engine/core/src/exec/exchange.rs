//! Compare-and-exchange: CMPXCHG, CMPXCHG8B, CMPXCHG16B (SDM vol. 2).
//!
//! The destination is always written, with its old value when the comparison fails, so it must be writable in either case.

use core::cell::Cell;

use iced_x86::{Instruction, Mnemonic};

use super::select::{in_memory, width};
use crate::cpu::{CodeSize, Cpu};
use crate::flags::Flags;
use crate::paging::AccessKind;
use crate::state::gpr;
use crate::uop::{Exec, Handler, RegOffset, Uop};
use crate::word::Word;

const RAX: RegOffset = gpr::RAX as u8 * 8;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::Cmpxchg if in_memory(insn, 0) => by_width!(width(insn, 1), cmpxchg_mr),
        Mnemonic::Cmpxchg => by_width!(width(insn, 0), cmpxchg_rr),
        Mnemonic::Cmpxchg8b => Some(cmpxchg8b),
        Mnemonic::Cmpxchg16b => Some(cmpxchg16b),
        _ => None,
    }
}

fn cmpxchg_rr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (expected, found): (W, W) = (cpu.reg(RAX), cpu.reg(uop.reg[0]));
    if found == expected {
        let new: W = cpu.reg(uop.reg[1]);
        cpu.set_reg(uop.reg[0], new);
    } else {
        cpu.set_reg(RAX, found);
    }
    cpu.flags = Flags::sub(expected, found, expected.sub(found));
    Ok(())
}

fn cmpxchg_mr<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let (expected, new): (W, W) = (cpu.reg(RAX), cpu.reg(uop.reg[1]));
    let found = exchange(cpu, uop, expected, new)?;
    if found != expected {
        cpu.set_reg(RAX, found);
    }
    cpu.flags = Flags::sub(expected, found, expected.sub(found));
    Ok(())
}

/// Replaces the memory operand by `new` where it is `expected`, and writes it back where it is not; returns what was found.
#[inline(always)]
fn exchange<W: Word>(cpu: &mut Cpu, uop: &Uop, expected: W, new: W) -> Exec<W> {
    let found = Cell::new(W::ZERO);
    cpu.modify(uop, |_, old| {
        found.set(old);
        if old == expected {
            new
        } else {
            old
        }
    })?;
    Ok(found.get())
}

/// The low halves of two registers as one 64-bit word.
fn pair32(cpu: &Cpu, high: usize, low: usize) -> u64 {
    cpu.gpr(high) << 32 | cpu.gpr(low) & 0xffff_ffff
}

fn pair64(cpu: &Cpu, high: usize, low: usize) -> u128 {
    u128::from(cpu.gpr(high)) << 64 | u128::from(cpu.gpr(low))
}

fn cmpxchg8b(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let expected = pair32(cpu, gpr::RDX, gpr::RAX);
    let new = pair32(cpu, gpr::RCX, gpr::RBX);
    let found = exchange(cpu, uop, expected, new)?;
    if found != expected {
        cpu.set_gpr(gpr::RAX, found & 0xffff_ffff);
        cpu.set_gpr(gpr::RDX, found >> 32);
    }
    cpu.flags = cpu.flags.with_zero(found == expected);
    Ok(())
}

fn cmpxchg16b(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let la = cpu.linear(uop, 16, AccessKind::Write)?;
    if la & 15 != 0 {
        return Err(cpu.general_protection());
    }
    let expected = pair64(cpu, gpr::RDX, gpr::RAX);
    let new = pair64(cpu, gpr::RCX, gpr::RBX);
    // Aligned, so it lies in one page.
    let found = match cpu.chunk(uop.segment(), la, 16, AccessKind::Write)? {
        // SAFETY: `chunk` returned 16 bytes of mapped RAM, as aligned as `la` is.
        Some((host, _)) => unsafe { compare_exchange(cpu, host.cast(), expected, new) },
        None => match cpu.checked_ram(uop.segment(), la, 16)? {
            Some(host) => {
                // SAFETY: `checked_ram` returned mapped RAM, as aligned as `la` is.
                let found = unsafe { compare_exchange(cpu, host.cast(), expected, new) };
                cpu.note_code_write(host, 16);
                found
            }
            None => {
                let found: u128 = cpu.read(uop.segment(), la)?;
                cpu.write(uop.segment(), la, if found == expected { new } else { found })?;
                found
            }
        },
    };
    if found != expected {
        cpu.set_gpr(gpr::RAX, found as u64);
        cpu.set_gpr(gpr::RDX, (found >> 64) as u64);
    }
    cpu.flags = cpu.flags.with_zero(found == expected);
    Ok(())
}

/// Atomically replaces `expected` by `new`; returns the value found.
///
/// # Safety
/// `at` must be valid for reads and writes and aligned to 16 bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn compare_exchange(_cpu: &mut Cpu, at: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: valid and aligned by the caller's promise, and every x86-64 processor that runs a current Linux has CMPXCHG16B. RBX, which
    // the compiler keeps for itself, is put back.
    unsafe {
        core::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [rdi]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            in("rdi") at,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

/// As on x86-64 hosts. Others have no stable 128-bit atomics in Rust, so no other core runs meanwhile.
///
/// # Safety
/// `at` must be valid for reads and writes and aligned to 16 bytes.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn compare_exchange(cpu: &mut Cpu, at: *mut u128, expected: u128, new: u128) -> u128 {
    // SAFETY: valid and aligned by the caller's promise.
    cpu.with_bus_lock(|_| unsafe {
        let found = at.read_volatile();
        if found == expected {
            at.write_volatile(new);
        }
        found
    })
}
