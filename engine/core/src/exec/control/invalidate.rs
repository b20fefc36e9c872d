//! INVLPG, INVPCID and the cache instructions INVD, WBINVD and WBNOINVD (SDM vol. 2; vol. 3, 4.10.4).

use iced_x86::{Code, Instruction};

use super::load::PCID;
use crate::cpu::Cpu;
use crate::paging::AccessKind;
use crate::state::cr4;
use crate::uop::{Exec, Handler, Stop, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::{code, Code as ExitCode};
use crate::word::Word;

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    Some(match insn.code() {
        Code::Invlpg_m => invalidate_page,
        Code::Invpcid_r32_m128 => invalidate_pcid::<u32>,
        Code::Invpcid_r64_m128 => invalidate_pcid::<u64>,
        Code::Invd => drop_caches,
        Code::Wbinvd | Code::Wbnoinvd => write_caches,
        _ => return None,
    })
}

/// Linear address of a memory operand that is not accessed.
fn named_address(cpu: &Cpu, uop: &Uop) -> u64 {
    cpu.table_address(cpu.segment_base(uop.segment()).wrapping_add(cpu.effective_any(uop)))
}

fn invalidate_page(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    let la = named_address(cpu, uop);
    if cpu.control.intercepts(intercept::INVLPG) {
        return Err(cpu.exit(code::INVLPG, la));
    }
    if cpu.canonical(la) {
        cpu.tlb.invalidate(la);
        cpu.refresh_table();
    }
    Err(Stop::Leave)
}

/// What INVPCID drops.
enum Scope {
    Address(u16, u64),
    Pcid(u16),
    All,
    AllButGlobal,
}

fn invalidate_pcid<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    if cpu.control.intercepts(intercept::INVPCID) {
        return Err(exit_invpcid(cpu, uop));
    }
    let kind = cpu.reg::<W>(uop.reg[0]).zero_extend();
    let la = cpu.linear(uop, 16, AccessKind::Read)?;
    let pcid: u64 = cpu.read(uop.segment(), la)?;
    let address: u64 = cpu.read(uop.segment(), la.wrapping_add(8))?;
    let usable = pcid & !PCID == 0 && (kind > 1 || pcid == 0 || cpu.state.cr4 & cr4::PCIDE != 0);
    let scope = match kind {
        0 if usable && cpu.canonical_base(address) => Scope::Address(pcid as u16, address),
        1 if usable => Scope::Pcid(pcid as u16),
        2 if usable => Scope::All,
        3 if usable => Scope::AllButGlobal,
        _ => return Err(cpu.general_protection()),
    };
    match scope {
        Scope::Address(pcid, address) => cpu.tlb.invalidate_in(pcid, address),
        Scope::Pcid(pcid) => cpu.tlb.flush_pcid(pcid),
        Scope::All => cpu.tlb.flush(),
        Scope::AllButGlobal => cpu.tlb.flush_local(),
    }
    cpu.refresh_table();
    Err(Stop::Leave)
}

/// VMX tells displacement and the register operand (SDM vol. 3, tables 28-1 and 28-12); the linear address serves as guest-linear address.
#[cold]
fn exit_invpcid(cpu: &mut Cpu, uop: &Uop) -> Stop {
    let gla = named_address(cpu, uop);
    let stop = cpu.exit(code::INVPCID, i64::from(uop.disp) as u64);
    cpu.exit.instruction_info = u32::from(uop.reg[0] / 8) << 28;
    cpu.exit.gla = gla;
    stop
}

/// Caches are coherent with memory at all times, so there is nothing to write back or to lose.
fn cache_instruction(cpu: &mut Cpu, bit: u32, exit: ExitCode) -> Exec {
    cpu.require_cpl0()?;
    if cpu.control.intercepts(bit) {
        return Err(cpu.exit(exit, 0));
    }
    Ok(())
}

fn drop_caches(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cache_instruction(cpu, intercept::INVD, code::INVD)
}

fn write_caches(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    cache_instruction(cpu, intercept::WBINVD, code::WBINVD)
}
