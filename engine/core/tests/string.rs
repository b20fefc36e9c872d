//! String instructions against the host's CPU, and their behaviour at faults and between pieces.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Registers};
use common::{Machine, Random, CODE, DATA};
use softkvm_engine::cpu::{pending, CodeSize};
use softkvm_engine::fault::vector;
use softkvm_engine::state::{gpr, rflags};
use softkvm_engine::uop::Stop;

/// MOVS, STOS, LODS, CMPS, SCAS of bytes; wide forms are one more.
const OPCODES: [u8; 5] = [0xa4, 0xaa, 0xac, 0xa6, 0xae];
const ROUNDS: usize = 12;

fn string_registers(both: &mut Comparison) -> Registers {
    let mut registers = both.registers();
    let data = both.machine.data();
    registers.gpr[gpr::RSI] = data + 0x1800 + both.random.below(0x400);
    registers.gpr[gpr::RDI] = match both.random.below(3) {
        0 => registers.gpr[gpr::RSI] + both.random.below(24),
        1 => registers.gpr[gpr::RSI] - both.random.below(24),
        _ => data + 0x1800 + both.random.below(0x400),
    };
    registers.gpr[gpr::RCX] = both.random.below(0x200) >> both.random.below(9);
    registers
}

fn check_all(both: &mut Comparison, opcode: u8, prefixes: &[u8]) {
    for (size, wide) in [(None, 0), (None, 1), (Some(0x66), 1), (Some(0x48), 1)] {
        for _ in 0..ROUNDS {
            for direction in [0, rflags::DF] {
                let mut registers = string_registers(both);
                registers.rflags |= direction;
                let mut code = prefixes.to_vec();
                code.extend(size);
                code.push(opcode + wide);
                // Few values, so that comparisons go on for a while.
                let rare = both.random.below(200) + 2;
                let image: Vec<u8> = (0..common::DATA_SIZE).map(|_| u8::from(both.random.below(rare) == 0)).collect();
                registers.gpr[gpr::RAX] = both.random.below(2);
                both.check_with_data(&code, registers, u64::MAX, &image);
            }
        }
    }
}

#[test]
fn once() {
    let mut both = Comparison::new(40);
    OPCODES.into_iter().for_each(|opcode| check_all(&mut both, opcode, &[]));
}

#[test]
fn repeated_while_equal() {
    let mut both = Comparison::new(41);
    OPCODES.into_iter().for_each(|opcode| check_all(&mut both, opcode, &[0xf3]));
}

#[test]
fn repeated_while_not_equal() {
    let mut both = Comparison::new(42);
    [0xa6, 0xae].into_iter().for_each(|opcode| check_all(&mut both, opcode, &[0xf2]));
}

#[test]
fn no_repetition_touches_nothing() {
    let mut machine = Machine::new();
    machine.set_flags(rflags::ARITHMETIC);
    machine.cpu.set_gpr(gpr::RSI, 1 << 60);
    machine.cpu.set_gpr(gpr::RDI, 1 << 60);
    for opcode in OPCODES {
        machine.run(&[0xf3, opcode], 1).unwrap();
    }
    assert_eq!(machine.cpu.rflags() & rflags::ARITHMETIC, rflags::ARITHMETIC);
}

#[test]
fn a_fault_in_the_middle_leaves_the_registers_there() {
    let mut machine = Machine::new();
    machine.unmap(DATA + 0x2000);
    machine.cpu.set_gpr(gpr::RSI, DATA + 0x800);
    machine.cpu.set_gpr(gpr::RDI, DATA + 0x1004);
    machine.cpu.set_gpr(gpr::RCX, 0x400);
    assert_eq!(machine.run(&[0xf3, 0x48, 0xa5], 1), Err(Stop::Fault));
    // The element that crosses into the missing page is not moved.
    assert_eq!((machine.vector(), machine.cpu.fault.payload), (vector::PF, DATA + 0x2000));
    assert_eq!(machine.cpu.gpr(gpr::RDI), DATA + 0x1ffc);
    assert_eq!(machine.cpu.gpr(gpr::RCX), 0x400 - 0x1ff);
    assert_eq!(machine.cpu.gpr(gpr::RSI), DATA + 0x800 + 0xff8);
    assert_eq!(machine.cpu.rip(), CODE);
}

#[test]
fn work_per_call_is_bounded() {
    let mut machine = Machine::new();
    machine.load(&[0xf3, 0xaa]);
    machine.cpu.set_gpr(gpr::RDI, DATA);
    machine.cpu.set_gpr(gpr::RCX, 0x3000);
    assert_eq!(machine.step(), Err(Stop::Again));
    assert_eq!((machine.cpu.gpr(gpr::RCX), machine.cpu.gpr(gpr::RDI)), (0x2000, DATA + 0x1000));
    machine.finish().unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RCX), 0);
}

#[test]
fn one_element_at_a_time_while_emulated_or_stepped() {
    for reason in [pending::EMULATE, pending::STEP] {
        let mut machine = Machine::new();
        machine.load(&[0xf3, 0xab]);
        machine.cpu.set_gpr(gpr::RDI, DATA);
        machine.cpu.set_gpr(gpr::RCX, 2);
        machine.cpu.pending |= reason;
        assert_eq!(machine.step(), Err(Stop::Again));
        assert_eq!((machine.cpu.gpr(gpr::RCX), machine.cpu.gpr(gpr::RDI)), (1, DATA + 4));
        machine.step().unwrap();
        assert_eq!(machine.cpu.rip(), CODE + 2);
    }
}

#[test]
fn narrow_addresses_wrap() {
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.poke(0x8fff, &[0]);
    machine.cpu.set_gpr(gpr::RAX, 0x5a);
    machine.cpu.set_gpr(gpr::RDI, 0xabcd_fffe);
    machine.cpu.set_gpr(gpr::RCX, 0x7777_0003);
    machine.load(&[0xf3, 0xaa]); // rep stosb
    machine.finish().unwrap();
    assert_eq!((machine.cpu.gpr(gpr::RDI), machine.cpu.gpr(gpr::RCX)), (0xabcd_0001, 0x7777_0000));
    assert_eq!((machine.bytes(0xfffe), machine.bytes(0)), ([0x5a, 0x5a], [0x5a, 0]));
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RDI, 0xffff_ffff_0000_0000 | DATA);
    machine.cpu.set_gpr(gpr::RCX, 0xffff_ffff_0000_0010);
    machine.run(&[0x67, 0xf3, 0xaa], 1).unwrap();
    assert_eq!((machine.cpu.gpr(gpr::RDI), machine.cpu.gpr(gpr::RCX)), (DATA + 16, 0));
}

/// The registers that a string instruction moves, and the address of the page fault that ended it.
type Outcome = ([u64; 4], Option<u64>);

fn outcome(machine: &Machine, fault: Option<u64>) -> Outcome {
    ([gpr::RAX, gpr::RCX, gpr::RSI, gpr::RDI].map(|number| machine.cpu.gpr(number)), fault)
}

/// Runs the instruction at RIP one element at a time.
fn by_elements(machine: &mut Machine) -> Outcome {
    loop {
        machine.cpu.pending |= pending::STEP;
        match machine.step() {
            Err(Stop::Again) => {}
            Err(Stop::Fault) => return outcome(machine, Some(machine.cpu.fault.payload)),
            done => {
                done.unwrap();
                return outcome(machine, None);
            }
        }
    }
}

/// Runs it as the dispatcher does, up to the INT3 behind it.
fn by_the_dispatcher(machine: &mut Machine) -> Outcome {
    machine.cpu.control.exception_bitmap = u32::MAX;
    machine.cpu.budget = 1000;
    machine.cpu.run();
    let exit = machine.cpu.exit;
    outcome(machine, (exit.interruption as u8 == vector::PF).then_some(exit.qualification))
}

#[test]
fn many_elements_at_once_do_what_single_ones_do() {
    const SPAN: u64 = 0x4000;
    const UNMAPPED: u64 = DATA + 0x2000;
    let mut random = Random::new(43);
    let machines = |threshold| {
        let mut machine = Machine::new();
        machine.unmap(UNMAPPED);
        machine.cpu.set_translator(threshold);
        machine
    };
    let (mut single, mut others) = (machines(None), [None, Some(1)].map(machines));
    for round in 0..600 {
        let opcode = [0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xa6, 0xa7, 0xae, 0xaf][random.below(9) as usize];
        let size = [None, Some(0x66), Some(0x48)][random.below(3) as usize];
        let code: Vec<u8> = [0xf3].into_iter().chain(size).chain([opcode, 0xcc]).collect();
        let near = |random: &mut Random| DATA + random.below(SPAN - 0x100);
        let source = near(&mut random);
        let target = if random.below(2) == 0 { source.wrapping_add(random.below(40)).wrapping_sub(20) } else { near(&mut random) };
        let count = random.below(0x900) >> random.below(12);
        let flags = rflags::FIXED | if random.below(4) == 0 { rflags::DF } else { 0 };
        let rare = random.below(100) + 2;
        let image: Vec<u8> = (0..SPAN).map(|_| (random.below(rare) == 0).into()).collect();
        let prepare = |machine: &mut Machine| {
            machine.poke(DATA, &image);
            for (number, value) in [(gpr::RAX, 0), (gpr::RCX, count), (gpr::RSI, source), (gpr::RDI, target)] {
                machine.cpu.set_gpr(number, value);
            }
            machine.cpu.set_rflags(flags);
            machine.set_rip(CODE);
        };
        let npt = single.cpu.npt.clone();
        single.cpu.code.clear(&npt.code);
        single.load(&code);
        prepare(&mut single);
        let wanted = (by_elements(&mut single), single.peek(DATA, SPAN as usize), single.cpu.rflags());
        for other in &mut others {
            let npt = other.cpu.npt.clone();
            other.cpu.code.clear(&npt.code);
            other.load(&code);
            // Pages are in the TLB the second time.
            for _ in 0..2 {
                prepare(other);
                let found = (by_the_dispatcher(other), other.peek(DATA, SPAN as usize), other.cpu.rflags());
                assert!(
                    found == wanted,
                    "round {round}: {code:02x?} with {count} at {source:#x}, {target:#x}: {:x?} {:x?}",
                    found.0,
                    wanted.0
                );
            }
        }
    }
}
