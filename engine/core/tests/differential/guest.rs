//! The engine's side: the same instruction at the same addresses at CPL 3.

use softkvm_engine::decode::block::{self, Block};
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, cr4, rflags, rights, seg, Segment};
use softkvm_engine::uop::Stop;

use super::common::{Machine, CODE, DATA, RAM_SIZE};
use super::host::{Oracle, DATA_PAGES, DATA_SIZE, SLOT_OFFSET};
use super::image::{Area, Fault, Image};

const PAGE: u64 = 4096;
const READ_ONLY: u64 = DATA + DATA_SIZE as u64;
/// Selectors that Linux gives a 64-bit process.
const USER_CODE: u16 = 0x33;
const USER_DATA: u16 = 0x2b;
/// Flags that a comparison looks at.
pub const FLAGS: u64 = rflags::ARITHMETIC | rflags::DF | rflags::NT | rflags::AC | rflags::ID | rflags::IF;

/// A CPU of the engine whose memory looks like the oracle's.
pub struct Guest {
    machine: Machine,
    slot: u64,
    block: Option<Block>,
}

impl Guest {
    pub fn new(model: Model, oracle: &Oracle) -> Self {
        let mut machine = Machine::with_model(model);
        for la in (0..RAM_SIZE as u64).step_by(PAGE as usize) {
            machine.unmap(la);
        }
        machine.map_read_only(oracle.slot() & !(PAGE - 1), CODE);
        for page in 0..DATA_PAGES as u64 {
            machine.map(oracle.data_address() + page * PAGE, DATA + page * PAGE);
        }
        machine.map_read_only(oracle.read_only_address(), READ_ONLY);
        machine.poke(READ_ONLY, oracle.read_only());
        let user = 3 << rights::DPL_SHIFT;
        let state = &mut machine.cpu.state;
        for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
            state.segments[number].selector = 0;
        }
        for (number, selector) in [(seg::CS, USER_CODE), (seg::SS, USER_DATA)] {
            let old = state.segments[number];
            state.segments[number] = Segment::new(selector, old.access_rights | user, old.limit, 0);
        }
        state.cr0 |= cr0::AM;
        state.cr4 |= cr4::FSGSBASE | cr4::UMIP;
        machine.cpu.refresh();
        Guest { machine, slot: oracle.slot(), block: None }
    }

    /// The operands.
    pub fn data(&mut self) -> &mut [u8] {
        self.machine.slice(DATA, DATA_SIZE)
    }

    /// Puts an instruction in place.
    pub fn load(&mut self, code: &[u8]) {
        let mut slot = [0xcc; 32];
        slot[..code.len()].copy_from_slice(code);
        self.machine.poke(CODE + SLOT_OFFSET as u64, &slot);
        self.machine.set_rip(self.slot);
        self.block = block::decode(&mut self.machine.cpu).ok();
    }

    /// Runs the instruction with the registers of `image`, which become those behind it.
    pub fn run(&mut self, image: &mut Image) {
        let cpu = &mut self.machine.cpu;
        cpu.regs[..16].copy_from_slice(&image.gpr);
        cpu.set_rflags(image.rflags & rflags::WRITABLE | rflags::FIXED);
        image.area.to_fpu(&mut cpu.state.fpu);
        self.machine.set_rip(self.slot);
        image.fault = self.step();
        let cpu = &self.machine.cpu;
        image.gpr.copy_from_slice(&cpu.regs[..16]);
        image.rip = cpu.rip();
        image.rflags = cpu.rflags();
        image.area = Area::from_fpu(&cpu.state.fpu);
    }

    fn step(&mut self) -> Option<Fault> {
        let block = self.block.as_ref().expect("the slot can be fetched");
        let (uop, run) = (block.uops[0], block.reference[0]);
        let cpu = &mut self.machine.cpu;
        loop {
            match run(cpu, &uop) {
                Ok(()) | Err(Stop::Leave) => {
                    let next = cpu.rip_at(uop.next_offset());
                    cpu.set_rip(next);
                    return None;
                }
                Err(Stop::Next) => return None,
                Err(Stop::Again) => {}
                Err(Stop::Fault) => {
                    let fault = cpu.fault;
                    let address = if fault.vector == 14 { fault.payload } else { 0 };
                    return Some(Fault { vector: fault.vector, error: fault.error.unwrap_or(0), address });
                }
                Err(stop @ (Stop::Exit | Stop::Retry | Stop::Slow)) => panic!("{stop:?} of one instruction without a hypervisor"),
            }
        }
    }
}
