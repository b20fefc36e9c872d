//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM vol. 3, 5.8.7 and 5.8.8; APM vol. 2, 6.1).

use iced_x86::{Code, Instruction};

use crate::cpu::breakpoint::dr6;
use crate::cpu::{CodeSize, Cpu};
use crate::state::{cr0, efer, gpr, rflags, rights, seg, Segment};
use crate::uop::{slot, Exec, Handler, Stop, Uop};

const R11: usize = 11;
/// A flat segment: 4 GB, accessed, present.
const FLAT: u32 = rights::PRESENT | rights::S | rights::GRANULARITY | rights::RW | rights::ACCESSED;
/// 64-bit code at CPL 0.
pub const FLAT_CODE_64: u32 = FLAT | rights::CODE | rights::LONG;
const FLAT_CODE_32: u32 = FLAT | rights::CODE | rights::DB;
/// Data at CPL 0.
pub const FLAT_DATA: u32 = FLAT | rights::DB;
/// What makes that a segment of CPL 3.
pub const USER: u32 = 3 << rights::DPL_SHIFT;
/// Flags that SYSRET does not load from R11.
pub const SYSRET_DROPS: u64 = rflags::RF | rflags::VM;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, size: CodeSize) -> Option<Handler> {
    Some(match insn.code() {
        Code::Syscall if size == CodeSize::Bits64 => syscall_64,
        Code::Syscall => syscall_legacy,
        Code::Sysretd => sysret::<false>,
        Code::Sysretq => sysret::<true>,
        Code::Sysenter => sysenter,
        Code::Sysexitd => sysexit::<false>,
        Code::Sysexitq => sysexit::<true>,
        _ => return None,
    })
}

const fn flat(selector: u16, access_rights: u32) -> Segment {
    Segment::new(selector, access_rights, u32::MAX, 0)
}

/// Loads RFLAGS. Whether a single-step trap follows is up to the new TF (SDM vol. 3, 17.3.1.4).
#[inline(always)]
fn load_rflags(cpu: &mut Cpu, image: u64) {
    let steps = cpu.rflags & rflags::TF;
    cpu.load_rflags(image);
    if (steps | image) & rflags::TF != 0 {
        cpu.step_settled = steps != 0;
        cpu.trap(if image & rflags::TF != 0 { dr6::BS } else { 0 });
    }
}

fn syscall_64(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if cpu.state.efer & efer::SCE == 0 {
        return Err(cpu.undefined());
    }
    let target = cpu.state.lstar;
    enter_long_kernel(cpu, uop, target)
}

/// SYSCALL outside 64-bit mode, which only AMD has.
fn syscall_legacy(cpu: &mut Cpu, uop: &Uop) -> Exec {
    if !cpu.model.is_amd() || cpu.state.efer & efer::SCE == 0 || !cpu.protected() {
        return Err(cpu.undefined());
    }
    if cpu.ia32e() {
        let target = cpu.state.cstar;
        return enter_long_kernel(cpu, uop, target);
    }
    let next = cpu.rip_at(uop.next_offset());
    cpu.set_gpr(gpr::RCX, next);
    cpu.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    let selector = (cpu.state.star >> 32) as u16;
    cpu.state.segments[seg::CS] = flat(selector & !3, FLAT_CODE_32);
    cpu.state.segments[seg::SS] = flat((selector & !3).wrapping_add(8), FLAT_DATA);
    cpu.refresh();
    cpu.set_rip(cpu.state.star & 0xffff_ffff);
    Err(Stop::Next)
}

#[inline(always)]
fn enter_long_kernel(cpu: &mut Cpu, uop: &Uop, target: u64) -> Exec {
    let was_long = cpu.long_mode();
    cpu.set_gpr(gpr::RCX, cpu.rip_at(uop.next_offset()));
    let image = cpu.rflags() & !rflags::RF;
    cpu.set_gpr(R11, image);
    load_rflags(cpu, image & !cpu.state.fmask);
    let selector = (cpu.state.star >> 32) as u16 & !3;
    cpu.state.segments[seg::CS] = flat(selector, FLAT_CODE_64);
    cpu.state.segments[seg::SS] = flat(selector.wrapping_add(8), FLAT_DATA);
    if was_long {
        cpu.refresh_privilege();
    } else {
        cpu.refresh();
    }
    cpu.regs[slot::RIP as usize] = target;
    Err(Stop::Next)
}

/// SYSRET; `WIDE`: to 64-bit code (REX.W).
fn sysret<const WIDE: bool>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let intel = !cpu.model.is_amd();
    if cpu.state.efer & efer::SCE == 0 || !cpu.protected() || intel && !cpu.long_mode() {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    let target = cpu.gpr(gpr::RCX);
    // AMD's processors take the fault at the target, in ring 3.
    if WIDE && intel && !cpu.canonical(target) {
        return Err(cpu.general_protection());
    }
    let star = (cpu.state.star >> 48) as u16;
    if cpu.long_mode() {
        load_rflags(cpu, cpu.gpr(R11) & !SYSRET_DROPS);
    } else {
        cpu.rflags |= rflags::IF;
    }
    let was_long = cpu.long_mode();
    let code = if WIDE { flat(star.wrapping_add(16) | 3, FLAT_CODE_64 | USER) } else { flat(star | 3, FLAT_CODE_32 | USER) };
    cpu.state.segments[seg::CS] = code;
    cpu.state.segments[seg::SS] = flat(star.wrapping_add(8) | 3, FLAT_DATA | USER);
    if WIDE && was_long {
        cpu.refresh_privilege();
    } else {
        cpu.refresh();
    }
    cpu.set_rip(target);
    Err(Stop::Next)
}

/// Whether SYSENTER and SYSEXIT exist in the current mode: AMD has them in legacy mode only.
fn has_sysenter(cpu: &Cpu) -> bool {
    !(cpu.model.is_amd() && cpu.ia32e())
}

fn sysenter(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if !has_sysenter(cpu) {
        return Err(cpu.undefined());
    }
    let selector = cpu.state.sysenter_cs as u16 & !3;
    if cpu.state.cr0 & cr0::PE == 0 || selector == 0 {
        return Err(cpu.general_protection());
    }
    cpu.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    let long = cpu.ia32e();
    cpu.state.segments[seg::CS] = flat(selector, if long { FLAT_CODE_64 } else { FLAT_CODE_32 });
    cpu.state.segments[seg::SS] = flat(selector.wrapping_add(8), FLAT_DATA);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_gpr(gpr::RSP, cpu.state.sysenter_esp & mask);
    cpu.refresh();
    cpu.set_rip(cpu.state.sysenter_eip);
    Err(Stop::Next)
}

/// SYSEXIT; `WIDE`: to 64-bit code (REX.W).
fn sysexit<const WIDE: bool>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if !has_sysenter(cpu) {
        return Err(cpu.undefined());
    }
    let base = cpu.state.sysenter_cs as u16 & !3;
    if base == 0 || !cpu.protected() || cpu.cpl() != 0 {
        return Err(cpu.general_protection());
    }
    let (rip, rsp) = (cpu.gpr(gpr::RDX), cpu.gpr(gpr::RCX));
    if WIDE && !(cpu.canonical(rip) && cpu.canonical(rsp)) {
        return Err(cpu.general_protection());
    }
    let (offset, code) = if WIDE { (32u16, FLAT_CODE_64) } else { (16, FLAT_CODE_32) };
    cpu.state.segments[seg::CS] = flat(base.wrapping_add(offset) | 3, code | USER);
    cpu.state.segments[seg::SS] = flat(base.wrapping_add(offset + 8) | 3, FLAT_DATA | USER);
    cpu.set_gpr(gpr::RSP, if WIDE { rsp } else { rsp & 0xffff_ffff });
    cpu.refresh();
    cpu.set_rip(rip);
    Err(Stop::Next)
}
