//! Hostile guests: random code, descriptors, page tables and control blocks. Nothing may panic, hang or leave the engine's memory.
//!
//! `SOFTKVM_HOSTILE_CASES` sets how many cases run; a failure prints the seed of its case, which repeats it alone.

mod common;

use std::sync::Arc;

use common::guest::OwnedBlock;
use softkvm_engine::memory::nested::{right, NestedPageTable};
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::pmu::log::Filter;
use softkvm_engine::state::{cr0, cr4, efer, rights, seg, Segment, State};
use softkvm_engine::virt::control::{intercept, Block};
use softkvm_engine::virt::entry::Core;

const RAM: usize = 4 << 20;
const DEFAULT_CASES: u64 = 3000;
/// Exits after which a case has shown enough.
const EXITS: usize = 40;
const INSTRUCTIONS: u64 = 2000;

/// xorshift64*: small, and the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

fn fill_ram(ram: &Region, random: &mut Random) {
    for at in (0..RAM).step_by(8) {
        // Opcodes that exist are dense among small bytes; addresses that hit RAM are small numbers.
        let word = match random.below(4) {
            0 => random.next(),
            1 => random.below(RAM as u64),
            2 => random.next() & 0x0f0f_0f0f_0f0f_0f0f,
            _ => random.below(RAM as u64 >> 12) << 12 | 0x27,
        };
        // SAFETY: inside the region.
        unsafe { ram.start().add(at).cast::<u64>().write(word) };
    }
}

fn segment(random: &mut Random, access_rights: u32) -> Segment {
    let base = if random.chance(4) { random.below(RAM as u64) } else { 0 };
    let limit = if random.chance(4) { random.next() as u32 } else { u32::MAX };
    Segment::new(random.next() as u16, access_rights, limit, base)
}

fn guest_state(random: &mut Random) -> State {
    let mut state = State::default();
    for register in &mut state.gpr {
        *register = if random.chance(2) { random.below(RAM as u64) } else { random.next() };
    }
    let flat = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED | rights::GRANULARITY;
    let dpl = if random.chance(3) { 3 << rights::DPL_SHIFT } else { 0 };
    let mode = random.below(4);
    let width = [0, rights::DB, rights::DB, rights::LONG][mode as usize];
    for number in 0..6 {
        let kind = if number == seg::CS { rights::CODE | width } else { rights::DB };
        state.segments[number] = segment(random, flat | kind | dpl);
    }
    state.segments[seg::TR] = segment(random, rights::PRESENT | 11);
    state.segments[seg::LDTR] = segment(random, rights::PRESENT | 2);
    state.gdtr.limit = 0xffff;
    state.idtr.limit = 0xffff;
    state.gdtr.base = random.below(RAM as u64);
    state.idtr.base = random.below(RAM as u64);
    state.rip = random.below(if mode == 0 { 0x1_0000 } else { RAM as u64 });
    state.rflags = 2 | random.next() & 0x0024_7fd5;
    state.cr0 = cr0::ET | if mode > 0 { cr0::PE } else { 0 } | random.next() & (cr0::TS | cr0::EM | cr0::WP | cr0::NE | cr0::AM);
    state.cr4 = random.next() & (cr4::PSE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::UMIP | cr4::SMEP | cr4::SMAP | cr4::FSGSBASE);
    state.cr3 = random.below(RAM as u64 >> 12) << 12;
    if mode >= 2 {
        state.cr0 |= cr0::PG;
    }
    if mode == 3 {
        state.cr4 |= cr4::PAE;
        state.efer = efer::LME | efer::LMA | efer::SCE | random.next() & efer::NXE;
    }
    state.xcr0 = 3;
    state.fpu.mxcsr = 0x1f80;
    state.fpu.fcw = 0x37f;
    state
}

/// Identity maps the first 2 MB in 4 KB pages at a place of the RAM, so that most long-mode cases execute something.
fn identity_tables(ram: &Region, state: &State) {
    let root = (state.cr3 as usize % (RAM - 0x10000)) & !0xfff;
    let write = |at: usize, value: u64| {
        // SAFETY: `root` leaves room for four tables in the region.
        unsafe { ram.start().add(at).cast::<u64>().write(value) }
    };
    for level in 0..3 {
        write(root + level * 0x1000, (root + (level + 1) * 0x1000) as u64 | 7);
    }
    for page in 0..512u64 {
        write(root + 0x3000 + page as usize * 8, page << 12 | 7);
    }
}

/// Programs the performance monitoring unit, or lets the guest do it: small indices, registers that exist, counters close to overflow.
fn watch(core: &mut Core, block: &mut Block, random: &mut Random) {
    for _ in 0..4 {
        let index = match random.below(4) {
            0 => random.below(0x2000) as u32,
            1 => [0x1d9, 0x1c8, 0x1c9, 0x345, 0x834, 0x49][random.below(6) as usize],
            2 => [0xc1, 0x186, 0x309, 0x38c, 0x4c1][random.below(5) as usize] + random.below(8) as u32,
            _ => 0xc001_0000 + random.below(2) as u32 * 0x200 + random.below(14) as u32,
        };
        let value = match random.below(4) {
            0 => random.next(),
            1 => random.below(64).wrapping_neg() & 0xffff_ffff_ffff,
            2 => 0x53_0000 | random.next() & 0xffff,
            _ => random.next() & 0x7_0000_7fff,
        };
        // A refusal is as good as a change.
        let _refused = core.pmu_write(index, value).is_err() || core.pmu_read(index).is_err();
    }
    block.state.debugctl = random.next() & 0x1803;
    block.control.perf_controls = random.below(4) as u32;
    block.control.guest_perf_global_ctrl = random.next() & 0x7_0000_000f;
    if random.chance(8) {
        core.branch_log_start(random.below(2000) as usize, Filter { rings: random.next() as u8, low: 0, high: random.next() });
    }
}

fn run_case(seed: u64) {
    let mut random = Random(seed | 1);
    let name = if random.chance(2) { "cascadelake" } else { "epyc" };
    let model = Arc::new(Model::new(name, &[]).unwrap());
    let mut core = Core::new(model, 0);
    let ram = Arc::new(Region::new(RAM).unwrap());
    fill_ram(&ram, &mut random);
    let npt = Arc::new(NestedPageTable::default());
    npt.map(0, RAM as u64, &ram, 0, right::READ | right::WRITE | right::EXECUTE).unwrap();
    if random.chance(3) {
        npt.protect(random.below(RAM as u64 >> 12) << 12, 0x1000, random.below(8) as u8).unwrap();
    }
    let mut owned = OwnedBlock::new();
    let block = owned.get();
    block.state = guest_state(&mut random);
    if random.chance(2) {
        block.state.cr3 = block.state.cr3.min(RAM as u64 - 0x10000);
        identity_tables(&ram, &block.state);
    }
    block.control.intercepts = 1 << intercept::HLT | 1 << intercept::IO | 1 << intercept::SHUTDOWN | random.next() & 0x7fff_fffe;
    block.control.intercepts &= !(1 << intercept::PREEMPTION_TIMER);
    block.control.exception_bitmap = if random.chance(4) { random.next() as u32 } else { 0 };
    block.control.tsc_multiplier = 1 << 48;
    for _ in 0..EXITS {
        block.control.instruction_budget = INSTRUCTIONS;
        block.control.emulate = random.below(3) as u32;
        if random.chance(3) {
            block.control.event = random.next() as u32 | 1 << 31;
            block.control.event_error = random.next() as u32;
            block.control.event_instruction_length = random.below(16) as u32;
        }
        if random.chance(2) {
            watch(&mut core, block, &mut random);
        }
        // SAFETY: the block is ours and nobody else uses it.
        let reason = unsafe { core.enter(block, &npt) };
        core.branch_log_read();
        // Skip or wander, as a careless hypervisor would.
        block.state.rip = match random.below(3) {
            0 => block.state.rip.wrapping_add(block.exit.instruction_length.into()),
            1 => random.below(RAM as u64),
            _ => block.state.rip,
        };
        if reason == u32::MAX || reason >> 31 != 0 {
            block.state = guest_state(&mut random);
        }
    }
}

#[test]
fn random_guests_do_no_harm() {
    let single = std::env::var("SOFTKVM_HOSTILE_SEED").ok().and_then(|text| text.parse().ok());
    if let Some(seed) = single {
        return run_case(seed);
    }
    let cases = std::env::var("SOFTKVM_HOSTILE_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_CASES);
    for case in 0..cases {
        let seed = case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let outcome = std::panic::catch_unwind(|| run_case(seed));
        assert!(outcome.is_ok(), "case {case} failed; repeat it with SOFTKVM_HOSTILE_SEED={seed}");
    }
}
