//! LAR, LSL, VERR, VERW and ARPL: what code may know about descriptors (SDM vol. 3, 5.10).

use iced_x86::{Code, Instruction, OpKind};

use crate::cpu::descriptor::{rpl, system, Descriptor};
use crate::cpu::Cpu;
use crate::uop::{Exec, Handler, Uop};
use crate::word::Word;

/// Bits of a descriptor's second half that LAR tells.
const LAR_MASK: u64 = 0x00f0_ff00;

pub(super) fn handler(insn: &Instruction) -> Option<Handler> {
    let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
    /// Picks the form for a selector in memory or in a register.
    macro_rules! form {
        ($handler:ident $(, $width:ty)?) => {
            if memory { $handler::<$($width,)? true> } else { $handler::<$($width,)? false> }
        };
    }
    Some(match insn.code() {
        Code::Lar_r16_rm16 => form!(lar, u16),
        Code::Lar_r32_r32m16 => form!(lar, u32),
        Code::Lar_r64_r64m16 => form!(lar, u64),
        Code::Lsl_r16_rm16 => form!(lsl, u16),
        Code::Lsl_r32_r32m16 => form!(lsl, u32),
        Code::Lsl_r64_r64m16 => form!(lsl, u64),
        Code::Verr_rm16 | Code::Verr_r32m16 | Code::Verr_r64m16 => form!(verr),
        Code::Verw_rm16 | Code::Verw_r32m16 | Code::Verw_r64m16 => form!(verw),
        Code::Arpl_rm16_r16 | Code::Arpl_r32m16_r32 => form!(arpl),
        _ => return None,
    })
}

/// The selector operand, number `operand` when it is a register.
fn selector<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop, operand: usize) -> Exec<u16> {
    if !cpu.protected() {
        return Err(cpu.undefined());
    }
    if MEMORY {
        cpu.load(uop)
    } else {
        Ok(cpu.reg(uop.reg[operand]))
    }
}

/// Whether the privilege of code and selector lets them see the descriptor.
fn visible(cpu: &Cpu, selector: u16, descriptor: Descriptor) -> bool {
    descriptor.is_conforming_code() || descriptor.dpl() >= cpu.cpl().max(rpl(selector))
}

fn set_zero(cpu: &mut Cpu, zero: bool) {
    cpu.flags = cpu.flags.with_zero(zero);
}

fn lar<W: Word, const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = selector::<MEMORY>(cpu, uop, 1)?;
    let found = cpu.find_descriptor(selector)?.filter(|d| known_to_lar(cpu, *d) && visible(cpu, selector, *d));
    if let Some(descriptor) = found {
        cpu.set_reg(uop.reg[0], W::truncate(descriptor.0 >> 32 & LAR_MASK));
    }
    set_zero(cpu, found.is_some());
    Ok(())
}

fn known_to_lar(cpu: &Cpu, descriptor: Descriptor) -> bool {
    let legacy = !cpu.ia32e();
    match descriptor.kind() {
        _ if !descriptor.is_system() => true,
        system::LDT | system::TSS | system::TSS_BUSY | system::CALL_GATE => true,
        system::TSS_16 | system::TSS_16_BUSY | system::CALL_GATE_16 | system::TASK_GATE => legacy,
        _ => false,
    }
}

fn lsl<W: Word, const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = selector::<MEMORY>(cpu, uop, 1)?;
    let found = cpu.find_descriptor(selector)?.filter(|d| known_to_lsl(cpu, *d) && visible(cpu, selector, *d));
    if let Some(descriptor) = found {
        cpu.set_reg(uop.reg[0], W::truncate(descriptor.limit().into()));
    }
    set_zero(cpu, found.is_some());
    Ok(())
}

fn known_to_lsl(cpu: &Cpu, descriptor: Descriptor) -> bool {
    match descriptor.kind() {
        _ if !descriptor.is_system() => true,
        system::LDT | system::TSS | system::TSS_BUSY => true,
        system::TSS_16 | system::TSS_16_BUSY => !cpu.ia32e(),
        _ => false,
    }
}

fn verr<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = selector::<MEMORY>(cpu, uop, 0)?;
    let found = cpu.find_descriptor(selector)?.filter(|d| d.is_readable() && visible(cpu, selector, *d));
    set_zero(cpu, found.is_some());
    Ok(())
}

fn verw<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = selector::<MEMORY>(cpu, uop, 0)?;
    let found = cpu.find_descriptor(selector)?.filter(|d| d.is_writable_data() && visible(cpu, selector, *d));
    set_zero(cpu, found.is_some());
    Ok(())
}

fn arpl<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let target = selector::<MEMORY>(cpu, uop, 0)?;
    let level = cpu.reg::<u16>(uop.reg[1]) & 3;
    let raises = target & 3 < level;
    if raises {
        let adjusted = target & !3 | level;
        if MEMORY {
            cpu.store(uop, adjusted)?;
        } else {
            cpu.set_reg(uop.reg[0], adjusted);
        }
    }
    set_zero(cpu, raises);
    Ok(())
}
