//! Flags that host code makes only where somebody looks: every operation that it can make them again by, with everything that can happen
//! between it and a page fault in a later block, which shows them.
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Machine, Random, CODE, DATA};
use softkvm_engine::state::gpr;

/// Bytes from one program to the next.
const STRIDE: u64 = 64;
/// Turns of a program until it faults.
const TURNS: u64 = 5;
const NOWHERE: u64 = 0x7000_0000;
/// What a program loads over an operand.
const WORD: u64 = DATA + 0x800;

/// ADD, OR, AND, SUB, XOR and CMP by the numbers that they have in their opcodes; TEST is none of these.
const OPERATIONS: [u8; 7] = [0, 1, 4, 5, 6, 7, TEST];
const TEST: u8 = 8;
/// Registers of the two operands; the host has some of these elsewhere or in memory.
const PAIRS: [(u8, u8); 6] = [(0, 3), (1, 1), (5, 13), (8, 14), (15, 2), (6, 0)];

/// An operation on parts of registers `a` and `b` of so many bytes, or on `a` and an immediate.
fn operation(number: u8, bytes: u8, a: u8, b: Option<u8>) -> Vec<u8> {
    let other = b.unwrap_or(0);
    let mut code = if bytes == 2 { vec![0x66] } else { Vec::new() };
    code.push(0x40 | u8::from(bytes == 8) << 3 | (other >> 3) << 2 | a >> 3);
    let wide = u8::from(bytes > 1);
    match (number, b) {
        (TEST, Some(b)) => code.extend([0x84 | wide, 0xc0 | (b & 7) << 3 | a & 7]),
        (TEST, None) => {
            code.extend([0xf6 | wide, 0xc0 | a & 7]);
            code.extend(&0x8000_0081u32.to_le_bytes()[..bytes.min(4) as usize]);
        }
        (_, Some(b)) => code.extend([number << 3 | wide, 0xc0 | (b & 7) << 3 | a & 7]),
        (_, None) => code.extend([0x80 | (3 * wide), 0xc0 | number << 3 | a & 7, 0xfb]),
    }
    code
}

/// MOV register, [WORD].
fn load(register: u8) -> Vec<u8> {
    [&[0x48 | (register >> 3) << 2, 0x8b, 0x04 | (register & 7) << 3, 0x25][..], &(WORD as u32).to_le_bytes()].concat()
}

/// What happens between the operation and the access that faults.
fn middles(a: u8, b: u8) -> Vec<Vec<u8>> {
    vec![
        Vec::new(),
        load(a),
        load(b),
        [load(b), load(a)].concat(),
        vec![0x48 | a >> 3, 0xff, 0xc0 | a & 7],              // inc a
        vec![0x41, 0x0f, 0x92, 0xc3],                         // setc r11b
        vec![0x49, 0x83, 0xd3, 0x00],                         // adc r11, 0
        vec![0x9c, 0x41, 0x5b],                               // pushfq; pop r11
        vec![0x49, 0xd3, 0xe3],                               // shl r11, cl
        vec![0x41, 0x0f, 0x01, 0xe3],                         // smsw r11d, which the interpreter runs
        vec![0x77, 0x02, 0x74, 0x00, 0x4d, 0x0f, 0x4c, 0xd8], // ja behind; je behind; behind: cmovl r11, r8
    ]
}

/// again: the operation; Jcc behind; behind: the middle; mov rdi, [rdi]; jmp again
fn program(operation: &[u8], condition: u8, middle: &[u8]) -> Vec<u8> {
    let mut code = [operation, &[0x70 | condition, 0x00], middle, &[0x48, 0x8b, 0x3f]].concat();
    let back = (code.len() as u8 + 2).wrapping_neg();
    code.extend([0xeb, back]);
    code
}

fn programs() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (number, (a, b)) in OPERATIONS.into_iter().flat_map(|number| PAIRS.map(|pair| (number, pair))) {
        for (bytes, other) in [1, 2, 4, 8].into_iter().flat_map(|bytes| [(bytes, Some(b)), (bytes, None)]) {
            for middle in middles(a, b) {
                all.push(program(&operation(number, bytes, a, other), all.len() as u8 & 15, &middle));
            }
        }
    }
    all
}

/// Runs the program at `at` to its fault: registers, RIP, RFLAGS, instructions.
fn outcome(machine: &mut Machine, at: u64, random: &mut Random) -> (Vec<u64>, u64, u64, u64) {
    for n in (0..16).filter(|n| ![gpr::RSP, gpr::RDI].contains(n)) {
        machine.cpu.set_gpr(n, random.operand());
    }
    machine.cpu.set_gpr(gpr::RDI, DATA);
    machine.set_flags(random.next() & 0x8d5);
    machine.set_rip(at);
    machine.cpu.budget = 1 << 40;
    let before = machine.cpu.instructions();
    machine.cpu.run();
    let registers = (0..16).map(|n| machine.cpu.gpr(n)).collect();
    (registers, machine.cpu.rip(), machine.cpu.rflags(), machine.cpu.instructions() - before)
}

#[test]
fn a_fault_shows_the_flags_that_the_interpreter_has() {
    let programs = programs();
    let mut machines = [None, Some(1)].map(|tier| {
        let mut machine = Machine::new();
        machine.cpu.control.exception_bitmap = u32::MAX;
        machine.cpu.set_translator(tier);
        for turn in 0..TURNS {
            let next = if turn + 1 < TURNS { DATA + 8 * (turn + 1) } else { NOWHERE };
            machine.poke(DATA + 8 * turn, &next.to_le_bytes());
        }
        machine.poke(WORD, &0x8000_0000_7fff_ff80u64.to_le_bytes());
        for (at, code) in (CODE..).step_by(STRIDE as usize).zip(&programs) {
            machine.poke(at, code);
        }
        machine
    });
    for (n, code) in programs.iter().enumerate() {
        for seed in 0..3 {
            let at = CODE + n as u64 * STRIDE;
            let [wanted, found] = machines.each_mut().map(|machine| outcome(machine, at, &mut Random::new(16 * n as u64 + seed)));
            assert_eq!(wanted, found, "program {n}, seed {seed}: {code:02x?}");
        }
    }
    // Most of a program's blocks have one translation for flags in memory, and one for a recipe.
    let translated = machines[1].cpu.translator.as_ref().map_or(0, |translator| translator.translated());
    assert!(translated > 3 * programs.len() as u64, "{translated} translations");
}
