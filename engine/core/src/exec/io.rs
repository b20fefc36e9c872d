//! Port input and output: IN, OUT, INS, OUTS (SDM vol. 1, ch. 19; exits: SDM vol. 3, table 28-5; APM vol. 2, 15.10.2).
//!
//! No device lives in the silicon. An access that the hypervisor does not intercept meets an empty bus: reads float to all ones and
//! writes vanish.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::cpu::{CodeSize, Cpu};
use crate::paging::AccessKind;
use crate::state::{gpr, rflags, rights, seg};
use crate::uop::{flag, Exec, Handler, Stop, Uop};
use crate::virt::control::intercept;
use crate::virt::exits::code;
use crate::word::Word;

/// Bits of `Exit::io_flags`.
mod io_flag {
    pub const IN: u8 = 1;
    pub const STRING: u8 = 2;
    pub const REP: u8 = 4;
    pub const ADDRESS_32: u8 = 8;
    pub const ADDRESS_64: u8 = 16;
    pub const DOWN: u8 = 32;
}

/// The handler of an instruction of this family.
pub fn handler(insn: &Instruction, _size: CodeSize) -> Option<Handler> {
    let handler: Handler = match insn.mnemonic() {
        Mnemonic::In => match (insn.op0_register().size(), insn.op1_kind() == OpKind::Register) {
            (1, true) => input::<u8, false>,
            (2, true) => input::<u16, false>,
            (4, true) => input::<u32, false>,
            (1, false) => input::<u8, true>,
            (2, false) => input::<u16, true>,
            _ => input::<u32, true>,
        },
        Mnemonic::Out => match (insn.op1_register().size(), insn.op0_kind() == OpKind::Register) {
            (1, true) => output::<u8, false>,
            (2, true) => output::<u16, false>,
            (4, true) => output::<u32, false>,
            (1, false) => output::<u8, true>,
            (2, false) => output::<u16, true>,
            _ => output::<u32, true>,
        },
        Mnemonic::Insb => input_string::<u8>,
        Mnemonic::Insw => input_string::<u16>,
        Mnemonic::Insd => input_string::<u32>,
        Mnemonic::Outsb => output_string::<u8>,
        Mnemonic::Outsw => output_string::<u16>,
        Mnemonic::Outsd => output_string::<u32>,
        _ => return None,
    };
    Some(handler)
}

/// One port access as the exit tells it.
#[derive(Clone, Copy)]
struct Port {
    number: u16,
    bytes: u8,
    immediate: bool,
    /// Bits of [`io_flag`].
    flags: u8,
    count: u64,
    /// Segment and linear address of the memory side.
    segment: usize,
    la: u64,
}

impl Port {
    fn simple<W: Word, const IMMEDIATE: bool>(cpu: &Cpu, uop: &Uop, flags: u8) -> Port {
        let number = if IMMEDIATE { uop.imm as u16 } else { dx(cpu) };
        Port { number, bytes: W::BYTES as u8, immediate: IMMEDIATE, flags, count: 1, segment: seg::DS, la: 0 }
    }

    fn string<W: Word>(cpu: &Cpu, uop: &Uop, flags: u8, segment: usize) -> Port {
        let mut flags = flags | io_flag::STRING;
        let mut count = 1;
        if repeated(uop) {
            flags |= io_flag::REP;
            count = cpu.gpr(gpr::RCX) & address_mask(uop);
        }
        flags |= match address_bits(uop) {
            64 => io_flag::ADDRESS_64,
            32 => io_flag::ADDRESS_32,
            _ => 0,
        };
        if cpu.rflags & rflags::DF != 0 {
            flags |= io_flag::DOWN;
        }
        Port { number: dx(cpu), bytes: W::BYTES as u8, immediate: false, flags, count, segment, la: 0 }
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

fn dx(cpu: &Cpu) -> u16 {
    cpu.gpr(gpr::RDX) as u16
}

fn input<W: Word, const IMMEDIATE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let port = Port::simple::<W, IMMEDIATE>(cpu, uop, io_flag::IN);
    check_permission(cpu, &port)?;
    check_intercept(cpu, uop, &port)?;
    cpu.watch_port(port.number, port.bytes);
    cpu.set_reg(gpr::RAX as u8 * 8, !W::ZERO);
    Ok(())
}

fn output<W: Word, const IMMEDIATE: bool>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let port = Port::simple::<W, IMMEDIATE>(cpu, uop, 0);
    check_permission(cpu, &port)?;
    check_intercept(cpu, uop, &port)?;
    cpu.watch_port(port.number, port.bytes);
    Ok(())
}

fn input_string<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let mut port = Port::string::<W>(cpu, uop, io_flag::IN, seg::ES);
    check_permission(cpu, &port)?;
    if port.count == 0 {
        return Ok(());
    }
    port.la = cpu.segment_address(seg::ES, cpu.gpr(gpr::RDI) & address_mask(uop), W::BYTES, AccessKind::Write)?;
    cpu.probe_write(seg::ES, port.la, W::BYTES)?;
    check_intercept(cpu, uop, &port)?;
    cpu.write(seg::ES, port.la, !W::ZERO)?;
    finish_string(cpu, uop, &port, gpr::RDI)
}

fn output_string<W: Word>(cpu: &mut Cpu, uop: &Uop) -> Exec {
    let mut port = Port::string::<W>(cpu, uop, 0, uop.segment());
    check_permission(cpu, &port)?;
    if port.count == 0 {
        return Ok(());
    }
    port.la = cpu.segment_address(port.segment, cpu.gpr(gpr::RSI) & address_mask(uop), W::BYTES, AccessKind::Read)?;
    probe_read(cpu, &port)?;
    check_intercept(cpu, uop, &port)?;
    cpu.read::<W>(port.segment, port.la)?;
    finish_string(cpu, uop, &port, gpr::RSI)
}

/// Fails as a read of the memory side would.
fn probe_read(cpu: &mut Cpu, port: &Port) -> Exec {
    cpu.chunk(port.segment, port.la, 1, AccessKind::Read)?;
    let last = port.la.wrapping_add(u64::from(port.bytes) - 1);
    cpu.chunk(port.segment, last, 1, AccessKind::Read).map(drop)
}

/// Moves on by one element; a repeated instruction that has elements left stays.
fn finish_string(cpu: &mut Cpu, uop: &Uop, port: &Port, pointer: usize) -> Exec {
    cpu.watch_port(port.number, port.bytes);
    let step = if port.has(io_flag::DOWN) { u64::from(port.bytes).wrapping_neg() } else { port.bytes.into() };
    add_address(cpu, uop, pointer, step);
    if port.has(io_flag::REP) {
        add_address(cpu, uop, gpr::RCX, u64::MAX);
        if port.count > 1 {
            return Err(Stop::Again);
        }
    }
    Ok(())
}

/// Adds to as much of a register as the address size covers.
fn add_address(cpu: &mut Cpu, uop: &Uop, register: usize, step: u64) {
    let sum = cpu.gpr(register).wrapping_add(step);
    match address_bits(uop) {
        64 => cpu.set_gpr(register, sum),
        32 => cpu.set_reg(register as u8 * 8, sum as u32),
        _ => cpu.set_reg(register as u8 * 8, sum as u16),
    }
}

fn repeated(uop: &Uop) -> bool {
    uop.has(flag::REP | flag::REPNE)
}

fn address_bits(uop: &Uop) -> u32 {
    if uop.has(flag::ADDRESS_16) {
        16
    } else if uop.has(flag::ADDRESS_32) {
        32
    } else {
        64
    }
}

fn address_mask(uop: &Uop) -> u64 {
    u64::MAX >> (64 - address_bits(uop))
}

// ---- permission ---------------------------------------------------------------------------------------------------------------------

/// #GP unless IOPL or the TSS allow the access (SDM vol. 1, 19.5).
fn check_permission(cpu: &mut Cpu, port: &Port) -> Exec {
    let iopl = ((cpu.rflags & rflags::IOPL) >> 12) as u8;
    let virtual_8086 = cpu.rflags & rflags::VM != 0;
    if cpu.cpl() <= iopl && !virtual_8086 {
        return Ok(());
    }
    check_bitmap(cpu, port)
}

#[cold]
fn check_bitmap(cpu: &mut Cpu, port: &Port) -> Exec {
    /// Offset of the I/O map base in a 32-bit or 64-bit TSS.
    const MAP_BASE: u32 = 102;
    /// Type of an available 32-bit or 64-bit TSS; a busy one has bit 1 set too.
    const TSS: u32 = 9;
    let tr = cpu.state.segments[seg::TR];
    if tr.access_rights & rights::TYPE & !2 != TSS || tr.has(rights::UNUSABLE) || tr.limit <= MAP_BASE {
        return Err(cpu.general_protection());
    }
    let base: u16 = cpu.read_system(tr.base.wrapping_add(MAP_BASE.into()))?;
    let at = u32::from(base) + u32::from(port.number / 8);
    // The processor always reads two bytes, so that an access may cross from one into the other.
    if at + 1 > tr.limit {
        return Err(cpu.general_protection());
    }
    let map: u16 = cpu.read_system(tr.base.wrapping_add(at.into()))?;
    let wanted = ((1u16 << port.bytes) - 1) << (port.number % 8);
    if map & wanted != 0 {
        return Err(cpu.general_protection());
    }
    Ok(())
}

// ---- exits --------------------------------------------------------------------------------------------------------------------------

fn check_intercept(cpu: &mut Cpu, uop: &Uop, port: &Port) -> Exec {
    let bitmap = cpu.control.intercepts(intercept::IO_BITMAP);
    if cpu.control.intercepts(intercept::IO) || bitmap && bitmap_intercepts(cpu, port) {
        return Err(exit(cpu, uop, port));
    }
    Ok(())
}

/// Whether the hypervisor's bitmap has a bit set for any byte of the access; one that wraps past port FFFF always exits.
fn bitmap_intercepts(cpu: &Cpu, port: &Port) -> bool {
    let last = u32::from(port.number) + u32::from(port.bytes) - 1;
    last > 0xffff || (u32::from(port.number)..=last).any(|number| cpu.port_intercepted(number as u16))
}

fn exit(cpu: &mut Cpu, uop: &Uop, port: &Port) -> Stop {
    let amd = cpu.model.is_amd();
    let detail = if amd { svm_information(uop, port) } else { vmx_qualification(port) };
    let stop = cpu.exit(code::IO, detail);
    if amd {
        cpu.exit.info2 = cpu.rip_at(uop.next_offset());
    } else if port.has(io_flag::STRING) {
        cpu.exit.instruction_info = (address_bits(uop) / 32) << 7 | (port.segment as u32) << 15;
    }
    (cpu.exit.io_port, cpu.exit.io_size, cpu.exit.io_flags) = (port.number, port.bytes, port.flags);
    (cpu.exit.io_count, cpu.exit.io_gla, cpu.exit.gla) = (port.count, port.la, port.la);
    stop
}

fn vmx_qualification(port: &Port) -> u64 {
    u64::from(port.bytes - 1)
        | u64::from(port.has(io_flag::IN)) << 3
        | u64::from(port.has(io_flag::STRING)) << 4
        | u64::from(port.has(io_flag::REP)) << 5
        | u64::from(port.immediate) << 6
        | u64::from(port.number) << 16
}

fn svm_information(uop: &Uop, port: &Port) -> u64 {
    let string = port.has(io_flag::STRING);
    // Bits 6:4 are one-hot sizes of 1, 2 and 4 bytes; bits 9:7 are one-hot address sizes of 16, 32 and 64 bits.
    let address = if string { 1u64 << 7 << (address_bits(uop) / 32) | (port.segment as u64) << 10 } else { 0 };
    u64::from(port.has(io_flag::IN))
        | u64::from(string) << 2
        | u64::from(port.has(io_flag::REP)) << 3
        | u64::from(port.bytes) << 4
        | address
        | u64::from(port.number) << 16
}
