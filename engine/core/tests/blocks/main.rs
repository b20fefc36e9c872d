//! Blocks in every tier: random programs run by the interpreter and as host code, and compared wherever they exit; and again with an
//! instruction budget that ends at each place of the loop.
//!
//! `SOFTKVM_BLOCKS_CASES` sets how many programs run (`make fuzz`), `SOFTKVM_BLOCKS_SEED` where their numbers start.
#![cfg(target_arch = "x86_64")]

#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code)] // the differential test uses the rest
#[path = "../differential/encode.rs"]
mod encode;
#[allow(dead_code)] // the same
#[path = "../differential/forms.rs"]
mod forms;
mod generate;

use std::sync::Arc;

use common::guest::OwnedBlock;
use common::Random;
use forms::Offers;
use generate::{Forms, Program, ARENA, ARENA_SIZE, CODE, COUNTER, STACK, TABLES, TURNS};
use iced_x86::{Decoder, DecoderOptions};
use softkvm_engine::jit::Tier;
use softkvm_engine::memory::nested::{right, NestedPageTable};
use softkvm_engine::memory::region::Region;
use softkvm_engine::model::Model;
use softkvm_engine::state::{Fpu, State};
use softkvm_engine::virt::control::{intercept, Exit};
use softkvm_engine::virt::entry::Core;

const RAM: usize = 1 << 20;
const PAGE: u64 = 0x1000;
const DEFAULT_CASES: u64 = 600;
const THREADS: u64 = 2;
/// Instructions that nobody looks behind: blocks end where the budget can be met exactly only beyond the longest block.
const MARGIN: u64 = 64;
/// The models of either vendor, and the exit for HLT of each.
const PARTS: [(&str, u64); 2] = [("cascadelake", 12), ("epyc", 0x78)];
/// Place of RIP in the words of a state.
const RIP: usize = std::mem::offset_of!(State, rip) / 8;

fn model(part: &str, tier: Tier) -> Model {
    let everything: Vec<_> = Model::feature_names()
        .filter(|name| !["svm", "npt", "nrip-save", "tsc-scale", "la57"].contains(name))
        .map(|name| (name.to_owned(), true))
        .collect();
    Model::new(part, &everything).expect("names of features that the engine implements").with_tier(tier)
}

/// A core of one tier with a guest's memory.
struct Guest {
    core: Core,
    block: OwnedBlock,
    ram: Arc<Region>,
    npt: Arc<NestedPageTable>,
}

/// What a run leaves behind.
#[derive(PartialEq)]
struct Outcome {
    state: Vec<u64>,
    memory: Vec<u8>,
    exit: [u64; 6],
}

impl Guest {
    fn new(part: &str, tier: Tier, program: &Program) -> Self {
        let ram = Arc::new(Region::new(RAM).expect("a memfd"));
        let npt = NestedPageTable::default();
        npt.map(0, RAM as u64, &ram, 0, right::READ | right::WRITE | right::EXECUTE).expect("an aligned range");
        let core = Core::new(Arc::new(model(part, tier)), 0);
        let mut guest = Guest { core, block: OwnedBlock::new(), ram, npt: Arc::new(npt) };
        for level in 0..3 {
            guest.write(TABLES + level * PAGE, &((TABLES + (level + 1) * PAGE) | 0x67).to_le_bytes());
        }
        for page in [CODE, ARENA, ARENA + PAGE, STACK, COUNTER] {
            guest.write(TABLES + 3 * PAGE + page / PAGE * 8, &(page | 0x67).to_le_bytes());
        }
        guest.write(CODE, &program.bytes());
        guest
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= RAM);
        // SAFETY: inside the region, by the test above, and the guest does not run.
        unsafe { self.ram.start().add(at as usize).copy_from(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, at: u64, bytes: u64) -> Vec<u8> {
        let mut copy = vec![0; bytes as usize];
        // SAFETY: as in `write`.
        unsafe { self.ram.start().add(at as usize).copy_to(copy.as_mut_ptr(), copy.len()) };
        copy
    }

    /// Runs the program for `budget` instructions, or to its end.
    fn run(&mut self, state: &State, operands: &[u8], budget: u64) -> Outcome {
        self.write(ARENA, operands);
        self.write(STACK, &[0; PAGE as usize]);
        self.write(COUNTER, &TURNS.to_le_bytes());
        let block = self.block.get();
        block.state = *state;
        block.control.intercepts = 1 << intercept::HLT;
        block.control.exception_bitmap = u32::MAX;
        block.control.instruction_budget = budget;
        (block.control.tsc_multiplier, block.control.tsc_rate) = (1 << 48, 4);
        // SAFETY: the block is ours and nobody else uses it.
        unsafe { self.core.enter(block, &self.npt) };
        let (state, exit) = (block.state, block.exit);
        let memory = [self.read(ARENA, ARENA_SIZE), self.read(STACK, PAGE), self.read(COUNTER, 4)].concat();
        Outcome { state: words(&state), memory, exit: facts(&exit) }
    }
}

fn facts(exit: &Exit) -> [u64; 6] {
    [
        exit.reason.into(),
        exit.interruption.into(),
        exit.interruption_error.into(),
        exit.qualification,
        exit.instructions,
        exit.instruction_length.into(),
    ]
}

/// The whole state, word by word.
fn words(state: &State) -> Vec<u64> {
    // SAFETY: a plain structure of integers without holes, whose size is a multiple of eight.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(state).cast::<u64>(), size_of::<State>() / 8) }.to_vec()
}

fn listing(program: &Program) -> String {
    let mut text = String::new();
    let code = program.bytes();
    for insn in &mut Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE) {
        let bytes = &code[(insn.ip() - CODE) as usize..][..insn.len()];
        text += &format!("  {:x}: {:?} {bytes:02x?}\n", insn.ip(), insn.code());
    }
    text
}

/// Words of the state that differ.
fn differences(wanted: &Outcome, found: &Outcome) -> Vec<String> {
    let fpu = std::mem::offset_of!(State, fpu);
    let name = |n: usize| match n * 8 {
        offset if offset < 0x80 => format!("gpr {n}"),
        0x80 => "rip".to_owned(),
        0x88 => "rflags".to_owned(),
        offset => match offset.checked_sub(fpu) {
            Some(at) if at >= std::mem::offset_of!(Fpu, vector) => {
                let at = at - std::mem::offset_of!(Fpu, vector);
                format!("vector {} + {}", at / 64, at % 64)
            }
            Some(at) if at >= std::mem::offset_of!(Fpu, st) => {
                let at = at - std::mem::offset_of!(Fpu, st);
                format!("R{} + {}", at / 16, at % 16)
            }
            Some(at) => format!("fpu + {at:#x}"),
            None => format!("state + {offset:#x}"),
        },
    };
    let words = wanted.state.iter().zip(&found.state).enumerate().filter(|(_, (a, b))| a != b);
    words.map(|(n, (a, b))| format!("{}: {a:#x} but {b:#x}", name(n))).collect()
}

/// Input of a comparison.
struct Case {
    part: &'static str,
    state: State,
    operands: Vec<u8>,
}

impl Case {
    /// What interpreter and host code make of `program`, if that differs.
    fn difference(&self, program: &Program, budget: u64) -> Option<(Outcome, Outcome)> {
        let [wanted, found] =
            [Tier::Interpreter, Tier::Translator].map(|tier| Guest::new(self.part, tier, program).run(&self.state, &self.operands, budget));
        (wanted != found).then_some((wanted, found))
    }

    /// Fails with the shortest program that still shows a difference.
    fn fail(&self, seed: u64, mut program: Program, budget: u64) -> ! {
        let mut n = 0;
        while let Some(less) = program.without(n) {
            if self.difference(&less, budget).is_some() {
                program = less;
            } else {
                n += 1;
            }
        }
        let code = listing(&program);
        let Some((wanted, found)) = self.difference(&program, budget) else {
            panic!("{}, seed {seed}, budget {budget}: once only\n{code}", self.part)
        };
        let memory: Vec<_> = (0..wanted.memory.len()).filter(|n| wanted.memory[*n] != found.memory[*n]).take(16).collect();
        panic!(
            "{}, seed {seed}, budget {budget}: interpreter and host code differ: {:#?}\nmemory at {memory:x?}; exits {:x?} and {:x?}\n{code}",
            self.part,
            differences(&wanted, &found),
            wanted.exit,
            found.exit,
        );
    }
}

/// Runs one program in every way, on one vendor's CPU; tells whether it was a long run.
fn check(forms: &Forms, seed: u64) -> bool {
    let (part, hlt) = PARTS[(seed / THREADS % 2) as usize];
    let mut random = Random::new(seed);
    let mut program = generate::program(forms, &mut random);
    let case = Case { part, state: generate::state(&mut random), operands: generate::operands(&mut random) };
    let (mut interpreter, whole) = loop {
        let mut interpreter = Guest::new(part, Tier::Interpreter, &program);
        let whole = interpreter.run(&case.state, &case.operands, 0);
        // What always faults keeps the rest from running: most of it goes.
        if whole.exit[0] == hlt || random.below(12) == 0 || !program.remove(whole.state[RIP].wrapping_sub(CODE)) {
            break (interpreter, whole);
        }
    };
    let mut translator = Guest::new(part, Tier::Translator, &program);
    if translator.run(&case.state, &case.operands, 0) != whole {
        case.fail(seed, program, 0);
    }
    let ran = whole.exit[4];
    for budget in 2 * MARGIN..ran.min(2 * MARGIN + program.length() + 1) {
        if interpreter.run(&case.state, &case.operands, budget) != translator.run(&case.state, &case.operands, budget) {
            case.fail(seed, program, budget);
        }
    }
    ran > 2 * MARGIN
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(format!("SOFTKVM_BLOCKS_{name}")).ok().and_then(|text| text.parse().ok())
}

#[test]
fn host_code_does_what_the_interpreter_does() {
    let (cases, start) = (setting("CASES").unwrap_or(DEFAULT_CASES), setting("SEED").unwrap_or(0));
    let forms = Forms::new(&Offers::new(model(PARTS[0].0, Tier::Interpreter)));
    let long: usize = std::thread::scope(|scope| {
        let forms = &forms;
        let part = |n: u64| scope.spawn(move || (start + n..start + cases).step_by(THREADS as usize).filter(|n| check(forms, *n)).count());
        let threads: Vec<_> = (0..THREADS).map(part).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).sum()
    });
    assert!(long as u64 * 3 > cases, "too many programs fault at once: {long} of {cases} do not");
}
