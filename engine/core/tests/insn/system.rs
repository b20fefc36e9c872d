//! The worlds `system64`, `system32` and `real16`: ring 0 with the descriptor tables of `common/system.rs`; `.user` is ring 3 of them.

use softkvm_engine::cpu::CodeSize;
use softkvm_engine::jit;
use softkvm_engine::state::{rflags, seg};
use softkvm_engine::uop::Stop;

use super::common::{intercepted as exception, Machine, CODE};
use super::image::{Area, Fault, Image};
use super::table::{Case, Memory, State};
use super::Tier;

/// RAM that is compared: all but the page tables.
const RAM: usize = 0x20_0000;
const INT3: u8 = 0xcc;
const BP: u8 = 3;
const PF: u8 = 14;

fn machine(world: &str) -> Machine {
    let (name, user) = world.split_once('.').map_or((world, false), |(name, rest)| (name, rest == "user"));
    let size = match name {
        "system64" => CodeSize::Bits64,
        "system32" => CodeSize::Bits32,
        "real16" => CodeSize::Bits16,
        _ => panic!("there is no world {world}"),
    };
    let mut machine = Machine::system(size);
    if user {
        machine.enter_user();
    }
    machine
}

/// What the engine makes of a case, and what the table says: registers, the selectors that the table names, and the bytes of memory that
/// changed.
pub fn run(case: &Case, tier: Tier) -> (State, State) {
    let mut machine = machine(&case.world);
    machine.load(&case.code);
    for (at, byte) in &case.before.memory {
        machine.poke(*at, &[*byte]);
    }
    let end = if case.after.image.fault.is_some() { CODE } else { CODE + case.code.len() as u64 };
    let rip = case.rip.unwrap_or(end);
    if tier != Tier::Reference && case.after.image.fault.is_none() {
        machine.poke(code_base(case) + rip, &[INT3]);
    }
    let before = machine.peek(0, RAM);
    let mut image = case.before.image;
    load(&mut machine, &image);
    machine.cpu.control.exception_bitmap = u32::MAX;
    image.fault = match tier {
        Tier::Reference => reference(&mut machine),
        Tier::Block => block(&mut machine),
        Tier::Translated => {
            machine.cpu.set_translator(jit::Tier::Translator.threshold());
            block(&mut machine)
        }
    };
    store(&machine, &mut image);
    let after = machine.peek(0, RAM);
    let changed: Memory = (0..RAM).filter(|at| before[*at] != after[*at]).map(|at| (at as u64, after[at])).collect();
    let selectors = case.after.selectors.keys().map(|n| (*n, machine.cpu.state.segments[*n].selector)).collect();
    let found = State { image, selectors, memory: changed };
    let mut wanted = case.after.clone();
    wanted.image.rip = rip;
    wanted.memory.retain(|at, byte| before[*at as usize] != *byte);
    (mask(found, case.undefined), mask(wanted, case.undefined))
}

/// Where the code segment is after the instruction: a far transfer in real mode moves it.
fn code_base(case: &Case) -> u64 {
    let selector = case.after.selectors.get(&seg::CS).filter(|_| case.world == "real16");
    selector.map_or(0, |selector| u64::from(*selector) << 4)
}

fn load(machine: &mut Machine, image: &Image) {
    machine.cpu.regs[..16].copy_from_slice(&image.gpr);
    machine.cpu.set_rflags(image.rflags);
    image.area.to_fpu(&mut machine.cpu.state.fpu);
}

fn store(machine: &Machine, image: &mut Image) {
    image.gpr.copy_from_slice(&machine.cpu.regs[..16]);
    image.rip = machine.cpu.rip();
    image.rflags = machine.cpu.rflags();
    image.area = Area::from_fpu(&machine.cpu.state.fpu);
}

fn reference(machine: &mut Machine) -> Option<Fault> {
    match machine.finish() {
        Ok(()) => None,
        Err(Stop::Fault) => {
            let fault = machine.cpu.fault;
            let address = if fault.vector == PF { fault.payload } else { 0 };
            Some(Fault { vector: fault.vector, error: fault.error.unwrap_or(0), address })
        }
        // A gate refused the instruction's event.
        Err(Stop::Exit) => Some(intercepted(machine)),
        Err(stop) => panic!("{stop:?} of one instruction"),
    }
}

fn block(machine: &mut Machine) -> Option<Fault> {
    machine.cpu.budget = 1000;
    machine.cpu.run();
    Some(intercepted(machine)).filter(|fault| fault.vector != BP)
}

/// The exception that the last exit is for.
fn intercepted(machine: &Machine) -> Fault {
    let Some((vector, error, address)) = exception(&machine.cpu) else {
        panic!("an exit that is no exception, at {:#x}", machine.cpu.rip());
    };
    Fault { vector, error, address }
}

fn mask(mut state: State, undefined: u64) -> State {
    state.image.rflags &= super::guest::FLAGS & !undefined | rflags::VM;
    state
}
