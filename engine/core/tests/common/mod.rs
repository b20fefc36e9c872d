//! A CPU to run single instructions on, and the host's own CPU to compare it with.
//!
//! Each test crate uses its own part of this.
#![allow(dead_code)]

pub mod guest;
#[cfg(target_arch = "x86_64")]
pub mod host;
pub mod pages;
pub mod system;
pub mod vector;
pub mod watched;

use std::sync::Arc;

use softkvm_engine::cpu::clock::Clock;
use softkvm_engine::cpu::{CodeSize, Cpu};
use softkvm_engine::decode::block;
use softkvm_engine::fault::vector::PF;
use softkvm_engine::memory::nested::{right, NestedPageTable};
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, cr4, efer, gpr, rflags, rights, seg, Segment};
use softkvm_engine::uop::{slot, Exec, Stop};
use softkvm_engine::virt::exits::code;

/// Guest-physical addresses of the parts of RAM; linear addresses are the same up to `RAM_SIZE`.
pub const RAM_SIZE: usize = 4 << 20;
const TABLES: u64 = 0x20_0000;
pub const CODE: u64 = 0x8000;
pub const STACK_TOP: u64 = 0x8_0000;
/// RAM for data; in 64-bit mode also mapped at its host address, see [`Machine::data`].
pub const DATA: u64 = 0x10_0000;
pub const DATA_SIZE: usize = 0x4000;

const PAGE: u64 = 4096;

/// The default model with the instructions of other parts.
pub fn every_instruction() -> Model {
    let missing = ["sha-ni"];
    Model::new("cascadelake", &missing.map(|name| (name.to_owned(), true))).expect("implemented features")
}
const PRESENT_WRITABLE_USER_DIRTY: u64 = 0x67;
const WRITABLE: u64 = 2;
const USER: u64 = 4;

/// One CPU with 4 MB of RAM, flat segments and CPL 0.
pub struct Machine {
    pub cpu: Box<Cpu>,
    ram: Arc<Region>,
    next_table: u64,
}

/// The exception that a CPU left its guest for: vector, error code, and the address of a page fault; `None` for another exit.
pub fn intercepted(cpu: &Cpu) -> Option<(u8, u32, u64)> {
    let (exit, amd) = (&cpu.exit, cpu.model.is_amd());
    let exception = if amd { code::EXCEPTION.svm..code::EXCEPTION.svm + 32 } else { code::EXCEPTION.vmx..code::EXCEPTION.vmx + 1 };
    if !exception.contains(&exit.reason) {
        return None;
    }
    let (vector, error, address) = match amd {
        true => ((exit.reason - code::EXCEPTION.svm) as u8, exit.qualification as u32, exit.info2),
        false => (exit.interruption as u8, exit.interruption_error, exit.qualification),
    };
    Some((vector, error, if vector == PF { address } else { 0 }))
}

impl Machine {
    /// 64-bit mode with paging. RAM is identity-mapped in 4 KB pages with every right but no-execute.
    pub fn new() -> Self {
        Self::with_size(CodeSize::Bits64)
    }

    /// 64-bit mode as [`Machine::new`], 32-bit protected mode without paging, or real mode.
    pub fn with_size(size: CodeSize) -> Self {
        Self::build(every_instruction(), size)
    }

    /// 64-bit mode as [`Machine::new`] on a CPU of `model`.
    pub fn with_model(model: Model) -> Self {
        Self::build(model, CodeSize::Bits64)
    }

    fn build(model: Model, size: CodeSize) -> Self {
        let ram = Arc::new(Region::new(RAM_SIZE).expect("a memfd"));
        let npt = NestedPageTable::default();
        npt.map(0, RAM_SIZE as u64, &ram, 0, right::READ | right::WRITE | right::EXECUTE).expect("an aligned range");
        let mut cpu = Cpu::new(Arc::new(model), Clock::default());
        cpu.npt = Arc::new(npt);
        let mut machine = Machine { cpu, ram, next_table: TABLES + PAGE };
        machine.set_mode(size);
        machine.cpu.set_gpr(gpr::RSP, if size == CodeSize::Bits16 { 0x7000 } else { STACK_TOP });
        machine
    }

    fn set_mode(&mut self, size: CodeSize) {
        let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED;
        let (wide, limit) = if size == CodeSize::Bits16 { (0, 0xffff) } else { (rights::DB | rights::GRANULARITY, u32::MAX) };
        let state = &mut self.cpu.state;
        for number in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            state.segments[number] = Segment::new(0x10, data | wide, limit, 0);
        }
        let code = data | rights::CODE | if size == CodeSize::Bits64 { rights::LONG | rights::GRANULARITY } else { wide };
        state.segments[seg::CS] = Segment::new(0x08, code, limit, 0);
        state.cr0 = cr0::ET | if size == CodeSize::Bits16 { 0 } else { cr0::PE | cr0::NE };
        state.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        state.xcr0 = 7;
        if size == CodeSize::Bits64 {
            state.cr0 |= cr0::PG | cr0::WP;
            state.cr4 |= cr4::PAE;
            state.cr3 = TABLES;
            state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
            for la in (0..RAM_SIZE as u64).step_by(PAGE as usize) {
                self.map(la, la);
            }
            for offset in (0..DATA_SIZE as u64).step_by(PAGE as usize) {
                self.map(self.data() + offset, DATA + offset);
            }
        }
        self.cpu.refresh();
    }

    /// Maps the page of linear address `la` to guest-physical `gpa`.
    pub fn map(&mut self, la: u64, gpa: u64) {
        self.set_entry(la, gpa | PRESENT_WRITABLE_USER_DIRTY);
    }

    /// [`Machine::map`] without the right to write.
    pub fn map_read_only(&mut self, la: u64, gpa: u64) {
        self.set_entry(la, gpa | PRESENT_WRITABLE_USER_DIRTY & !WRITABLE);
    }

    /// Maps the page of `la` to itself as a user page with protection key `key`.
    pub fn map_with_key(&mut self, la: u64, key: u64) {
        self.set_entry(la, la | PRESENT_WRITABLE_USER_DIRTY | key << 59);
        self.cpu.tlb.flush();
        self.cpu.refresh_table();
    }

    /// [`Machine::map_with_key`] as a supervisor page.
    pub fn map_supervisor_with_key(&mut self, la: u64, key: u64) {
        self.set_entry(la, la | PRESENT_WRITABLE_USER_DIRTY & !USER | key << 59);
        self.cpu.tlb.flush();
        self.cpu.refresh_table();
    }

    /// Makes the page of linear address `la` not present.
    pub fn unmap(&mut self, la: u64) {
        self.set_entry(la, 0);
        self.cpu.tlb.flush();
        self.cpu.refresh_table();
    }

    fn set_entry(&mut self, la: u64, value: u64) {
        let mut table = TABLES;
        for level in (1..4).rev() {
            let at = table + (la >> (12 + 9 * level) & 511) * 8;
            let mut entry = u64::from_le_bytes(self.bytes(at));
            if entry == 0 {
                assert!(self.next_table < RAM_SIZE as u64, "out of room for page tables");
                entry = self.next_table | PRESENT_WRITABLE_USER_DIRTY;
                self.next_table += PAGE;
                self.poke(at, &entry.to_le_bytes());
            }
            table = entry & !(PAGE - 1);
        }
        self.poke(table + (la >> 12 & 511) * 8, &value.to_le_bytes());
    }

    /// Linear address of `DATA` that means the same memory to the guest and to the host.
    pub fn data(&self) -> u64 {
        self.ram.start() as u64 + DATA
    }

    /// Writes guest-physical memory.
    pub fn poke(&mut self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= RAM_SIZE);
        // SAFETY: inside the region, by the test above.
        unsafe { self.ram.start().add(gpa as usize).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    /// Guest-physical memory in place.
    pub fn slice(&mut self, gpa: u64, length: usize) -> &mut [u8] {
        assert!(gpa as usize + length <= RAM_SIZE);
        // SAFETY: inside the region, by the test above; the CPU, which writes it too, is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.ram.start().add(gpa as usize), length) }
    }

    /// Reads guest-physical memory.
    pub fn peek(&self, gpa: u64, length: usize) -> Vec<u8> {
        assert!(gpa as usize + length <= RAM_SIZE);
        let mut bytes = vec![0; length];
        // SAFETY: inside the region, by the test above.
        unsafe { self.ram.start().add(gpa as usize).copy_to(bytes.as_mut_ptr(), length) };
        bytes
    }

    /// Reads an array of guest-physical memory.
    pub fn bytes<const N: usize>(&self, gpa: u64) -> [u8; N] {
        self.peek(gpa, N).try_into().expect("as long as asked")
    }

    /// Puts `code` at [`CODE`] and RIP there.
    pub fn load(&mut self, code: &[u8]) {
        self.poke(CODE, code);
        self.set_rip(CODE);
    }

    pub fn set_rip(&mut self, rip: u64) {
        self.cpu.regs[slot::RIP as usize] = rip;
    }

    /// Runs the instruction at RIP and moves RIP as the dispatcher does. Faults and exits are not delivered but returned.
    pub fn step(&mut self) -> Exec {
        let block = block::decode(&mut self.cpu)?;
        let uop = block.uops[0];
        match block.reference[0](&mut self.cpu, &uop) {
            Ok(()) | Err(Stop::Leave) => {
                let next = self.cpu.rip_at(uop.next_offset());
                self.cpu.set_rip(next);
                Ok(())
            }
            Err(Stop::Next) => Ok(()),
            Err(stop) => Err(stop),
        }
    }

    /// [`Machine::step`], again while the instruction asks to be continued.
    pub fn finish(&mut self) -> Exec {
        loop {
            match self.step() {
                Err(Stop::Again) => {}
                other => return other,
            }
        }
    }

    /// Loads and runs `count` instructions.
    pub fn run(&mut self, code: &[u8], count: usize) -> Exec {
        self.load(code);
        (0..count).try_for_each(|_| self.finish())
    }

    /// Vector of the exception that the last step raised.
    pub fn vector(&self) -> u8 {
        self.cpu.fault.vector
    }

    /// Sets RFLAGS as a whole.
    pub fn set_flags(&mut self, image: u64) {
        self.cpu.set_rflags(image & rflags::WRITABLE | rflags::FIXED);
    }
}

/// A xorshift generator: the same numbers in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// An operand: often one at which carries, signs and sizes turn.
    pub fn operand(&mut self) -> u64 {
        const CORNERS: [u64; 10] = [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, u64::MAX];
        match self.below(4) {
            0 => CORNERS[self.below(10) as usize].wrapping_add(self.below(3)).wrapping_sub(1),
            1 => self.next() >> self.below(64),
            2 => 1u64.rotate_left(self.below(64) as u32).wrapping_neg(),
            _ => self.next(),
        }
    }
}
