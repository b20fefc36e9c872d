//! Writes the tables of the user worlds from what the host's CPU does.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use iced_x86::{Code, Instruction};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::rflags;

use super::common::Random;
use super::encode::{self, Encoded};
use super::explained::undefined;
use super::forms::{classify, family, Offers};
use super::guest::{Guest, FLAGS};
use super::host::Oracle;
use super::image::Image;
use super::table::{items, State};
use super::user::{mode, model, to_memory, WORLDS};
use super::values::{aim, Places, Values};

const ATTEMPTS: usize = 40;
/// Where the stack is unless a case asks for something else.
const STACK: u64 = 0x800;

struct Writer {
    oracle: Oracle,
    guest: Guest,
    places: Places,
    values: Values,
    random: Random,
}

impl Writer {
    fn new(size: CodeSize) -> Self {
        let places = Places::new(mode(size));
        Writer {
            oracle: Oracle::new(size, 0),
            guest: Guest::new(model(), mode(size)),
            places,
            values: Values::new(places),
            random: Random::new(20),
        }
    }

    /// A line for `code`; where the engine and the host disagree for a reason that is known, another one is tried.
    fn line(&mut self, code: Code, faulting: bool) -> Option<String> {
        (0..ATTEMPTS).find_map(|_| {
            let mut encoded = encode::encode(code, self.places.mode.bits(), self.places.slot, &mut self.random)?;
            aim(&mut encoded, &self.places, &mut self.random);
            self.attempt(&encoded, faulting)
        })
    }

    fn attempt(&mut self, encoded: &Encoded, faulting: bool) -> Option<String> {
        let mut image = Image::default();
        image.gpr[4] = self.places.stack + STACK;
        self.oracle.data().fill(0);
        self.values.fill(&encoded.insn, &mut image, self.oracle.data(), &mut self.random);
        image.area.unused.fill(0);
        self.guest.data().copy_from_slice(self.oracle.data());
        let before = State { image, memory: to_memory(self.oracle.data()), ..State::default() };
        self.oracle.load(&encoded.bytes);
        self.guest.load(&encoded.bytes);
        let (mut host, mut engine) = (image, image);
        self.guest.run(&mut engine);
        if engine.fault.is_some() != faulting || engine.fault.is_none() && self.oracle.hides(engine.rip) {
            return None;
        }
        self.oracle.run(&mut host);
        let unknown = undefined(&encoded.insn, &image) | if shifts_too_far(&encoded.insn, &engine, &host) { rflags::ARITHMETIC } else { 0 };
        for side in [&mut host, &mut engine] {
            side.rflags = side.rflags & FLAGS & !unknown | image.rflags & !(FLAGS & !unknown);
        }
        if host != engine || self.oracle.data() != self.guest.data() {
            return None;
        }
        let after = State { image: host, memory: to_memory(self.oracle.data()), ..State::default() };
        Some(self.format(encoded, &before, &after, unknown))
    }

    fn format(&self, encoded: &Encoded, before: &State, after: &State, unknown: u64) -> String {
        let start = State::default();
        let mut text = encoded.bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        write!(text, " | {} | {}", items(&start, before), items(before, after)).expect("a string takes it");
        let end = self.places.slot + if after.image.fault.is_none() { encoded.bytes.len() as u64 } else { 0 };
        if after.image.rip != end {
            write!(text, " rip={:x}", after.image.rip).expect("a string takes it");
        }
        if unknown != 0 {
            write!(text, " flags~={unknown:x}").expect("a string takes it");
        }
        text
    }
}

/// A count beyond the operand leaves more undefined than flags, which shows as a difference.
fn shifts_too_far(insn: &Instruction, engine: &Image, host: &Image) -> bool {
    matches!(insn.mnemonic(), iced_x86::Mnemonic::Shld | iced_x86::Mnemonic::Shrd) && engine.gpr == host.gpr && engine.rflags != host.rflags
}

/// Writes the tables of all user worlds to `folder`: a state and a fault of each 64-bit form, two of integer ones; and a state of each smaller
/// form of the integer and x87 instructions, whose operands and addresses have other sizes there.
pub fn write(folder: &Path) {
    for (world, size) in WORLDS {
        let mut writer = Writer::new(size);
        let offers = Offers::new(model());
        let mut tables: BTreeMap<&str, String> = BTreeMap::new();
        for code in Code::values() {
            let family = family(code);
            let wide = size == CodeSize::Bits64;
            if classify(code, size, &offers) != Some(Ok(())) || !wide && !["integer", "x87"].contains(&family) {
                continue;
            }
            let table = tables.entry(family).or_default();
            let wanted: &[bool] = match (wide, family) {
                (true, "integer") => &[false, false, true],
                (true, _) => &[false, true],
                (false, _) => &[false],
            };
            let lines: Vec<_> = wanted.iter().filter_map(|faulting| writer.line(code, *faulting)).collect();
            if !lines.is_empty() {
                writeln!(table, "# {code:?}\n{}", lines.join("\n")).expect("a string takes it");
            }
        }
        for (family, text) in tables {
            let name = family.to_lowercase().replace(", ", "-").replace(' ', "-");
            let path = folder.join(format!("{world}-{name}.ins"));
            std::fs::write(&path, format!("# {family}, from the host's CPU\n@world {world}\n{text}")).expect("the folder can be written");
        }
    }
}
