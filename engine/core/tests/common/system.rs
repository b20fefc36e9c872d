//! Descriptor tables around a [`Machine`]: a GDT with code and data of both rings, an IDT and a TSS.

use softkvm_engine::state::{rights, seg, DescriptorTable, Segment};
use softkvm_engine::uop::{Exec, Stop};

use super::{CodeSize, Machine};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
/// Where the handler of vector n is: `HANDLERS + 16 * n`.
pub const HANDLERS: u64 = 0x4_0000;
pub const RING0_STACK: u64 = 0x9008;
pub const IST1: u64 = 0xa000;
pub const USER_STACK: u64 = 0xb000;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE_32: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const USER_CODE: u16 = 0x2b;
pub const TASK: u16 = 0x30;
pub const ABSENT_DATA: u16 = 0x40;
pub const CONFORMING: u16 = 0x48;
pub const FRESH_DATA: u16 = 0x50;
/// Sixteen bytes for tests of their own.
pub const FREE: u16 = 0x58;
const LAST: u16 = 0x68;

pub const INTERRUPT_GATE: u64 = 0x8e;
pub const TRAP_GATE: u64 = 0x8f;
pub const USER_TRAP_GATE: u64 = 0xef;
pub const ABSENT_GATE: u64 = 0x0e;
const VECTORS: u64 = 64;

/// A descriptor of a flat segment.
pub const fn flat(access: u64, flags: u64) -> u64 {
    0x000f_0000_0000_ffff | access << 40 | flags << 52
}

impl Machine {
    /// A CPU at CPL 0 with tables; every vector has an interrupt gate.
    pub fn system(size: CodeSize) -> Self {
        let mut machine = Machine::with_size(size);
        let long = size == CodeSize::Bits64;
        let native = if long { 0xa } else { 0xc };
        let table = [
            0,
            flat(0x9b, native),
            flat(0x93, 0xc),
            flat(0xfb, 0xc),
            flat(0xf3, 0xc),
            flat(0xfb, native),
            0x0000_8900_0000_0067 | TSS << 16,
            0,
            flat(0x13, 0xc),
            flat(0x9f, native),
            flat(0x92, 0xc),
        ];
        for (n, descriptor) in table.iter().enumerate() {
            machine.describe(8 * n as u16, *descriptor);
        }
        machine.cpu.state.gdtr = DescriptorTable::new(GDT, u32::from(LAST) - 1);
        machine.cpu.state.idtr = DescriptorTable::new(IDT, (VECTORS * if long { 16 } else { 8 } - 1) as u32);
        machine.cpu.state.segments[seg::TR] = Segment::new(TASK, rights::PRESENT | 0xb, 0x67, TSS);
        for vector in 0..VECTORS {
            machine.gate(vector as u8, INTERRUPT_GATE, 0);
        }
        if long {
            machine.poke(TSS + 4, &RING0_STACK.to_le_bytes());
            machine.poke(TSS + 36, &IST1.to_le_bytes());
        } else {
            machine.poke(TSS + 4, &(RING0_STACK | u64::from(KERNEL_DATA) << 32).to_le_bytes());
        }
        machine
    }

    /// Writes a descriptor of the GDT.
    pub fn describe(&mut self, selector: u16, descriptor: u64) {
        self.poke(GDT + u64::from(selector), &descriptor.to_le_bytes());
    }

    pub fn descriptor(&self, selector: u16) -> u64 {
        u64::from_le_bytes(self.bytes(GDT + u64::from(selector)))
    }

    /// Writes the gate of `vector`.
    pub fn gate(&mut self, vector: u8, access: u64, ist: u64) {
        let offset = HANDLERS + 16 * u64::from(vector);
        let gate = offset & 0xffff | u64::from(KERNEL_CODE) << 16 | ist << 32 | access << 40 | (offset & 0xffff_0000) << 32;
        if self.cpu.long_mode() {
            self.poke(IDT + 16 * u64::from(vector), &gate.to_le_bytes());
        } else {
            self.poke(IDT + 8 * u64::from(vector), &gate.to_le_bytes());
        }
    }

    /// Goes to ring 3.
    pub fn enter_user(&mut self) {
        let (code, data) = (self.descriptor(USER_CODE & !3), self.descriptor(USER_DATA & !3));
        for (number, selector, descriptor) in [(seg::CS, USER_CODE, code), (seg::SS, USER_DATA, data)] {
            let access = (descriptor >> 40) as u32 & 0xf0ff;
            self.cpu.state.segments[number] = Segment::new(selector, access, u32::MAX, 0);
        }
        self.cpu.refresh();
        self.cpu.set_gpr(4, USER_STACK);
        assert_eq!(self.cpu.cpl(), 3);
    }

    /// Runs one instruction of `code` and delivers the exception that it raises.
    pub fn run_delivering(&mut self, code: &[u8]) -> Exec {
        match self.run(code, 1) {
            Err(Stop::Fault) => self.cpu.deliver_fault(),
            other => other,
        }
    }

    /// The `n`-th word of 64 bits from the top of the stack.
    pub fn stacked(&self, n: u64) -> u64 {
        u64::from_le_bytes(self.bytes(self.cpu.gpr(4) + 8 * n))
    }

    /// The `n`-th word of 32 bits from the top of the stack.
    pub fn stacked_32(&self, n: u64) -> u32 {
        u32::from_le_bytes(self.bytes(self.cpu.gpr(4) + 4 * n))
    }

    /// Vector whose handler RIP is at.
    pub fn handler(&self) -> u64 {
        let distance = self.cpu.rip() - HANDLERS;
        assert_eq!(distance % 16, 0, "not at a handler: {:#x}", self.cpu.rip());
        distance / 16
    }

    /// Runs one instruction and expects a fault with an error code.
    pub fn expect_fault(&mut self, code: &[u8], vector: u8, error: u32) {
        assert_eq!(self.run(code, 1), Err(Stop::Fault), "{code:02x?}");
        assert_eq!((self.cpu.fault.vector, self.cpu.fault.error), (vector, Some(error)), "{code:02x?}");
    }
}
