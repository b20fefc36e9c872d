//! Hostile guests: a target for each interface between a guest and the engine. Nothing may panic, hang or leave the engine's memory.
//!
//! Cases that once failed, or reach far, are kept in `tests/hostile/corpus.txt` and run first. `SOFTKVM_HOSTILE_CASES` sets how many new ones
//! run of each target (`make fuzz`), `SOFTKVM_HOSTILE_SEED` where their numbers start. A failure prints the line to keep.

#[path = "../common/mod.rs"]
mod common;
mod generate;

use std::sync::Arc;

use common::guest::OwnedBlock;
use common::Random;
use softkvm_engine::jit::Tier;
use softkvm_engine::memory::nested::{right, NestedPageTable};
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::state::State;
use softkvm_engine::virt::control::intercept;
use softkvm_engine::virt::entry::Core;

const RAM: usize = 2 << 20;
const DEFAULT_CASES: u64 = 400;
/// Exits after which a case has shown enough.
const EXITS: usize = 40;
const INSTRUCTIONS: u64 = 2000;

/// Fills RAM and makes a guest for it.
type Make = fn(&Region, &mut Random) -> State;

/// What a case is about, by name.
const TARGETS: [(&str, Make); 6] = [
    ("anything", |ram, random| {
        generate::noise(ram, random);
        generate::anything(random)
    }),
    ("instructions", generate::instructions),
    ("descriptors", generate::descriptors),
    ("page-tables", generate::page_tables),
    ("control-block", generate::instructions),
    ("host-code", generate::instructions),
];

fn run_case(target: &str, seed: u64) {
    let (_, make) = TARGETS.iter().find(|(name, _)| *name == target).expect("a target's name");
    let mut random = Random::new(seed);
    let name = if random.below(2) == 0 { "cascadelake" } else { "epyc" };
    // What is translated at its first run meets the emitter with anything; elsewhere only what is repeated does.
    let tier = if target == "host-code" { Tier::Translator } else { Tier::Auto };
    let mut core = Core::new(Arc::new(Model::new(name, &[]).unwrap().with_tier(tier)), 0);
    let ram = Arc::new(Region::new(RAM).unwrap());
    let npt = Arc::new(NestedPageTable::default());
    npt.map(0, RAM as u64, &ram, 0, right::READ | right::WRITE | right::EXECUTE).unwrap();
    if random.below(3) == 0 {
        npt.protect(random.below(RAM as u64 >> 12) << 12, 0x1000, random.below(8) as u8).unwrap();
    }
    let mut owned = OwnedBlock::new();
    let block = owned.get();
    block.state = make(&ram, &mut random);
    block.control.intercepts = 1 << intercept::HLT | 1 << intercept::IO | 1 << intercept::SHUTDOWN | random.next() & 0x7fff_fffe;
    block.control.intercepts &= !(1 << intercept::PREEMPTION_TIMER);
    block.control.exception_bitmap = if random.below(4) == 0 { random.next() as u32 } else { 0 };
    block.control.tsc_multiplier = 1 << 48;
    for _ in 0..EXITS {
        block.control.instruction_budget = INSTRUCTIONS;
        block.control.tsc_rate = 4; // a guest that halts unseen does not wait
        block.control.emulate = random.below(3) as u32;
        if random.below(3) == 0 {
            block.control.event = random.next() as u32 | 1 << 31;
            block.control.event_error = random.next() as u32;
            block.control.event_instruction_length = random.below(16) as u32;
        }
        if target == "control-block" {
            generate::spoil(block, &mut random);
            block.control.instruction_budget = INSTRUCTIONS;
            block.control.tsc_rate |= 1;
        }
        if random.below(3) == 0 {
            generate::watch(&mut core, block, &mut random);
        }
        // SAFETY: the block is ours and nobody else uses it.
        let reason = unsafe { core.enter(block, &npt) };
        core.branch_log_read();
        // Skip or wander, as a careless hypervisor would.
        block.state.rip = match random.below(3) {
            0 => block.state.rip.wrapping_add(block.exit.instruction_length.into()),
            1 => generate::CODE + random.below(generate::CODE_SIZE),
            _ => block.state.rip,
        };
        if reason == u32::MAX || reason >> 31 != 0 {
            block.state = make(&ram, &mut random);
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(format!("SOFTKVM_HOSTILE_{name}")).ok().and_then(|text| text.parse().ok())
}

fn check(target: &str, seed: u64) {
    let outcome = std::panic::catch_unwind(|| run_case(target, seed));
    assert!(outcome.is_ok(), "a hostile guest did harm; keep it by this line in tests/hostile/corpus.txt:\n{target} {seed}");
}

#[test]
fn kept_guests_do_no_harm() {
    let corpus = include_str!("../../../../tests/hostile/corpus.txt");
    for line in corpus.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (target, seed) = line.split_once(' ').expect("TARGET SEED");
        check(target, seed.parse().expect("a number"));
    }
}

#[test]
fn random_guests_do_no_harm() {
    let (cases, start) = (setting("CASES").unwrap_or(DEFAULT_CASES), setting("SEED").unwrap_or(0));
    std::thread::scope(|scope| {
        for (target, _) in TARGETS {
            scope.spawn(move || (start..start + cases).for_each(|seed| check(target, seed)));
        }
    });
}
