//! Fast handlers against the reference: the same random code as blocks of the dispatcher, and one instruction at a time.

mod common;

use common::{Machine, Random, CODE, DATA, STACK_TOP};
use softkvm_engine::state::gpr;
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

const CASES: u64 = 4000;
const HLT: u8 = 0xf4;
/// Exit reasons of the Intel model: exception, HLT.
const EXIT_EXCEPTION: u32 = 0;
const EXIT_HLT: u32 = 12;
const PAGE_FAULT: u32 = 14;
/// Page of data, with a page that is not present behind it.
const LAST_PAGE: u64 = DATA + 0x1000;

/// Opcodes with a ModRM byte that take every general register and memory operand, and whether they take a REX.W prefix.
const PLAIN: [(&[u8], bool); 34] = [
    (&[0x00], false),
    (&[0x01], true),
    (&[0x02], false),
    (&[0x03], true),
    (&[0x09], true),
    (&[0x0b], true),
    (&[0x11], true),
    (&[0x13], true),
    (&[0x19], true),
    (&[0x1b], true),
    (&[0x20], false),
    (&[0x21], true),
    (&[0x23], true),
    (&[0x28], false),
    (&[0x29], true),
    (&[0x2b], true),
    (&[0x31], true),
    (&[0x33], true),
    (&[0x38], false),
    (&[0x39], true),
    (&[0x3a], false),
    (&[0x3b], true),
    (&[0x63], true),
    (&[0x84], false),
    (&[0x85], true),
    (&[0x88], false),
    (&[0x89], true),
    (&[0x8a], false),
    (&[0x8b], true),
    (&[0x0f, 0xaf], true),
    (&[0x0f, 0xb6], true),
    (&[0x0f, 0xb7], true),
    (&[0x0f, 0xbe], true),
    (&[0x0f, 0xbf], true),
];

/// Registers that may change: not RSP, nor RSI and RDI, which address memory.
fn register(random: &mut Random) -> u8 {
    const FREE: [u8; 13] = [0, 1, 2, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15];
    FREE[random.below(13) as usize]
}

/// Prefixes, opcode and operands: register to register, or memory at RSI with or without RDI as index, in DS or GS.
fn with_operands(opcode: &[u8], wide: bool, reg: u8, memory_allowed: bool, random: &mut Random) -> Vec<u8> {
    let mut bytes = Vec::new();
    let memory = memory_allowed && random.below(3) == 0;
    if memory && random.below(4) == 0 {
        bytes.push(0x65);
    }
    if wide && random.below(6) == 0 {
        bytes.push(0x66);
    }
    let rex_w = u8::from(wide && random.below(2) == 0) << 3;
    let rm = register(random);
    let rex = 0x40 | rex_w | (reg >> 3) << 2;
    if !memory {
        bytes.push(rex | rm >> 3);
        bytes.extend_from_slice(opcode);
        bytes.push(0xc0 | (reg & 7) << 3 | rm & 7);
        return bytes;
    }
    bytes.push(rex);
    bytes.extend_from_slice(opcode);
    if random.below(2) == 0 {
        bytes.extend([0x46 | (reg & 7) << 3, random.next() as u8 & 0x3f]);
    } else {
        bytes.extend([0x44 | (reg & 7) << 3, (random.next() as u8 & 0xc0) | 7 << 3 | 6, random.next() as u8 & 0x3f]);
    }
    bytes
}

fn instruction(random: &mut Random) -> Vec<u8> {
    match random.below(12) {
        10 | 11 => branch(random),
        0 => {
            let extension = [0, 1, 4, 5, 7][random.below(5) as usize];
            let mut bytes = with_operands(&[0xc1], true, extension, true, random);
            bytes.push(random.next() as u8);
            bytes
        }
        1 => with_operands(&[[0xd1, 0xd3][random.below(2) as usize]], true, [0, 1, 4, 5, 7][random.below(5) as usize], true, random),
        2 => {
            let mut bytes = with_operands(&[0x83], true, random.below(8) as u8, true, random);
            bytes.push(random.next() as u8);
            bytes
        }
        3 => with_operands(&[[0xf6, 0xf7][random.below(2) as usize]], true, 2 + random.below(4) as u8, true, random),
        4 => with_operands(&[0xff], true, random.below(2) as u8, true, random),
        5 => with_operands(&[0x0f, 0x40 + random.below(16) as u8], true, register(random), true, random),
        6 => with_operands(&[0x0f, 0x90 + random.below(16) as u8], false, 0, true, random),
        7 => match random.below(5) {
            3 => [with_operands(&[0x0f, 0xba], true, 4 + random.below(4) as u8, true, random), vec![random.next() as u8]].concat(),
            4 => [with_operands(&[0x6b], true, register(random), true, random), vec![random.next() as u8]].concat(),
            0 => vec![0x50 + [0, 1, 2, 3, 4, 5][random.below(6) as usize]],
            1 => vec![0x58 + [0, 1, 2, 3, 5][random.below(5) as usize]],
            _ => vec![0x48, 0x8d, 0x44 | (register(random) & 3) << 3, 0xbe, 0x10],
        },
        _ => {
            let (opcode, wide) = PLAIN[random.below(PLAIN.len() as u64) as usize];
            with_operands(opcode, wide, register(random), true, random)
        }
    }
}

/// CMP or TEST, and a conditional branch around INC RAX.
fn branch(random: &mut Random) -> Vec<u8> {
    let form = random.below(3);
    let mut code = match form {
        0 => with_operands(&[[0x38, 0x39, 0x84, 0x85][random.below(4) as usize]], false, register(random), true, random),
        1 => with_operands(&[0x83], true, 7, true, random),
        _ => with_operands(&[0xf6], false, 0, true, random),
    };
    if form != 0 {
        code.push(random.operand() as u8);
    }
    code.extend([0x70 + random.below(16) as u8, 3, 0x48, 0xff, 0xc0]);
    code
}

fn program(random: &mut Random) -> Vec<u8> {
    let mut code: Vec<u8> = (0..1 + random.below(30)).flat_map(|_| instruction(random)).collect();
    code.push(HLT);
    code
}

/// A machine with random registers, flags and data; RSI is near the end of the data.
fn machine(code: &[u8], seed: u64) -> Machine {
    let mut random = Random::new(seed);
    let mut machine = Machine::new();
    machine.unmap(LAST_PAGE + 0x1000);
    machine.load(code);
    let image = random.next();
    machine.set_flags(image & 0x8d5);
    for number in 0..16 {
        machine.cpu.set_gpr(number, random.operand());
    }
    machine.cpu.set_gpr(gpr::RSP, STACK_TOP - random.below(0x20));
    machine.cpu.set_gpr(gpr::RDI, random.below(16));
    machine.cpu.set_gpr(gpr::RSI, LAST_PAGE - 0x80 + random.below(0x100) + if random.below(4) == 0 { 0xf80 } else { 0 });
    machine.cpu.set_segment_base(5, random.below(64));
    for at in (DATA..LAST_PAGE + 0x1000).step_by(8) {
        machine.poke(at, &random.next().to_le_bytes());
    }
    machine
}

/// Runs the program as blocks, up to HLT or a page fault.
fn run_blocks(machine: &mut Machine) {
    let cpu = &mut machine.cpu;
    cpu.control.intercepts |= 1 << intercept::HLT;
    cpu.control.exception_bitmap = u32::MAX;
    cpu.budget = 1000;
    cpu.run();
    match cpu.exit.reason {
        EXIT_HLT => {}
        EXIT_EXCEPTION => assert_eq!(cpu.exit.interruption & 0xff, PAGE_FAULT),
        reason => panic!("unexpected exit {reason}"),
    }
}

/// Runs the program with the reference handlers, up to HLT or a page fault.
fn run_reference(machine: &mut Machine) {
    machine.cpu.control.intercepts |= 1 << intercept::HLT;
    loop {
        match machine.step() {
            Ok(()) => {}
            Err(Stop::Exit) => return assert_eq!(machine.cpu.exit.reason, EXIT_HLT),
            Err(stop) => return assert_eq!((stop, u32::from(machine.vector())), (Stop::Fault, PAGE_FAULT)),
        }
    }
}

#[test]
fn blocks_do_what_single_instructions_do() {
    compare(None);
}

#[test]
fn host_code_does_what_single_instructions_do() {
    compare(Some(1));
}

fn compare(translator: Option<u32>) {
    let mut faults = 0;
    for seed in 0..CASES {
        let code = program(&mut Random::new(seed));
        let (mut fast, mut slow) = (machine(&code, seed), machine(&code, seed));
        fast.cpu.set_translator(translator);
        run_blocks(&mut fast);
        run_reference(&mut slow);
        let view = |machine: &Machine| (machine.cpu.regs[..16].to_vec(), machine.cpu.rip() - CODE, machine.cpu.rflags());
        assert_eq!(view(&fast), view(&slow), "seed {seed}, code {code:02x?}");
        assert_eq!(fast.peek(DATA, 0x2000), slow.peek(DATA, 0x2000), "seed {seed}, code {code:02x?}");
        assert_eq!(fast.peek(STACK_TOP - 0x200, 0x200), slow.peek(STACK_TOP - 0x200, 0x200), "seed {seed}, code {code:02x?}");
        faults += u32::from(fast.cpu.exit.reason != EXIT_HLT);
    }
    assert!(faults > CASES as u32 / 50, "too few programs fault: {faults}");
}
