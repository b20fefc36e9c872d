//! LGDT, SGDT, LIDT, SIDT, LLDT, SLDT, LTR and STR (SDM vol. 3, 2.4 and 7.2.3).

use iced_x86::{Code, Instruction, OpKind};

use crate::cpu::descriptor::{is_null, system, Descriptor};
use crate::cpu::{CodeSize, Cpu};
use crate::fault::vector;
use crate::paging::AccessKind;
use crate::state::{rights, seg, DescriptorTable, Segment};
use crate::uop::{Exec, Handler, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::{code, Code as ExitCode};
use crate::word::Word;

/// Numbers of the instructions in exit codes and instruction information (SDM vol. 3, tables 28-10 and 28-11; APM vol. 2, app. C).
const STORE_GDTR: u32 = 0;
const STORE_IDTR: u32 = 1;
const LOAD_GDTR: u32 = 2;
const LOAD_IDTR: u32 = 3;
const STORE_LDTR: u32 = 0;
const STORE_TR: u32 = 1;
const LOAD_LDTR: u32 = 2;
const LOAD_TR: u32 = 3;

pub(super) fn handler(insn: &Instruction, size: CodeSize) -> Option<Handler> {
    let long = size == CodeSize::Bits64;
    let memory = insn.op0_kind() == OpKind::Memory;
    Some(match insn.code() {
        Code::Lgdt_m1632_16 => load_table::<u32, 0xff_ffff, LOAD_GDTR>,
        Code::Lgdt_m1632 => load_table::<u32, 0xffff_ffff, LOAD_GDTR>,
        Code::Lgdt_m1664 => load_table::<u64, { u64::MAX }, LOAD_GDTR>,
        Code::Lidt_m1632_16 => load_table::<u32, 0xff_ffff, LOAD_IDTR>,
        Code::Lidt_m1632 => load_table::<u32, 0xffff_ffff, LOAD_IDTR>,
        Code::Lidt_m1664 => load_table::<u64, { u64::MAX }, LOAD_IDTR>,
        Code::Sgdt_m1632_16 | Code::Sgdt_m1632 | Code::Sgdt_m1664 if long => store_table::<u64, STORE_GDTR>,
        Code::Sgdt_m1632_16 | Code::Sgdt_m1632 => store_table::<u32, STORE_GDTR>,
        Code::Sidt_m1632_16 | Code::Sidt_m1632 | Code::Sidt_m1664 if long => store_table::<u64, STORE_IDTR>,
        Code::Sidt_m1632_16 | Code::Sidt_m1632 => store_table::<u32, STORE_IDTR>,
        Code::Sldt_rm16 | Code::Sldt_r32m16 | Code::Sldt_r64m16 if memory => store_selector::<STORE_LDTR>,
        Code::Sldt_rm16 => read_selector::<u16, STORE_LDTR>,
        Code::Sldt_r32m16 => read_selector::<u32, STORE_LDTR>,
        Code::Sldt_r64m16 => read_selector::<u64, STORE_LDTR>,
        Code::Str_rm16 | Code::Str_r32m16 | Code::Str_r64m16 if memory => store_selector::<STORE_TR>,
        Code::Str_rm16 => read_selector::<u16, STORE_TR>,
        Code::Str_r32m16 => read_selector::<u32, STORE_TR>,
        Code::Str_r64m16 => read_selector::<u64, STORE_TR>,
        Code::Lldt_rm16 | Code::Lldt_r32m16 | Code::Lldt_r64m16 if memory => load_ldt::<true>,
        Code::Lldt_rm16 | Code::Lldt_r32m16 | Code::Lldt_r64m16 => load_ldt::<false>,
        Code::Ltr_rm16 | Code::Ltr_r32m16 | Code::Ltr_r64m16 if memory => load_task::<true>,
        Code::Ltr_rm16 | Code::Ltr_r32m16 | Code::Ltr_r64m16 => load_task::<false>,
        _ => return None,
    })
}

/// Exits when the hypervisor watches the descriptor tables. `instruction` counts reads of both tables first, as VMX does.
fn check_intercept(cpu: &mut Cpu, exit: ExitCode, instruction: u32, uop: &Uop) -> Exec {
    // A hypervisor that has the instruction emulated has seen it.
    if !cpu.control.intercepts(intercept::DESCRIPTOR_TABLE) || cpu.control.emulate != 0 {
        return Ok(());
    }
    if cpu.model.is_amd() {
        // SVM: IDTR read, GDTR read, LDTR read, TR read, then the writes in the same order.
        let table = if exit == code::GDTR_IDTR { 1 - (instruction & 1) } else { instruction & 1 };
        return Err(cpu.exit_number(exit.svm + table + 4 * (instruction >> 1), 0));
    }
    let displacement = i64::from(uop.disp) as u64;
    let stop = cpu.exit(exit, displacement);
    cpu.exit.instruction_info = instruction << 28;
    Err(stop)
}

fn load_table<W: Word, const MASK: u64, const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.require_cpl0()?;
    check_intercept(cpu, code::GDTR_IDTR, INSTRUCTION, uop)?;
    let la = cpu.linear(uop, 2 + W::BYTES, AccessKind::Read)?;
    let limit: u16 = cpu.read(uop.segment(), la)?;
    let base = cpu.read::<W>(uop.segment(), la.wrapping_add(2))?.zero_extend() & MASK;
    if !cpu.canonical_base(base) {
        return Err(cpu.general_protection());
    }
    let table = DescriptorTable::new(base, limit.into());
    if INSTRUCTION == LOAD_GDTR {
        cpu.state.gdtr = table;
    } else {
        cpu.state.idtr = table;
    }
    Ok(())
}

fn store_table<W: Word, const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    cpu.check_umip()?;
    check_intercept(cpu, code::GDTR_IDTR, INSTRUCTION, uop)?;
    let table = if INSTRUCTION == STORE_GDTR { cpu.state.gdtr } else { cpu.state.idtr };
    let la = cpu.linear(uop, 2 + W::BYTES, AccessKind::Write)?;
    let base = la.wrapping_add(2);
    cpu.probe_write(uop.segment(), la, 2)?;
    cpu.write(uop.segment(), base, W::truncate(table.base))?;
    cpu.write(uop.segment(), la, table.limit as u16)
}

/// The selector that SLDT or STR tells.
fn system_selector<const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec<u16> {
    if !cpu.protected() {
        return Err(cpu.undefined());
    }
    cpu.check_umip()?;
    check_intercept(cpu, code::LDTR_TR, INSTRUCTION, uop)?;
    let number = if INSTRUCTION == STORE_LDTR { seg::LDTR } else { seg::TR };
    Ok(cpu.state.segments[number].selector)
}

fn store_selector<const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = system_selector::<INSTRUCTION>(cpu, uop)?;
    cpu.store(uop, selector)
}

fn read_selector<W: Word, const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = system_selector::<INSTRUCTION>(cpu, uop)?;
    cpu.set_reg(uop.reg[0], W::truncate(selector.into()));
    Ok(())
}

/// The operand of LLDT or LTR.
fn operand<const MEMORY: bool, const INSTRUCTION: u32>(cpu: &mut Cpu, uop: &Uop) -> Exec<u16> {
    if !cpu.protected() {
        return Err(cpu.undefined());
    }
    cpu.require_cpl0()?;
    check_intercept(cpu, code::LDTR_TR, INSTRUCTION, uop)?;
    if MEMORY {
        cpu.load(uop)
    } else {
        Ok(cpu.reg(uop.reg[0]))
    }
}

fn load_ldt<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = operand::<MEMORY, LOAD_LDTR>(cpu, uop)?;
    if is_null(selector) {
        cpu.state.segments[seg::LDTR] = Segment::new(selector, rights::UNUSABLE, 0, 0);
        return Ok(());
    }
    let descriptor = system_descriptor(cpu, selector, |kind| kind == system::LDT)?;
    let segment = system_segment(cpu, selector, descriptor)?;
    cpu.state.segments[seg::LDTR] = segment;
    Ok(())
}

fn load_task<const MEMORY: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let selector = operand::<MEMORY, LOAD_TR>(cpu, uop)?;
    if is_null(selector) {
        return Err(cpu.general_protection());
    }
    let legacy = !cpu.ia32e();
    let descriptor = system_descriptor(cpu, selector, |kind| kind == system::TSS || kind == system::TSS_16 && legacy)?;
    let segment = system_segment(cpu, selector, descriptor.busy())?;
    cpu.write_descriptor_type(selector, descriptor.busy())?;
    cpu.state.segments[seg::TR] = segment;
    Ok(())
}

/// A present system descriptor of the GDT.
fn system_descriptor(cpu: &mut Cpu, selector: u16, wanted: impl Fn(u8) -> bool) -> Exec<Descriptor> {
    if selector & 4 != 0 {
        return Err(cpu.selector_fault(vector::GP, selector));
    }
    let descriptor = cpu.descriptor(selector, vector::GP)?;
    if !descriptor.is_system() || !wanted(descriptor.kind()) {
        return Err(cpu.selector_fault(vector::GP, selector));
    }
    if !descriptor.present() {
        return Err(cpu.selector_fault(vector::NP, selector));
    }
    Ok(descriptor)
}

/// The hidden part of LDTR or TR, whose bases have 64 bits in IA-32e mode.
fn system_segment(cpu: &mut Cpu, selector: u16, descriptor: Descriptor) -> Exec<Segment> {
    let mut segment = descriptor.segment(selector);
    if cpu.ia32e() {
        let upper = cpu.upper_descriptor(selector)?;
        segment.base |= upper << 32;
        if upper >> 40 & 0x1f != 0 || !cpu.canonical_base(segment.base) {
            return Err(cpu.selector_fault(vector::GP, selector));
        }
    }
    Ok(segment)
}
