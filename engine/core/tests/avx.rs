//! VEX instructions against the host's CPU: every form that the decoder knows of AVX, AVX2, FMA and F16C, with random operands.
#![cfg(target_arch = "x86_64")]

mod common;

use std::collections::HashSet;

use common::host::{Comparison, Registers};
use common::vector::lanes;
use common::{Machine, Random, DATA, DATA_SIZE};
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::{cr0, gpr};

/// Places in the test data: MXCSR, the registers that the test loads, the ones that it stores, the memory operands.
const REGISTERS: usize = 0x40;
const STORED: u64 = 0x1000;
const OPERAND: usize = 0x400;
/// Vector and general registers that operands are: 0 to 3.
const COUNT: u8 = 4;
/// Instructions of a program: MXCSR and the registers in, the instruction, registers and MXCSR out.
const PROGRAM: usize = 2 * COUNT as usize + 3;

const INVALID_OPCODE: u8 = 6;
const NOT_AVAILABLE: u8 = 7;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// A VEX prefix and opcode; `map`, `pp`, `w`, `l` as the prefix has them.
#[derive(Clone, Copy)]
struct Form {
    map: u8,
    pp: u8,
    w: u8,
    l: u8,
    opcode: u8,
}

impl Form {
    /// The instruction with `vvvv` (already inverted) and what follows the opcode.
    fn encode(self, vvvv: u8, rest: &[u8]) -> Vec<u8> {
        let prefix = [0xc4, 0xe0 | self.map, self.w << 7 | vvvv << 3 | self.l << 2 | self.pp, self.opcode];
        [&prefix, rest].concat()
    }

    /// Whether ModRM.reg is part of the opcode.
    fn is_group(self) -> bool {
        self.map == 1 && matches!(self.opcode, 0x71..=0x73)
    }

    fn all() -> impl Iterator<Item = Form> {
        (0..3 * 4 * 2 * 2 * 256u32).map(|n| Form {
            opcode: n as u8,
            l: (n >> 8 & 1) as u8,
            w: (n >> 9 & 1) as u8,
            pp: (n >> 10 & 3) as u8,
            map: 1 + (n >> 12) as u8,
        })
    }
}

fn decode(code: &[u8]) -> Option<Instruction> {
    let insn = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).decode();
    (!insn.is_invalid()).then_some(insn)
}

/// Whether the comparison can run `code`: not the ones that load MXCSR or store at RDI, nor gathers, which need indices.
fn comparable(code: Code) -> bool {
    use CpuidFeature::{AES, AVX, AVX2, F16C, FMA, PCLMULQDQ};
    let known = |feature: &CpuidFeature| matches!(*feature, AVX | AVX2 | FMA | F16C | AES | PCLMULQDQ);
    code.encoding() == EncodingKind::VEX
        && code.cpuid_features().iter().all(known)
        && !format!("{code:?}").contains("gather")
        && !matches!(code.mnemonic(), Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr | Mnemonic::Vmaskmovdqu)
}

struct Bench {
    both: Comparison,
    random: Random,
}

impl Bench {
    fn new(seed: u64) -> Self {
        Bench { both: Comparison::new(seed), random: Random::new(seed + 1) }
    }

    /// A random encoding of `form`; `None` where there is no such instruction.
    fn encode(&mut self, form: Form) -> Option<Vec<u8>> {
        let reg = self.random.below(if form.is_group() { 8 } else { COUNT.into() }) as u8;
        let mut rest = if self.random.below(2) == 0 {
            vec![0xc0 | reg << 3 | self.random.below(COUNT.into()) as u8]
        } else {
            let operand = OPERAND as u32 + 32 * self.random.below(4) as u32;
            [&[0x86 | reg << 3][..], &operand.to_le_bytes()].concat()
        };
        rest.push(self.random.next() as u8);
        let vvvv = 15 - self.random.below(COUNT.into()) as u8;
        let code = [vvvv, 15].into_iter().map(|vvvv| form.encode(vvvv, &rest)).find(|code| decode(code).is_some())?;
        let insn = decode(&code)?;
        let mut code = code[..insn.len()].to_vec();
        if insn.op_count() == 4 && insn.op_kind(3) == OpKind::Register {
            *code.last_mut()? = (self.random.below(COUNT.into()) as u8) << 4;
        }
        comparable(insn.code()).then_some(code)
    }

    /// Runs `code` with random registers on both CPUs. `adapt` may change the test data first.
    fn check(&mut self, code: &[u8], adapt: impl Fn(&mut Random, &mut [u8])) {
        let mut program = vec![0x0f, 0xae, 0x16];
        for n in 0..COUNT {
            program.extend([0xc5, 0xfc, 0x10, 0x86 | n << 3]);
            program.extend((REGISTERS as u32 + 32 * u32::from(n)).to_le_bytes());
        }
        program.extend(code);
        for n in 0..COUNT {
            program.extend([0xc5, 0xfc, 0x11, 0x87 | n << 3]);
            program.extend((32 + 32 * u32::from(n)).to_le_bytes());
        }
        program.extend([0x0f, 0xae, 0x1f]);
        let mut image: Vec<u8> = (0..DATA_SIZE / 8).flat_map(|_| lanes(&mut self.random).to_le_bytes()).collect();
        let mxcsr = 0x1f80 | self.random.next() as u32 & 0xe07f;
        image[..4].copy_from_slice(&mxcsr.to_le_bytes());
        adapt(&mut self.random, &mut image);
        let mut registers: Registers = self.both.registers();
        registers.gpr[gpr::RSI] = self.both.machine.data();
        registers.gpr[gpr::RDI] = self.both.machine.data() + STORED;
        self.both.check_program(&program, PROGRAM, registers, u64::MAX, &image);
    }
}

#[test]
fn every_form() {
    let mut bench = Bench::new(21);
    let mut left: HashSet<Code> = Code::values().filter(|code| comparable(*code)).collect();
    for form in Form::all() {
        for _ in 0..if form.is_group() { 120 } else { 12 } {
            if let Some(code) = bench.encode(form) {
                left.remove(&decode(&code).expect("as it was made").code());
                bench.check(&code, |_, _| ());
            }
        }
    }
    assert!(left.is_empty(), "not compared: {left:?}");
}

#[test]
fn comparisons_with_every_predicate() {
    let mut bench = Bench::new(22);
    for predicate in 0..=255u8 {
        for (pp, l) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)] {
            let form = Form { map: 1, pp, w: 0, l, opcode: 0xc2 };
            for _ in 0..4 {
                bench.check(&form.encode(14, &[0xc2, predicate]), |_, _| ());
            }
        }
    }
}

#[test]
fn gathers() {
    let mut bench = Bench::new(23);
    for opcode in 0x90..=0x93u8 {
        for (w, l) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let form = Form { map: 2, pp: 1, w, l, opcode };
            for _ in 0..40 {
                let scale = bench.random.below(4) as u8;
                // Destination 0, index 1, mask 2.
                let rest = [&[0x84, scale << 6 | 1 << 3 | 6][..], &(OPERAND as u32 + 512).to_le_bytes()].concat();
                let bytes = if opcode & 1 != 0 { 8 } else { 4 };
                bench.check(&form.encode(13, &rest), |random, image| {
                    for index in image[REGISTERS + 32..REGISTERS + 64].chunks_exact_mut(bytes) {
                        let value = random.below(128) as i64 - 64;
                        index.copy_from_slice(&value.to_le_bytes()[..bytes]);
                    }
                });
            }
        }
    }
}

/// VPGATHERDD ymm0, [rsi + ymm1], ymm2.
const GATHER: [u8; 6] = [0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0e];

#[test]
fn a_gather_goes_on_after_a_fault() {
    let mut machine = Machine::new();
    let missing = 0x5_0000u64;
    machine.unmap(missing);
    for n in 0..8u64 {
        machine.poke(missing - 16 + 4 * n, &(n as u32).to_le_bytes());
        machine.cpu.state.fpu.vector[1][4 * n as usize..][..4].copy_from_slice(&(4 * n as u32).to_le_bytes());
    }
    machine.cpu.state.fpu.vector[2].fill(0xff);
    machine.cpu.set_gpr(gpr::RSI, missing - 16);
    machine.load(&GATHER);
    assert!(machine.step().is_err());
    assert_eq!((machine.vector(), machine.cpu.fault.payload), (PAGE_FAULT, missing));
    assert_eq!(machine.cpu.state.fpu.vector[0][12..16], 3u32.to_le_bytes());
    assert_eq!(machine.cpu.state.fpu.vector[2][..32], [[0u8; 16], [0xff; 16]].concat());
    machine.map(missing, missing);
    machine.step().expect("the rest");
    assert_eq!(machine.cpu.state.fpu.vector[0][28..32], 7u32.to_le_bytes());
    assert_eq!(machine.cpu.state.fpu.vector[2], [0; 64]);
}

#[test]
fn masked_lanes_touch_no_memory() {
    // VMASKMOVPS ymm0, ymm1, [0x50000] and the store, with the mask clear and set.
    for code in [[0xc4, 0xe2, 0x75, 0x2c, 0x04, 0x25, 0, 0, 5, 0], [0xc4, 0xe2, 0x75, 0x2e, 0x04, 0x25, 0, 0, 5, 0]] {
        let mut machine = Machine::new();
        machine.unmap(0x5_0000);
        assert!(machine.run(&code, 1).is_ok());
        machine.cpu.state.fpu.vector[1][31] = 0x80;
        assert!(machine.run(&code, 1).is_err());
        assert_eq!((machine.vector(), machine.cpu.fault.payload), (PAGE_FAULT, 0x5_001c));
    }
}

/// VADDPS ymm0, ymm0, ymm1.
const VADDPS: [u8; 4] = [0xc5, 0xfc, 0x58, 0xc1];

#[test]
fn what_keeps_avx_from_running() {
    let fault = |change: fn(&mut Machine)| {
        let mut machine = Machine::new();
        change(&mut machine);
        machine.cpu.refresh();
        machine.run(&VADDPS, 1).err().map(|_| machine.vector())
    };
    assert_eq!(fault(|_| ()), None);
    assert_eq!(fault(|machine| machine.cpu.state.xcr0 = 3), Some(INVALID_OPCODE));
    assert_eq!(fault(|machine| machine.cpu.state.cr4 &= !(1 << 18)), Some(INVALID_OPCODE));
    assert_eq!(fault(|machine| machine.cpu.state.cr0 |= cr0::TS), Some(NOT_AVAILABLE));
    // CR0.EM and CR4.OSFXSR are for legacy SSE.
    assert_eq!(fault(|machine| machine.cpu.state.cr0 |= cr0::EM), None);
    let mut real = Machine::with_size(CodeSize::Bits16);
    assert!(real.run(&VADDPS, 1).is_err());
    assert_eq!(real.vector(), INVALID_OPCODE);
}

#[test]
fn only_aligned_moves_fault() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RSI, DATA + 16);
    assert!(machine.run(&[0xc5, 0xfc, 0x58, 0x06], 1).is_ok(), "VADDPS ymm0, ymm0, [rsi]");
    assert!(machine.run(&[0xc5, 0xf8, 0x28, 0x06], 1).is_ok(), "VMOVAPS xmm0, [rsi]");
    assert!(machine.run(&[0xc5, 0xfc, 0x28, 0x06], 1).is_err(), "VMOVAPS ymm0, [rsi]");
    assert_eq!(machine.vector(), GENERAL_PROTECTION);
}

#[test]
fn gathers_need_three_registers() {
    // Mask and destination are the same.
    let mut machine = Machine::new();
    assert!(machine.run(&[0xc4, 0xe2, 0x7d, 0x90, 0x04, 0x0e], 1).is_err());
    assert_eq!(machine.vector(), INVALID_OPCODE);
}

#[test]
fn unmasked_exceptions_of_either_half() {
    let mut machine = Machine::new();
    machine.cpu.state.fpu.mxcsr = 0x1d80;
    machine.cpu.state.fpu.vector[0][..32].copy_from_slice(&1f32.to_le_bytes().repeat(8));
    machine.cpu.state.fpu.vector[1][..28].copy_from_slice(&1f32.to_le_bytes().repeat(7));
    // VDIVPS ymm0, ymm0, ymm1: only the last lane divides by zero.
    assert!(machine.run(&[0xc5, 0xfc, 0x5e, 0xc1], 1).is_err());
    assert_eq!((machine.vector(), machine.cpu.state.fpu.mxcsr), (19, 0x1d84));
}

#[test]
fn zeroing() {
    let mut machine = Machine::new();
    machine.cpu.state.fpu.vector = [[0x5a; 64]; 32];
    assert!(machine.run(&[0xc5, 0xf8, 0x77], 1).is_ok());
    assert_eq!(machine.cpu.state.fpu.vector[15][..], [[0x5a; 16].to_vec(), vec![0; 48]].concat());
    assert_eq!(machine.cpu.state.fpu.vector[16], [0x5a; 64]);
    assert!(machine.run(&[0xc5, 0xfc, 0x77], 1).is_ok());
    assert_eq!(machine.cpu.state.fpu.vector[15], [0; 64]);
}
