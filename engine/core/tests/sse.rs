//! Vector instructions against the host's CPU: the whole FXSAVE image, general registers, flags and memory.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Registers};
use common::vector::lanes;
use common::{Random, DATA_SIZE};
use softkvm_engine::state::gpr;

/// Where the image that the test loads, the image that it stores and the memory operands are in the test data.
const LOADED: usize = 0;
const STORED: u64 = 0x1000;
const OPERAND: usize = 0x400;

const FXRSTOR_RSI: [u8; 4] = [0x48, 0x0f, 0xae, 0x0e];
const FXSAVE_RDI: [u8; 4] = [0x48, 0x0f, 0xae, 0x07];
/// The host may have more writable MXCSR bits, and keeps other last-instruction pointers.
const CLEAR_MXCSR_MASK: [u8; 7] = [0xc7, 0x47, 0x1c, 0, 0, 0, 0];

/// One encoding to test: legacy prefixes, opcode behind 0F, and what its operands may be.
struct Form {
    prefix: &'static [u8],
    opcode: &'static [u8],
    register: bool,
    memory: bool,
    rex_w: bool,
    immediate: bool,
    defined: u64,
}

const fn form(prefix: &'static [u8], opcode: &'static [u8]) -> Form {
    Form { prefix, opcode, register: true, memory: true, rex_w: false, immediate: false, defined: u64::MAX }
}

struct Bench {
    both: Comparison,
    random: Random,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Bench { both: Comparison::new(seed), random: Random::new(seed + 1) }
    }

    /// Checks `form` with random registers, operands, rounding modes and `count` repetitions.
    fn check(&mut self, form: &Form, count: usize) {
        for _ in 0..count {
            let code = self.encode(form);
            let mut registers: Registers = self.both.registers();
            registers.gpr[gpr::RSI] = self.both.machine.data() + LOADED as u64;
            registers.gpr[gpr::RDI] = self.both.machine.data() + STORED;
            let image = self.image();
            self.both.check_program(&code, 4, registers, form.defined, &image);
        }
    }

    fn encode(&mut self, form: &Form) -> Vec<u8> {
        let mut code = FXRSTOR_RSI.to_vec();
        code.extend(form.prefix);
        if form.rex_w {
            code.push(0x48);
        }
        code.push(0x0f);
        code.extend(form.opcode);
        // General registers as operands: 0 to 3, so that no address changes.
        let (reg, rm) = (self.random.below(4) as u8, self.random.below(4) as u8);
        if form.memory && (!form.register || self.random.below(2) == 0) {
            code.push(0x86 | reg << 3);
            code.extend((OPERAND as u32 + 16 * self.random.below(4) as u32).to_le_bytes());
        } else {
            code.push(0xc0 | reg << 3 | rm);
        }
        if form.immediate {
            code.push(self.random.next() as u8);
        }
        code.extend(FXSAVE_RDI);
        code.extend(CLEAR_MXCSR_MASK);
        code
    }

    fn image(&mut self) -> Vec<u8> {
        let mut image: Vec<u8> = (0..DATA_SIZE / 8).flat_map(|_| lanes(&mut self.random).to_le_bytes()).collect();
        let random = self.random.next();
        let mxcsr = 0x1f80 | random as u32 & 0xe07f;
        image[..24].fill(0);
        image[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        image[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        image[4] = if random >> 32 & 1 != 0 { 0xff } else { 0 };
        for register in image[32..160].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
        image
    }

    fn all(&mut self, forms: &[Form]) {
        forms.iter().for_each(|form| self.check(form, 60));
    }
}

/// Forms of `opcodes` without prefix (MMX) and with 66 (XMM).
fn integer(opcodes: &[&'static [u8]]) -> Vec<Form> {
    opcodes.iter().flat_map(|opcode| [form(&[], opcode), form(&[0x66], opcode)]).collect()
}

/// Forms of `opcodes` with each of the prefixes.
fn prefixed(prefixes: &[&'static [u8]], opcodes: &[&'static [u8]]) -> Vec<Form> {
    prefixes.iter().flat_map(|prefix| opcodes.iter().map(|opcode| form(prefix, opcode))).collect()
}

const PS: &[u8] = &[];
const PD: &[u8] = &[0x66];
const SS: &[u8] = &[0xf3];
const SD: &[u8] = &[0xf2];

#[test]
fn packed_integers() {
    let mut bench = Bench::new(1);
    bench.all(&integer(&[
        &[0x60],
        &[0x61],
        &[0x62],
        &[0x63],
        &[0x64],
        &[0x65],
        &[0x66],
        &[0x67],
        &[0x68],
        &[0x69],
        &[0x6a],
        &[0x6b],
        &[0x74],
        &[0x75],
        &[0x76],
        &[0xd1],
        &[0xd2],
        &[0xd3],
        &[0xd4],
        &[0xd5],
        &[0xd8],
        &[0xd9],
        &[0xda],
        &[0xdb],
        &[0xdc],
        &[0xdd],
        &[0xde],
        &[0xdf],
        &[0xe0],
        &[0xe1],
        &[0xe2],
        &[0xe3],
        &[0xe4],
        &[0xe5],
        &[0xe8],
        &[0xe9],
        &[0xea],
        &[0xeb],
        &[0xec],
        &[0xed],
        &[0xee],
        &[0xef],
        &[0xf1],
        &[0xf2],
        &[0xf3],
        &[0xf4],
        &[0xf5],
        &[0xf6],
        &[0xf8],
        &[0xf9],
        &[0xfa],
        &[0xfb],
        &[0xfc],
        &[0xfd],
        &[0xfe],
    ]));
    bench.all(&prefixed(&[PD], &[&[0x6c], &[0x6d]]));
}

#[test]
fn supplemental_integers() {
    let mut bench = Bench::new(2);
    bench.all(&integer(&[
        &[0x38, 0x00],
        &[0x38, 0x01],
        &[0x38, 0x02],
        &[0x38, 0x03],
        &[0x38, 0x04],
        &[0x38, 0x05],
        &[0x38, 0x06],
        &[0x38, 0x07],
        &[0x38, 0x08],
        &[0x38, 0x09],
        &[0x38, 0x0a],
        &[0x38, 0x0b],
        &[0x38, 0x1c],
        &[0x38, 0x1d],
        &[0x38, 0x1e],
    ]));
    bench.all(&prefixed(
        &[PD],
        &[
            &[0x38, 0x10],
            &[0x38, 0x14],
            &[0x38, 0x15],
            &[0x38, 0x17],
            &[0x38, 0x20],
            &[0x38, 0x21],
            &[0x38, 0x22],
            &[0x38, 0x23],
            &[0x38, 0x24],
            &[0x38, 0x25],
            &[0x38, 0x28],
            &[0x38, 0x29],
            &[0x38, 0x2b],
            &[0x38, 0x30],
            &[0x38, 0x31],
            &[0x38, 0x32],
            &[0x38, 0x33],
            &[0x38, 0x34],
            &[0x38, 0x35],
            &[0x38, 0x37],
            &[0x38, 0x38],
            &[0x38, 0x39],
            &[0x38, 0x3a],
            &[0x38, 0x3b],
            &[0x38, 0x3c],
            &[0x38, 0x3d],
            &[0x38, 0x3e],
            &[0x38, 0x3f],
            &[0x38, 0x40],
            &[0x38, 0x41],
        ],
    ));
}

#[test]
fn immediates() {
    let mut bench = Bench::new(3);
    let with_immediate = |form: Form| Form { immediate: true, ..form };
    let opcodes: &[(&[u8], &[u8])] = &[
        (PS, &[0x70]),
        (PD, &[0x70]),
        (SS, &[0x70]),
        (SD, &[0x70]),
        (PS, &[0xc6]),
        (PD, &[0xc6]),
        (PS, &[0x3a, 0x0f]),
        (PD, &[0x3a, 0x0f]),
        (PD, &[0x3a, 0x0c]),
        (PD, &[0x3a, 0x0d]),
        (PD, &[0x3a, 0x0e]),
        (PD, &[0x3a, 0x42]),
        (PD, &[0x3a, 0x21]),
        (PS, &[0xc4]),
        (PD, &[0xc4]),
        (PD, &[0x3a, 0x14]),
        (PD, &[0x3a, 0x15]),
        (PD, &[0x3a, 0x16]),
        (PD, &[0x3a, 0x17]),
        (PD, &[0x3a, 0x20]),
        (PD, &[0x3a, 0x22]),
    ];
    for (prefix, opcode) in opcodes {
        bench.check(&with_immediate(form(prefix, opcode)), 120);
    }
    for opcode in [&[0x3a, 0x16], &[0x3a, 0x22]] {
        bench.check(&Form { rex_w: true, ..with_immediate(form(PD, opcode)) }, 60);
    }
    for prefix in [PS, PD] {
        bench.check(&Form { memory: false, ..with_immediate(form(prefix, &[0xc5])) }, 60);
    }
}

#[test]
fn shifts_by_immediates() {
    let mut bench = Bench::new(4);
    for opcode in [0x71u8, 0x72, 0x73] {
        for operation in [2u8, 3, 4, 6, 7] {
            for prefix in [PS, PD] {
                let known = match operation {
                    2 | 6 => true,
                    4 => opcode != 0x73,
                    _ => opcode == 0x73 && prefix == PD,
                };
                for count in [0u8, 1, 7, 8, 15, 16, 31, 32, 63, 64, 255] {
                    if known {
                        bench.fixed(prefix, &[0x0f, opcode, 0xc0 | operation << 3 | 1, count]);
                    }
                }
            }
        }
    }
}

impl Bench {
    /// Checks one instruction given by its bytes.
    fn fixed(&mut self, prefix: &[u8], bytes: &[u8]) {
        let code = [&FXRSTOR_RSI, prefix, bytes, &FXSAVE_RDI, &CLEAR_MXCSR_MASK].concat();
        let mut registers: Registers = self.both.registers();
        registers.gpr[gpr::RSI] = self.both.machine.data() + LOADED as u64;
        registers.gpr[gpr::RDI] = self.both.machine.data() + STORED;
        let image = self.image();
        self.both.check_program(&code, 4, registers, u64::MAX, &image);
    }
}

#[test]
fn moves() {
    let mut bench = Bench::new(5);
    bench.all(&prefixed(&[PS, PD], &[&[0x10], &[0x11], &[0x14], &[0x15], &[0x28], &[0x29], &[0x6e], &[0x7e], &[0x6f], &[0x7f]]));
    bench.all(&prefixed(&[PS, PD], &[&[0x54], &[0x55], &[0x56], &[0x57]]));
    bench.all(&prefixed(&[SS], &[&[0x10], &[0x11], &[0x12], &[0x16], &[0x6f], &[0x7f], &[0x7e]]));
    bench.all(&prefixed(&[SD], &[&[0x10], &[0x11], &[0x12]]));
    bench.all(&prefixed(&[PS], &[&[0x12], &[0x16]]));
    for opcode in [&[0x6e], &[0x7e]] {
        for prefix in [PS, PD] {
            bench.check(&Form { rex_w: true, ..form(prefix, opcode) }, 40);
        }
    }
    bench.all(&[form(PD, &[0xd6])]);
    for opcode in [&[0x12], &[0x13], &[0x16], &[0x17]] {
        bench.check(&Form { register: false, ..form(PD, opcode) }, 40);
    }
    for opcode in [&[0x13], &[0x17]] {
        bench.check(&Form { register: false, ..form(PS, opcode) }, 40);
    }
    bench.check(&Form { register: false, ..form(SD, &[0xf0]) }, 40);
    for (prefix, opcode) in [(PS, &[0x50]), (PD, &[0x50]), (PS, &[0xd7]), (PD, &[0xd7]), (SS, &[0xd6]), (SD, &[0xd6])] {
        bench.check(&Form { memory: false, ..form(prefix, opcode) }, 40);
    }
}

#[test]
fn floating_point() {
    let mut bench = Bench::new(6);
    bench.all(&prefixed(&[PS, PD, SS, SD], &[&[0x51], &[0x58], &[0x59], &[0x5c], &[0x5d], &[0x5e], &[0x5f]]));
    bench.all(&prefixed(&[PS, SS], &[&[0x52], &[0x53]]));
    bench.all(&prefixed(&[PD, SD], &[&[0x7c], &[0x7d], &[0xd0]]));
    for prefix in [PS, PD, SS, SD] {
        bench.check(&Form { immediate: true, ..form(prefix, &[0xc2]) }, 200);
    }
    bench.all(&prefixed(&[PS, PD], &[&[0x2e], &[0x2f]]));
    for opcode in [&[0x3a, 0x08], &[0x3a, 0x09], &[0x3a, 0x0a], &[0x3a, 0x0b], &[0x3a, 0x40], &[0x3a, 0x41]] {
        bench.check(&Form { immediate: true, ..form(PD, opcode) }, 400);
    }
}

#[test]
fn conversions() {
    let mut bench = Bench::new(7);
    bench.all(&prefixed(&[PS, PD, SS], &[&[0x5b]]));
    bench.all(&prefixed(&[PS, PD, SS, SD], &[&[0x5a], &[0x2c], &[0x2d]]));
    bench.all(&prefixed(&[PD, SS, SD], &[&[0x2a]]));
    // CVTPI2PS from memory switches to MMX on Intel silicon (SDM vol. 2), and does not on the AMD silicon that may run this test.
    bench.check(&Form { memory: false, ..form(PS, &[0x2a]) }, 60);
    bench.all(&prefixed(&[PD, SS, SD], &[&[0xe6]]));
    for prefix in [SS, SD] {
        for opcode in [&[0x2a], &[0x2c], &[0x2d]] {
            bench.check(&Form { rex_w: true, ..form(prefix, opcode) }, 100);
        }
    }
}

/// Runs one instruction that must raise an exception, with this MXCSR; returns the vector.
fn exception(code: &[u8], mxcsr: u32) -> (u8, u32) {
    let mut machine = common::Machine::new();
    machine.cpu.state.fpu.mxcsr = mxcsr;
    machine.cpu.state.fpu.vector[0][..16].copy_from_slice(&1.0f64.to_bits().to_le_bytes().repeat(2));
    assert!(machine.run(code, 1).is_err());
    (machine.vector(), machine.cpu.state.fpu.mxcsr)
}

#[test]
fn unmasked_exceptions() {
    // DIVPD xmm0, xmm1 with xmm1 zero: divide by zero.
    assert_eq!(exception(&[0x66, 0x0f, 0x5e, 0xc1], 0x1d80), (19, 0x1d84));
}

#[test]
fn misaligned_operands() {
    // PADDB and MOVAPS fault, MOVUPS does not.
    assert_eq!(exception(&[0x66, 0x0f, 0xfc, 0x04, 0x25, 1, 0, 0x10, 0], 0x1f80).0, 13);
    assert_eq!(exception(&[0x0f, 0x28, 0x04, 0x25, 8, 0, 0x10, 0], 0x1f80).0, 13);
    assert!(common::Machine::new().run(&[0x0f, 0x10, 0x04, 0x25, 1, 0, 0x10, 0], 1).is_ok());
}

#[test]
fn strings() {
    let mut bench = Bench::new(8);
    for opcode in [&[0x3a, 0x60], &[0x3a, 0x61], &[0x3a, 0x62], &[0x3a, 0x63]] {
        for rex_w in [false, true] {
            bench.check(&Form { immediate: true, rex_w, ..form(PD, opcode) }, 600);
        }
    }
}

#[test]
fn cryptography() {
    let mut bench = Bench::new(9);
    bench.all(&prefixed(&[PD], &[&[0x38, 0xdb], &[0x38, 0xdc], &[0x38, 0xdd], &[0x38, 0xde], &[0x38, 0xdf]]));
    bench.all(&prefixed(&[PS], &[&[0x38, 0xc8], &[0x38, 0xc9], &[0x38, 0xca], &[0x38, 0xcb], &[0x38, 0xcc], &[0x38, 0xcd]]));
    for (prefix, opcode) in [(PD, &[0x3a, 0xdf]), (PD, &[0x3a, 0x44]), (PS, &[0x3a, 0xcc])] {
        bench.check(&Form { immediate: true, ..form(prefix, opcode) }, 100);
    }
    bench.all(&prefixed(&[SD, &[0x66, 0xf2]], &[&[0x38, 0xf0], &[0x38, 0xf1]]));
    bench.check(&Form { rex_w: true, ..form(SD, &[0x38, 0xf1]) }, 60);
}
