//! The stack: PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE (SDM vol. 1, ch. 6; vol. 2 for each).
//!
//! POP of segment registers belongs to the segment family.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::select::{in_memory, is_immediate, width};
use crate::cpu::{CodeSize, Cpu};
use crate::paging::AccessKind;
use crate::state::{cr4, gpr, rflags, seg};
use crate::uop::{Exec, Handler, RegOffset, Stop, Uop};
use crate::word::Word;

const RBP: RegOffset = gpr::RBP as u8 * 8;

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    use Mnemonic::*;
    match insn.mnemonic() {
        Push => push(insn),
        Pop => pop(insn),
        Pusha => Some(pusha::<u16>),
        Pushad => Some(pusha::<u32>),
        Popa => Some(popa::<u16>),
        Popad => Some(popa::<u32>),
        Pushf => Some(pushf::<u16>),
        Pushfd => Some(pushf::<u32>),
        Pushfq => Some(pushf::<u64>),
        Popf => Some(popf::<u16>),
        Popfd => Some(popf::<u32>),
        Popfq => Some(popf::<u64>),
        Enter => by_wide_width!(frame_width(insn), enter),
        Leave => by_wide_width!(frame_width(insn), leave),
        _ => None,
    }
}

/// Whether the dispatcher must look at the CPU after this instruction: POPF changes IF and TF.
pub fn ends_block(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq)
}

/// Runs `body`, and puts RSP back when it fails.
#[inline(always)]
fn restoring_rsp<T>(cpu: &mut Cpu, body: impl FnOnce(&mut Cpu) -> Exec<T>) -> Exec<T> {
    let rsp = cpu.gpr(gpr::RSP);
    body(cpu).inspect_err(|_| cpu.set_gpr(gpr::RSP, rsp))
}

// ---- PUSH and POP ---------------------------------------------------------------------------------------------------------------------

fn push(insn: &Instruction) -> Option<Handler> {
    if is_immediate(insn, 0) {
        return by_wide_width!(immediate_width(insn), push_i);
    }
    if insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register() {
        return by_wide_width!(-insn.stack_pointer_increment(), push_segment);
    }
    match in_memory(insn, 0) {
        true => by_wide_width!(width(insn, 0), push_m),
        false => by_wide_width!(width(insn, 0), push_r),
    }
}

/// Operand size in bytes of PUSH with an immediate.
fn immediate_width(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Push_imm16 | Code::Pushw_imm8 => 2,
        Code::Pushd_imm32 | Code::Pushd_imm8 => 4,
        Code::Pushq_imm32 | Code::Pushq_imm8 => 8,
        _ => 0,
    }
}

fn push_r<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.reg(uop.reg[0]);
    cpu.push(value)
}

fn push_m<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.load(uop)?;
    cpu.push(value)
}

fn push_i<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.push(W::truncate(uop.imm))
}

fn push_segment<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = cpu.state.segments[usize::from(uop.reg[0])].selector;
    cpu.push(W::truncate(selector.into()))
}

fn pop(insn: &Instruction) -> Option<Handler> {
    match in_memory(insn, 0) {
        true => by_wide_width!(width(insn, 0), pop_m),
        false => by_wide_width!(width(insn, 0), pop_r),
    }
}

fn pop_r<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let value: W = cpu.pop()?;
    cpu.set_reg(uop.reg[0], value);
    Ok(())
}

/// The address of the destination is computed after RSP moved.
fn pop_m<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    restoring_rsp(cpu, |cpu| {
        let value: W = cpu.pop()?;
        cpu.store(uop, value)
    })
}

/// Register numbers in the order in which PUSHA pushes them.
const PUSHA_ORDER: [usize; 8] = [gpr::RAX, gpr::RCX, gpr::RDX, gpr::RBX, gpr::RSP, gpr::RBP, gpr::RSI, gpr::RDI];

fn pusha<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let values = PUSHA_ORDER.map(|number| W::truncate(cpu.gpr(number)));
    restoring_rsp(cpu, |cpu| values.into_iter().try_for_each(|value| cpu.push(value)))
}

/// RSP's image is read and dropped.
fn popa<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let mut values = [W::ZERO; 8];
    for (n, value) in values.iter_mut().enumerate() {
        *value = cpu.peek(n as u64 * W::BYTES)?;
    }
    for (number, value) in PUSHA_ORDER.into_iter().rev().zip(values) {
        if number != gpr::RSP {
            cpu.set_reg(number as u8 * 8, value);
        }
    }
    let released = cpu.gpr(gpr::RSP).wrapping_add(8 * W::BYTES);
    cpu.set_stack_pointer(released);
    Ok(())
}

// ---- PUSHF and POPF -------------------------------------------------------------------------------------------------------------------

/// Whether the code runs in virtual-8086 mode with an IOPL that does not let it touch the flags.
fn virtual_8086_below_iopl(cpu: &Cpu) -> bool {
    cpu.rflags & rflags::VM != 0 && cpu.rflags & rflags::IOPL != rflags::IOPL
}

fn pushf<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let mut image = cpu.rflags();
    if virtual_8086_below_iopl(cpu) {
        if W::BITS != 16 || cpu.state.cr4 & cr4::VME == 0 {
            return Err(cpu.general_protection());
        }
        image = cpu.virtual_flags();
    }
    cpu.push(W::truncate(image & !(rflags::VM | rflags::RF)))
}

/// Flags that POPF may change at the current privilege (SDM vol. 2, POPF, table 4-16).
fn poppable(cpu: &Cpu) -> u64 {
    let kept = rflags::VM | rflags::VIF | rflags::VIP;
    let iopl = (cpu.rflags & rflags::IOPL) >> rflags::IOPL.trailing_zeros();
    let guarded = match cpu.cpl() {
        0 => 0,
        cpl if u64::from(cpl) <= iopl => rflags::IOPL,
        _ => rflags::IOPL | rflags::IF,
    };
    rflags::WRITABLE & !kept & !guarded
}

fn popf<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    if virtual_8086_below_iopl(cpu) {
        return popf_virtual::<W>(cpu);
    }
    let image = cpu.peek::<W>(0)?.zero_extend();
    let upper = if W::BITS == 16 { 0xffff } else { u64::MAX };
    let changed = poppable(cpu) & upper;
    let flags = cpu.rflags() & !changed | image & changed;
    // RF is always cleared by a 32- or 64-bit POPF, and a 16-bit one does not reach it.
    let flags = if W::BITS == 16 { flags } else { flags & !rflags::RF };
    finish_popf::<W>(cpu, flags)
}

/// POPF in virtual-8086 mode with IOPL below 3: with CR4.VME, IF of the image is VIF.
fn popf_virtual<W: Word>(cpu: &mut Cpu) -> Exec {
    if W::BITS != 16 || cpu.state.cr4 & cr4::VME == 0 {
        return Err(cpu.general_protection());
    }
    let image = cpu.peek::<W>(0)?.zero_extend();
    let flags = cpu.load_virtual_flags(image)?;
    finish_popf::<W>(cpu, flags)
}

fn finish_popf<W: Word>(cpu: &mut Cpu, flags: u64) -> Exec {
    let released = cpu.gpr(gpr::RSP).wrapping_add(W::BYTES);
    cpu.set_stack_pointer(released);
    cpu.set_rflags(flags);
    Err(Stop::Leave)
}

// ---- frames ---------------------------------------------------------------------------------------------------------------------------

/// Operand size in bytes of ENTER and LEAVE.
fn frame_width(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Enterw_imm16_imm8 | Code::Leavew => 2,
        Code::Enterd_imm16_imm8 | Code::Leaved => 4,
        Code::Enterq_imm16_imm8 | Code::Leaveq => 8,
        _ => 0,
    }
}

/// Linear address of stack offset `offset`, which does not depend on RSP.
fn stack_address<W: Word>(cpu: &mut Cpu, offset: u64, kind: AccessKind) -> Exec<u64> {
    let offset = offset & cpu.stack_mask();
    cpu.segment_address(seg::SS, offset, W::BYTES, kind)
}

fn enter<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let level = uop.disp as u64 & 31;
    let frame = restoring_rsp(cpu, |cpu| {
        cpu.push(cpu.reg::<W>(RBP))?;
        let frame = cpu.gpr(gpr::RSP);
        copy_display::<W>(cpu, level)?;
        if level > 0 {
            cpu.push(W::truncate(frame))?;
        }
        let bottom = cpu.gpr(gpr::RSP).wrapping_sub(uop.imm & 0xffff);
        let la = stack_address::<W>(cpu, bottom, AccessKind::Write)?;
        cpu.probe_write(seg::SS, la, W::BYTES)?;
        cpu.set_stack_pointer(bottom);
        Ok(frame)
    })?;
    cpu.set_reg(RBP, W::truncate(frame));
    Ok(())
}

/// Pushes the frame pointers of the enclosing procedures.
fn copy_display<W: Word>(cpu: &mut Cpu, level: u64) -> Exec {
    for n in 1..level {
        let at = cpu.gpr(gpr::RBP).wrapping_sub(n * W::BYTES);
        let la = stack_address::<W>(cpu, at, AccessKind::Read)?;
        let pointer: W = cpu.read(seg::SS, la)?;
        cpu.push(pointer)?;
    }
    Ok(())
}

fn leave<W: Word>(cpu: &mut Cpu, _uop: &Uop) -> Exec {
    let frame = restoring_rsp(cpu, |cpu| {
        cpu.set_stack_pointer(cpu.gpr(gpr::RBP));
        cpu.pop::<W>()
    })?;
    cpu.set_reg(RBP, frame);
    Ok(())
}
