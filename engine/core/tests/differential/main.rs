//! Differential runs: generated instructions on the engine, on the host's CPU and on Unicorn, the whole user-visible state compared. The
//! engine's model is one of the host's vendor; a smaller run compares the other vendor's, which differs where vendors do.
//!
//! `SOFTKVM_DIFFERENTIAL_CASES` sets how many comparisons are made, `SOFTKVM_DIFFERENTIAL_SEED` where the generator starts,
//! `SOFTKVM_DIFFERENTIAL_ONLY` keeps the forms whose name contains it, `SOFTKVM_DIFFERENTIAL_LEDGER` names a file for the counts,
//! `SOFTKVM_DIFFERENTIAL_UNICORN` is the path of libunicorn; without it the host is the only oracle.
#![cfg(target_arch = "x86_64")]

mod arena;
#[path = "../common/mod.rs"]
mod common;
mod encode;
mod explained;
mod forms;
mod guest;
mod host;
mod image;
mod ledger;
mod mode;
mod unicorn;
mod values;

use std::time::Instant;

use iced_x86::Code;
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::model::Model;
use softkvm_engine::state::rflags;

use arena::SLOT_OFFSET;
use common::Random;
use encode::Encoded;
use explained::{explain, Case};
use forms::{classify, family, Offers};
use guest::{Guest, FLAGS};
use host::Oracle;
use image::Image;
use ledger::Ledger;
use unicorn::{Outcome, Unicorn};
use values::{aim, Places, Values};

const DEFAULT_CASES: u64 = 200_000;
/// Comparisons with the model of the other vendor.
const OTHER_CASES: u64 = 60_000;
const THREADS: u64 = 2;
/// How often the engine's own tiers are compared too.
const TIERS_EVERY: u64 = 8;
/// States that one encoding runs with.
const STATES: u64 = 8;
/// Unexplained differences that a thread describes in full.
const DESCRIBED: usize = 40;

/// Models of Intel's and of AMD's silicon.
const PARTS: [&str; 2] = ["cascadelake", "epyc"];

/// Which of [`PARTS`] is of the host's vendor.
fn own_part() -> usize {
    let leaf = std::arch::x86_64::__cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    usize::from(["AuthenticAMD", "HygonGenuine"].iter().any(|amd| amd.as_bytes() == vendor))
}

/// The model with everything that the engine implements, but for what makes no difference to the code of a Linux process.
fn model(part: &str) -> Model {
    let everything: Vec<_> = Model::feature_names()
        .filter(|name| !["svm", "npt", "nrip-save", "tsc-scale", "la57"].contains(name))
        .map(|name| (name.to_owned(), true))
        .collect();
    Model::new(part, &everything).expect("names of features that the engine implements")
}

/// The CPUs and what feeds them.
struct Bench {
    oracle: Oracle,
    unicorn: Option<Unicorn>,
    guest: Guest,
    /// Runs blocks as host code.
    translated: Guest,
    places: Places,
    values: Values,
    random: Random,
    image: Image,
    ledger: Ledger,
}

impl Bench {
    fn new(part: &str, size: CodeSize, number: u16, seed: u64) -> Self {
        let mut oracle = Oracle::new(size, number);
        let mut guest = Guest::new(model(part), oracle.mode());
        let translated = Guest::new(model(part), oracle.mode()).translated();
        let unicorn = setting("UNICORN").and_then(|path| Unicorn::new(&path, oracle.mode()));
        let places = Places::new(oracle.mode());
        let mut random = Random::new(seed);
        oracle.data().iter_mut().for_each(|byte| *byte = random.next() as u8);
        guest.data().copy_from_slice(oracle.data());
        Bench {
            oracle,
            unicorn,
            guest,
            translated,
            places,
            values: Values::new(places),
            random,
            image: Image::default(),
            ledger: Ledger::default(),
        }
    }

    /// Compares one encoding of `code` with several states.
    fn form(&mut self, code: Code) {
        let Some(mut encoded) = encode::encode(code, self.places.mode.bits(), self.places.slot, &mut self.random) else {
            self.ledger.unreached.insert(format!("{code:?}"));
            return;
        };
        aim(&mut encoded, &self.places, &mut self.random);
        self.oracle.load(&encoded.bytes);
        self.guest.load(&encoded.bytes);
        if let Some(unicorn) = &mut self.unicorn {
            unicorn.load(&encoded.bytes);
        }
        for _ in 0..STATES {
            self.values.fill(&encoded.insn, &mut self.image, self.oracle.data(), &mut self.random);
            self.guest.data().copy_from_slice(self.oracle.data());
            self.compare(&encoded);
        }
    }

    fn compare(&mut self, encoded: &Encoded) {
        let before = self.image;
        let (mut host, mut engine) = (before, before);
        if self.random.below(TIERS_EVERY) == 0 {
            self.compare_tiers(encoded);
        }
        self.guest.run(&mut engine);
        let apart = engine.fault.map_or_else(|| self.oracle.hides(engine.rip), |fault| self.oracle.is_stub(&fault));
        if apart {
            return;
        }
        let second = self.ask_unicorn(encoded, &before, &engine);
        self.oracle.run(&mut host);
        host.rflags &= FLAGS;
        engine.rflags &= FLAGS;
        let code = encoded.insn.code();
        let counts = self.ledger.families.entry(family(code)).or_default();
        counts.forms.insert(code as usize);
        counts.compared += 1;
        let key = (family(code), format!("{:?}", code.mnemonic()).to_lowercase());
        let instruction = self.ledger.instructions.entry(key).or_default();
        instruction.by_size[self.places.mode.size as usize] += 1;
        instruction.faults += u64::from(host.fault.is_some());
        if let Some(fault) = host.fault {
            counts.faults += 1;
            *self.ledger.vectors.entry(fault.vector).or_default() += 1;
        }
        let same_memory = self.oracle.data() == self.guest.data();
        if host != engine || !same_memory {
            let case = Case { encoded, before: &before, engine: &engine, host: &host, same_memory };
            match explain(&case) {
                Some(reason) => {
                    let entry = self.ledger.explained.entry(reason.name).or_default();
                    entry.0 += 1;
                    entry.1.insert(format!("{:?}", encoded.insn.mnemonic()));
                }
                None => self.note(&case),
            }
        } else if let Some(outcome) = second.filter(|_| host.fault.is_none()) {
            counts.unicorn[outcome as usize] += 1;
            instruction.unicorn_differs += u64::from(outcome == Outcome::Differs);
        }
        self.image = host;
    }

    /// What Unicorn makes of the case, of which the engine has made `engine`; `None` where it is no authority.
    fn ask_unicorn(&mut self, encoded: &Encoded, before: &Image, engine: &Image) -> Option<Outcome> {
        let unicorn = self.unicorn.as_mut()?;
        if engine.fault.is_some() || !unicorn::knows(&encoded.insn) || !unicorn::knows_state(engine) {
            return None;
        }
        Some(unicorn.compare(encoded, before, self.oracle.data(), engine, self.guest.data()))
    }

    /// Compares the ways in which the engine runs an instruction, as far as a block of more instructions allows.
    fn compare_tiers(&mut self, encoded: &Encoded) {
        let mut reference = self.image;
        self.guest.run(&mut reference);
        let memory = self.guest.data().to_vec();
        self.guest.data().copy_from_slice(self.oracle.data());
        let (slot, rip) = (self.places.slot, reference.rip);
        let gone = reference.fault.is_none() && (self.oracle.hides(rip) || rip.abs_diff(slot) > SLOT_OFFSET as u64);
        if gone || reference.rflags & rflags::TF != 0 {
            return;
        }
        reference.rflags &= FLAGS;
        self.translated.load(&encoded.bytes);
        for (tier, guest) in [("block", &mut self.guest), ("host code", &mut self.translated)] {
            let mut other = self.image;
            guest.data().copy_from_slice(self.oracle.data());
            guest.run_block(&mut other);
            other.rflags &= FLAGS;
            self.ledger.tiers += 1;
            if other != reference || memory != guest.data() {
                let text = format!("{:02x?}: reference and {tier} differ: {:?}", encoded.bytes, reference.differences(&other));
                self.ledger.unexplained_count += 1;
                self.ledger.unexplained.push(text);
            }
        }
        self.guest.data().copy_from_slice(self.oracle.data());
    }

    fn note(&mut self, case: &Case) {
        self.ledger.unexplained_count += 1;
        let name = format!("{:?} ", case.encoded.insn.code());
        if self.ledger.unexplained.len() >= DESCRIBED || self.ledger.unexplained.iter().filter(|text| text.starts_with(&name)).count() > 1 {
            return;
        }
        let places: Vec<_> = (0..arena::DATA_SIZE).filter(|n| self.oracle.data()[*n] != self.guest.data()[*n]).collect();
        let memory: Vec<_> = places.iter().map(|n| (*n, self.guest.data()[*n], self.oracle.data()[*n])).take(16).collect();
        let fault = case.host.fault;
        let inputs = case.before.differences(&Image::default());
        let text = format!(
            "{name}{:?} {:02x?}\n  differs (name, engine, host): {:?}\n  memory (place, engine, host): {memory:x?}\n  host fault {fault:x?}, before: {inputs:?}, flags {:#x}",
            self.places.mode.size,
            case.encoded.bytes,
            case.engine.differences(case.host),
            case.before.rflags,
        );
        self.ledger.unexplained.push(text);
    }
}

/// Runs `cases` comparisons with the model of `part` over all forms of code of `size`, at places of their own.
fn run(part: &str, size: CodeSize, number: u16, seed: u64, cases: u64, only: &str) -> Ledger {
    let offers = Offers::new(model(part));
    let mut bench = Bench::new(part, size, number, seed);
    let mut forms = Vec::new();
    for code in Code::values() {
        match classify(code, size, &offers) {
            Some(Ok(())) if format!("{code:?}").contains(only) => forms.push(code),
            Some(Err(reason)) => {
                bench.ledger.left.entry(reason).or_default().insert(format!("{code:?}"));
            }
            _ => {}
        }
    }
    while bench.ledger.compared() < cases && !forms.is_empty() {
        for code in &forms {
            bench.form(*code);
        }
        if bench.ledger.compared() == 0 {
            break;
        }
    }
    let reached: Vec<_> = bench.ledger.families.values().flat_map(|family| family.forms.iter().copied()).collect();
    bench.ledger.unreached.retain(|name| !reached.iter().any(|code| format!("{:?}", Code::try_from(*code).expect("a code")) == *name));
    bench.ledger
}

fn setting(name: &str) -> Option<String> {
    std::env::var(format!("SOFTKVM_DIFFERENTIAL_{name}")).ok()
}

fn number(name: &str, default: u64) -> u64 {
    setting(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("SOFTKVM_DIFFERENTIAL_{name} is not a number: {text}")))
}

/// Sizes of code and how many of ten comparisons each gets.
const SIZES: [(CodeSize, u64); 3] = [(CodeSize::Bits64, 6), (CodeSize::Bits32, 2), (CodeSize::Bits16, 2)];

/// Compares the model of `part` in code of all sizes; threads have numbers from `first` on.
fn run_all(part: &str, first: u16, seed: u64, cases: u64, only: &str) -> Ledger {
    let mut ledger = Ledger::default();
    for (size, tenths) in SIZES {
        let share = cases * tenths / 10 / THREADS;
        std::thread::scope(|scope| {
            let start =
                |n: u64| scope.spawn(move || run(part, size, first + n as u16, seed.wrapping_mul(THREADS).wrapping_add(n), share, only));
            let threads: Vec<_> = (0..THREADS).map(start).collect();
            threads.into_iter().for_each(|thread| ledger.merge(thread.join().expect("a comparison panicked")));
        });
    }
    assert!(ledger.compared() > 0, "no form is called {only}");
    ledger
}

fn check(ledger: &Ledger, seed: u64) {
    let texts = ledger.unexplained.join("\n");
    assert_eq!(ledger.unexplained_count, 0, "unexplained differences, seed {seed}:\n{texts}");
}

#[test]
fn generated_instructions_match_the_host() {
    let (cases, seed) = (number("CASES", DEFAULT_CASES), number("SEED", 1));
    let only = setting("ONLY").unwrap_or_default();
    let part = PARTS[own_part()];
    let start = Instant::now();
    let ledger = run_all(part, 0, seed, cases, &only);
    if only.is_empty() {
        ledger.check_unicorn();
    }
    let table = ledger.table(part, seed, start.elapsed().as_secs_f64());
    if let Some(path) = setting("LEDGER") {
        std::fs::write(&path, &table).unwrap_or_else(|error| panic!("cannot write {path}: {error}"));
    }
    println!("{table}never encoded: {:?}", ledger.unreached);
    check(&ledger, seed);
}

/// The reasons tell what AMD's silicon does where Intel's model does something else; so there is nothing to hold AMD's model against on an
/// Intel host.
#[test]
fn the_other_vendors_silicon_differs_where_vendors_do() {
    if PARTS[own_part()] == "cascadelake" {
        return;
    }
    let (seed, only) = (number("SEED", 1), setting("ONLY").unwrap_or_default());
    let ledger = run_all(PARTS[1 - own_part()], THREADS as u16, seed, OTHER_CASES, &only);
    check(&ledger, seed);
}
