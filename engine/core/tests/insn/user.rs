//! The worlds `user64`, `user32` and `user16`: a process of Linux, where the host's CPU can be asked too.

use softkvm_engine::cpu::CodeSize;
use softkvm_engine::model::Model;

use super::arena::{arena, DATA_OFFSET, DATA_SIZE};
use super::guest::{Guest, FLAGS};
use super::image::Image;
use super::mode::Mode;
use super::table::{Case, Memory, State};
use super::Tier;

/// The worlds by name.
pub const WORLDS: [(&str, CodeSize); 3] = [("user64", CodeSize::Bits64), ("user32", CodeSize::Bits32), ("user16", CodeSize::Bits16)];

/// The model with everything that the engine implements, but for what is no matter of instructions.
pub fn model() -> Model {
    let everything: Vec<_> = Model::feature_names()
        .filter(|name| !["svm", "npt", "nrip-save", "tsc-scale", "la57"].contains(name))
        .map(|name| (name.to_owned(), true))
        .collect();
    Model::new("cascadelake", &everything).expect("names of features that the engine implements")
}

/// Where code of `size` runs.
pub fn mode(size: CodeSize) -> Mode {
    Mode { size, arena: arena(0), number: 0 }
}

/// Linear address of the operands.
pub fn data() -> u64 {
    arena(0) + DATA_OFFSET
}

/// Memory as a table writes it.
pub fn to_memory(bytes: &[u8]) -> Memory {
    bytes.iter().enumerate().map(|(n, byte)| (data() + n as u64, *byte)).collect()
}

fn from_memory(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; DATA_SIZE];
    for (at, byte) in memory {
        bytes[(at - data()) as usize] = *byte;
    }
    bytes
}

/// Memory for a comparison: what is not in it is zero.
fn used(bytes: &[u8]) -> Memory {
    bytes.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(n, byte)| (data() + n as u64, *byte)).collect()
}

/// What the engine makes of a case, and what the table says.
pub fn run(guest: &mut Guest, mode: Mode, case: &Case, tier: Tier) -> (State, State) {
    guest.data().copy_from_slice(&from_memory(&case.before.memory));
    guest.load(&case.code);
    let mut image: Image = case.before.image;
    match tier {
        Tier::Reference => guest.run(&mut image),
        Tier::Block | Tier::Translated => guest.run_block(&mut image),
    }
    let found = State { image, memory: used(guest.data()), ..State::default() };
    let mut wanted = State { memory: used(&from_memory(&case.after.memory)), ..case.after.clone() };
    let end = if case.after.image.fault.is_some() { mode.slot() } else { mode.slot() + case.code.len() as u64 };
    wanted.image.rip = case.rip.unwrap_or(end);
    (mask(found, case.undefined), mask(wanted, case.undefined))
}

fn mask(mut state: State, undefined: u64) -> State {
    state.image.rflags &= FLAGS & !undefined;
    state
}
