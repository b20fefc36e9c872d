//! The engine's side: the same instruction at the same addresses and in the same segments at CPL 3.

use softkvm_engine::cpu::CodeSize;
use softkvm_engine::decode::block::{self, Block};
use softkvm_engine::jit::Tier;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, cr4, rflags, rights, seg, Segment};
use softkvm_engine::uop::Stop;

use super::arena::{read_only, DATA_OFFSET, DATA_PAGES, DATA_SIZE, READ_ONLY_OFFSET, SLOT_OFFSET, SLOT_PAGE_OFFSET};
use super::common::{intercepted, Machine, CODE, DATA, RAM_SIZE};
use super::image::{Area, Fault, Image};
use super::mode::{Mode, Place, USER_DATA};

const PAGE: u64 = 4096;
const READ_ONLY: u64 = DATA + DATA_SIZE as u64;
const INT3: u8 = 0xcc;
const BP: u8 = 3;
const PF: u8 = 14;
const ERROR_FETCH: u32 = 16;
/// Flags that a comparison looks at.
pub const FLAGS: u64 = rflags::ARITHMETIC | rflags::DF | rflags::NT | rflags::AC | rflags::ID | rflags::IF;

/// A CPU of the engine whose memory looks like the oracle's.
pub struct Guest {
    machine: Machine,
    mode: Mode,
    block: Option<Block>,
}

impl Guest {
    /// A guest in `mode`.
    pub fn new(model: Model, mode: Mode) -> Self {
        let mut machine = Machine::with_model(model);
        for la in (0..RAM_SIZE as u64).step_by(PAGE as usize) {
            machine.unmap(la);
        }
        machine.map_read_only(mode.arena + SLOT_PAGE_OFFSET, CODE);
        let data = mode.arena + DATA_OFFSET;
        for page in 0..DATA_PAGES as u64 {
            machine.map(data + page * PAGE, DATA + page * PAGE);
        }
        machine.map_read_only(data + READ_ONLY_OFFSET, READ_ONLY);
        machine.poke(READ_ONLY, &read_only());
        machine.poke(CODE, &[INT3; PAGE as usize]);
        let state = &mut machine.cpu.state;
        state.segments = segments(mode);
        state.cr0 |= cr0::AM;
        state.cr4 |= cr4::FSGSBASE | cr4::UMIP;
        machine.cpu.refresh();
        Guest { machine, mode, block: None }
    }

    /// The same guest, whose blocks run as host code from their first run on.
    pub fn translated(mut self) -> Self {
        self.machine.cpu.set_translator(Tier::Translator.threshold());
        self
    }

    /// The operands.
    pub fn data(&mut self) -> &mut [u8] {
        self.machine.slice(DATA, DATA_SIZE)
    }

    /// Puts an instruction in place.
    pub fn load(&mut self, code: &[u8]) {
        let mut slot = [INT3; 32];
        slot[..code.len()].copy_from_slice(code);
        self.machine.poke(CODE + SLOT_OFFSET as u64, &slot);
        let npt = self.machine.cpu.npt.clone();
        self.machine.cpu.code.clear(&npt.code);
        self.machine.set_rip(self.mode.slot());
        self.block = block::decode(&mut self.machine.cpu).ok();
    }

    /// Runs the instruction by its reference handler with the registers of `image`, which become those behind it.
    pub fn run(&mut self, image: &mut Image) {
        self.load_registers(image);
        image.fault = self.step();
        self.store_registers(image);
    }

    /// The same as the dispatcher does it, by the handlers of a block or as host code. The block goes on to the next INT3.
    pub fn run_block(&mut self, image: &mut Image) {
        self.load_registers(image);
        let cpu = &mut self.machine.cpu;
        cpu.control.exception_bitmap = u32::MAX;
        cpu.budget = 1000;
        cpu.run();
        cpu.control.exception_bitmap = 0;
        let (vector, error, address) = intercepted(cpu).expect("an exit that is an exception");
        // A branch to where nothing can be fetched has done its work.
        let fetch = vector == PF && error & ERROR_FETCH != 0 && address == self.mode.code().base + cpu.rip();
        image.fault = (vector != BP && !fetch).then_some(Fault { vector, error, address });
        self.store_registers(image);
    }

    fn load_registers(&mut self, image: &Image) {
        let cpu = &mut self.machine.cpu;
        cpu.regs[..16].copy_from_slice(&image.gpr);
        cpu.set_rflags(image.rflags & rflags::WRITABLE | rflags::FIXED);
        image.area.to_fpu(&mut cpu.state.fpu);
        self.machine.set_rip(self.mode.slot());
    }

    fn store_registers(&self, image: &mut Image) {
        let cpu = &self.machine.cpu;
        image.gpr.copy_from_slice(&cpu.regs[..16]);
        image.gpr.iter_mut().for_each(|register| *register &= self.mode.mask());
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
                    let address = if fault.vector == PF { fault.payload } else { 0 };
                    return Some(Fault { vector: fault.vector, error: fault.error.unwrap_or(0), address });
                }
                Err(stop @ (Stop::Exit | Stop::Retry | Stop::Slow)) => panic!("{stop:?} of one instruction without a hypervisor"),
            }
        }
    }
}

/// The segment registers of a Linux process that runs code in `mode`.
fn segments(mode: Mode) -> [Segment; 8] {
    let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | 3 << rights::DPL_SHIFT;
    let flat = data | rights::DB | rights::GRANULARITY;
    let (wide, limit) = match mode.size {
        CodeSize::Bits64 => (rights::LONG | rights::GRANULARITY, u32::MAX),
        CodeSize::Bits32 => (rights::DB | rights::GRANULARITY, u32::MAX),
        CodeSize::Bits16 => (0, 0xffff),
    };
    let segment = |place: Place, access, limit| Segment::new(place.selector, access, limit, place.base);
    let mut segments = [Segment::new(0, rights::UNUSABLE, 0, 0); 8];
    segments[seg::CS] = segment(mode.code(), data | rights::CODE | wide, limit);
    segments[seg::SS] = Segment::new(USER_DATA, flat, u32::MAX, 0);
    for number in [seg::DS, seg::ES] {
        segments[number] = match mode.size {
            CodeSize::Bits64 => Segment::new(0, rights::UNUSABLE, 0, 0),
            CodeSize::Bits32 => segment(mode.data(), flat, limit),
            CodeSize::Bits16 => segment(mode.data(), data, limit),
        };
    }
    segments
}
