//! x87 instructions against the host's unit: the whole FXSAVE image but the last-instruction pointers, and memory.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Registers};
use common::vector::float80;
use common::{Machine, Random, DATA, DATA_SIZE};
use softkvm_engine::state::gpr;

const STORED: u64 = 0x1000;
const OPERAND: u32 = 0x400;

const FXRSTOR_RSI: [u8; 4] = [0x48, 0x0f, 0xae, 0x0e];
const FXSAVE_RDI: [u8; 4] = [0x48, 0x0f, 0xae, 0x07];
/// Forgets FOP, FIP, FDP and the MXCSR mask, where silicon differs.
const CLEAR_DIFFERENCES: [u8; 29] = [
    0x66, 0xc7, 0x47, 0x06, 0, 0, // mov word [rdi + 6], 0
    0x48, 0xc7, 0x47, 0x08, 0, 0, 0, 0, // mov qword [rdi + 8], 0
    0x48, 0xc7, 0x47, 0x10, 0, 0, 0, 0, // mov qword [rdi + 16], 0
    0xc7, 0x47, 0x1c, 0, 0, 0, 0, // mov dword [rdi + 28], 0
];

/// PUSHFQ; AND WORD [rdi + 2], not C3, C2, C1, C0; POPFQ. Intel silicon leaves the condition bits of an instruction that an unmasked
/// exception stopped, and AMD silicon sets them.
const CLEAR_CONDITIONS: [u8; 8] = [0x9c, 0x66, 0x81, 0x67, 0x02, 0xff, 0xb8, 0x9d];

struct Bench {
    both: Comparison,
    random: Random,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Bench { both: Comparison::new(seed), random: Random::new(seed + 1) }
    }

    /// An image with random registers, tags, TOP, precision, rounding and, for `unmasked`, exception masks.
    fn image(&mut self, unmasked: bool) -> Vec<u8> {
        let mut image: Vec<u8> = (0..DATA_SIZE / 8).flat_map(|_| self.random.operand().to_le_bytes()).collect();
        let random = self.random.next();
        let masks = if unmasked { random as u16 & 0x3f } else { 0x3f };
        let precision = [0, 0x200, 0x300][(random >> 16) as usize % 3];
        let fcw = masks | 0x40 | precision | (random >> 24) as u16 & 0xc00;
        // C0, C1 and C3 start clear, because silicon differs in which instructions clear them.
        let fsw = (random >> 32) as u16 & 0x3c00;
        image[..24].fill(0);
        image[..2].copy_from_slice(&fcw.to_le_bytes());
        image[2..4].copy_from_slice(&fsw.to_le_bytes());
        image[4] = match self.random.below(4) {
            0 => self.random.next() as u8,
            1 => 0x7f_u8.rotate_left(u32::from(fsw >> 11 & 7)),
            _ => 0xff,
        };
        image[24..32].copy_from_slice(&0x1f80u64.to_le_bytes());
        for register in image[32..160].chunks_exact_mut(16) {
            register.fill(0);
            register[..10].copy_from_slice(&float80(&mut self.random));
        }
        let operand = OPERAND as usize;
        match self.random.below(4) {
            0 => image[operand..operand + 10].copy_from_slice(&float80(&mut self.random)),
            1 => image[operand..operand + 8].copy_from_slice(&(self.random.next() as i32 as f64 / 512.0).to_bits().to_le_bytes()),
            2 => image[operand..operand + 4].copy_from_slice(&(self.random.next() as i32 as f32 / 512.0).to_bits().to_le_bytes()),
            _ => {}
        }
        image
    }

    fn check(&mut self, instruction: &[u8], count: usize, unmasked: bool) {
        for _ in 0..count {
            let image = self.image(unmasked);
            let conditions: &[u8] = if unmasked { &CLEAR_CONDITIONS } else { &[] };
            let code = [&FXRSTOR_RSI, instruction, &FXSAVE_RDI, &CLEAR_DIFFERENCES, conditions].concat();
            let instructions = if unmasked { 10 } else { 7 };
            let mut registers: Registers = self.both.registers();
            registers.gpr[gpr::RSI] = self.both.machine.data();
            registers.gpr[gpr::RDI] = self.both.machine.data() + STORED;
            // The same difference in EFLAGS for FCOMI.
            let defined = if unmasked { 0 } else { u64::MAX };
            self.both.check_program(&code, instructions, registers, defined, &image);
        }
    }

    /// Memory forms: `escape /digit` at the operand.
    fn memory(&mut self, escape: u8, digit: u8, unmasked: bool) {
        let [a, b, c, d] = OPERAND.to_le_bytes();
        self.check(&[escape, 0x86 | digit << 3, a, b, c, d], 150, unmasked);
    }
}

#[test]
fn register_arithmetic() {
    let mut bench = Bench::new(1);
    for (escape, digits) in [(0xd8u8, 0..8u8), (0xdc, 0..8), (0xde, 0..2), (0xde, 4..8)] {
        for digit in digits {
            for st in [0, 1, 5] {
                if escape == 0xdc && (digit == 2 || digit == 3) {
                    continue; // other spellings of FCOM and FCOMP
                }
                bench.check(&[escape, 0xc0 | digit << 3 | st], 60, false);
                bench.check(&[escape, 0xc0 | digit << 3 | st], 60, true);
            }
        }
    }
}

#[test]
fn memory_arithmetic() {
    let mut bench = Bench::new(2);
    for escape in [0xd8, 0xda, 0xdc, 0xde] {
        for digit in 0..8 {
            bench.memory(escape, digit, false);
            bench.memory(escape, digit, true);
        }
    }
}

#[test]
fn loads_and_stores() {
    let mut bench = Bench::new(3);
    for unmasked in [false, true] {
        for (escape, digits) in
            [(0xd9u8, &[0u8, 2, 3] as &[u8]), (0xdb, &[0, 1, 2, 3, 5, 7]), (0xdd, &[0, 1, 2, 3]), (0xdf, &[0, 1, 2, 3, 5, 6, 7])]
        {
            for digit in digits {
                bench.memory(escape, *digit, unmasked);
            }
        }
        for instruction in [
            [0xd9, 0xc0],
            [0xd9, 0xc3],
            [0xd9, 0xc9],
            [0xd9, 0xcd],
            [0xdd, 0xd2],
            [0xdd, 0xda],
            [0xdd, 0xd9],
            [0xdd, 0xc1],
            [0xd9, 0xe8],
            [0xd9, 0xe9],
            [0xd9, 0xea],
            [0xd9, 0xeb],
            [0xd9, 0xec],
            [0xd9, 0xed],
            [0xd9, 0xee],
            [0xd9, 0xd0],
            [0xd9, 0xf6],
            [0xd9, 0xf7],
        ] {
            bench.check(&instruction, 100, unmasked);
        }
    }
}

#[test]
fn comparisons_and_moves() {
    let mut bench = Bench::new(4);
    for unmasked in [false, true] {
        for instruction in [
            [0xde, 0xd9],
            [0xda, 0xe9],
            [0xdd, 0xe1],
            [0xdd, 0xea],
            [0xdb, 0xf1],
            [0xdb, 0xe9],
            [0xdf, 0xf1],
            [0xdf, 0xe9],
            [0xd9, 0xe4],
            [0xd9, 0xe5],
            [0xda, 0xc1],
            [0xda, 0xc9],
            [0xda, 0xd1],
            [0xda, 0xd9],
            [0xdb, 0xc1],
            [0xdb, 0xc9],
            [0xdb, 0xd1],
            [0xdb, 0xd9],
        ] {
            bench.check(&instruction, 150, unmasked);
        }
    }
}

#[test]
fn functions() {
    let mut bench = Bench::new(5);
    for unmasked in [false, true] {
        for second in [0xe0, 0xe1, 0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff] {
            bench.check(&[0xd9, second], 150, unmasked);
        }
    }
}

#[test]
fn control() {
    let mut bench = Bench::new(6);
    // FNCLEX, FNINIT, FNSTSW AX, FNOP, FFREE.
    for instruction in [&[0xdbu8, 0xe2] as &[u8], &[0xdb, 0xe3], &[0xdf, 0xe0], &[0xd9, 0xd0], &[0xdd, 0xc3]] {
        bench.check(instruction, 30, false);
    }
}

#[test]
fn an_unmasked_exception_waits_for_the_next_instruction() {
    let mut machine = Machine::new();
    // FLDZ; FLD1; FDIV ST, ST(1) with divide by zero unmasked; FNSTSW AX; FLD1.
    machine.cpu.state.fpu.fcw = 0x37b;
    assert!(machine.run(&[0xd9, 0xee, 0xd9, 0xe8, 0xd8, 0xf1, 0xdf, 0xe0, 0xd9, 0xe8], 4).is_ok());
    assert_eq!(machine.cpu.gpr(gpr::RAX) & 0x8084, 0x8084);
    assert!(machine.step().is_err());
    assert_eq!(machine.vector(), 16);
}

#[test]
fn environment_round_trip() {
    let mut machine = Machine::new();
    // FLDPI; FNSAVE [abs]; FRSTOR [abs].
    let at = (DATA as u32).to_le_bytes();
    let absolute = |digit: u8| [&[0xddu8, 0x04 | digit << 3, 0x25] as &[u8], &at].concat();
    let code = [&[0xd9, 0xeb], absolute(6).as_slice(), absolute(4).as_slice()].concat();
    assert!(machine.run(&code, 2).is_ok());
    assert_eq!((machine.cpu.state.fpu.fsw, machine.cpu.state.fpu.ftw), (0, 0));
    let image: [u8; 108] = machine.bytes(DATA);
    assert_eq!(image[8..12], [0xff, 0x3f, 0xff, 0xff]);
    assert_eq!(image[36..38], [0x00, 0x40]);
    assert!(machine.step().is_ok());
    assert_eq!((machine.cpu.state.fpu.fsw, machine.cpu.state.fpu.ftw), (7 << 11, 0x80));
}
