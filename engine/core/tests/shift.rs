//! Shifts, bit instructions, multiplication and division against the host's CPU.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Form, Immediate};
use common::{Machine, DATA};
use softkvm_engine::fault::vector;
use softkvm_engine::state::{gpr, rflags};
use softkvm_engine::uop::Stop;

const ROUNDS: usize = 80;
const ONLY_CARRY: u64 = !(rflags::OF | rflags::AF | rflags::SF | rflags::PF);
const ONLY_ZERO: u64 = !(rflags::OF | rflags::AF | rflags::SF | rflags::PF | rflags::CF);

#[test]
fn shifts_and_rotates_by_one() {
    let mut both = Comparison::new(20);
    for operation in [0, 1, 2, 3, 4, 5, 7] {
        // Rotates leave AF alone.
        let defined = if operation < 4 { u64::MAX } else { !rflags::AF };
        for opcode in [&[0xd0u8] as &'static [u8], &[0xd1]] {
            both.check_modrm(&Form { extension: Some(operation), defined, ..Form::new(opcode) }, ROUNDS);
        }
    }
}

#[test]
fn shifts_and_rotates_by_cl() {
    let mut both = Comparison::new(21);
    for operation in [0, 1, 2, 3, 4, 5, 7] {
        let mut defined = if operation < 4 { !rflags::OF } else { !(rflags::OF | rflags::AF) };
        for (opcode, sizes) in [(&[0xd3u8] as &'static [u8], 5), (&[0xd3], 2), (&[0xd2], 1)] {
            // CF of a shift is undefined when the count exceeds the operand.
            if sizes == 2 && operation >= 4 {
                defined &= !rflags::CF;
            }
            let form = Form { extension: Some(operation), defined, sizes, rcx: Some(256), ..Form::new(opcode) };
            both.check_modrm(&form, ROUNDS);
            both.check_modrm(&Form { rcx: Some(2), ..form }, ROUNDS);
        }
    }
}

#[test]
fn a_count_of_zero_changes_no_flag() {
    let mut both = Comparison::new(22);
    for operation in [0, 1, 2, 3, 4, 5, 7] {
        both.check_modrm(&Form { extension: Some(operation), rcx: Some(1), ..Form::new(&[0xd3]) }, ROUNDS);
    }
}

#[test]
fn shifts_by_immediates() {
    let mut both = Comparison::new(23);
    for operation in [0, 1, 2, 3, 4, 5, 7] {
        let defined = if operation < 4 { !rflags::OF } else { !(rflags::OF | rflags::AF) };
        let form = Form { extension: Some(operation), immediate: Immediate::Byte, defined, sizes: 5, ..Form::new(&[0xc1]) };
        both.check_modrm(&form, ROUNDS);
    }
}

#[test]
fn double_shifts() {
    let mut both = Comparison::new(24);
    let defined = !(rflags::OF | rflags::AF);
    for opcode in [&[0x0fu8, 0xa4] as &'static [u8], &[0x0f, 0xac]] {
        both.check_modrm(&Form { immediate: Immediate::Byte, sizes: 5, defined, ..Form::new(opcode) }, ROUNDS);
    }
    for opcode in [&[0x0fu8, 0xa5] as &'static [u8], &[0x0f, 0xad]] {
        both.check_modrm(&Form { sizes: 5, defined, rcx: Some(256), ..Form::new(opcode) }, ROUNDS);
        both.check_modrm(&Form { defined: !rflags::AF, rcx: Some(2), ..Form::new(opcode) }, ROUNDS);
        both.check_modrm(&Form { sizes: 2, defined, rcx: Some(17), ..Form::new(opcode) }, ROUNDS);
    }
}

#[test]
fn bit_tests() {
    let mut both = Comparison::new(25);
    let defined = !(rflags::OF | rflags::AF | rflags::SF | rflags::PF);
    for (operation, opcode) in [&[0x0fu8, 0xa3] as &'static [u8], &[0x0f, 0xab], &[0x0f, 0xb3], &[0x0f, 0xbb]].into_iter().enumerate() {
        both.check_modrm(&Form { memory: false, defined, ..Form::new(opcode) }, ROUNDS);
        for lock in [false, operation > 0] {
            let extension = Some(4 + operation as u8);
            both.check_modrm(&Form { extension, immediate: Immediate::Byte, lock, defined, ..Form::new(&[0x0f, 0xba]) }, ROUNDS);
        }
        // A place in a bit string, before and behind [rsi]; the number is in RCX.
        for _ in 0..ROUNDS {
            let mut registers = both.registers();
            registers.gpr[gpr::RSI] = both.machine.data() + 0x2000;
            registers.gpr[gpr::RCX] = both.random.below(0x1_0000).wrapping_sub(0x8000);
            for prefix in [0x90, 0x66, 0x48] {
                let code = [prefix, opcode[0], opcode[1], 0x0e];
                both.check(if prefix == 0x90 { &code[1..] } else { &code }, registers, defined);
            }
        }
    }
}

#[test]
fn scans_and_counts() {
    let mut both = Comparison::new(26);
    both.check_modrm(&Form { defined: ONLY_ZERO, ..Form::new(&[0x0f, 0xbc]) }, ROUNDS);
    both.check_modrm(&Form { defined: ONLY_ZERO, ..Form::new(&[0x0f, 0xbd]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf3], ..Form::new(&[0x0f, 0xb8]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf3], defined: ONLY_CARRY, ..Form::new(&[0x0f, 0xbc]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf3], defined: ONLY_CARRY, ..Form::new(&[0x0f, 0xbd]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf2], sizes: 5, ..Form::new(&[0x0f, 0x38, 0xf0]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf2], ..Form::new(&[0x0f, 0x38, 0xf1]) }, ROUNDS);
}

/// VEX.LZ encodings of `rax, rbx, rdi` or, where the second register is the count or control, `rax, rdi, rbx`.
#[test]
fn bmi() {
    let mut both = Comparison::new(27);
    let undefined = rflags::AF | rflags::PF;
    let encodings: [(u8, u8, u8, u64); 13] = [
        (0, 0xf2, 0xc7, !undefined),                // andn
        (0, 0xf7, 0xc7, !(undefined | rflags::SF)), // bextr
        (0, 0xf3, 0xdf, !undefined),                // blsi
        (0, 0xf3, 0xd7, !undefined),                // blsmsk
        (0, 0xf3, 0xcf, !undefined),                // blsr
        (0, 0xf5, 0xc7, !undefined),                // bzhi
        (3, 0xf5, 0xc7, u64::MAX),                  // pdep
        (2, 0xf5, 0xc7, u64::MAX),                  // pext
        (3, 0xf6, 0xc7, u64::MAX),                  // mulx
        (1, 0xf7, 0xc7, u64::MAX),                  // shlx
        (3, 0xf7, 0xc7, u64::MAX),                  // shrx
        (2, 0xf7, 0xc7, u64::MAX),                  // sarx
        (3, 0xf6, 0xdf, u64::MAX),                  // mulx rbx, rbx, rdi
    ];
    for (pp, opcode, modrm, defined) in encodings {
        for w in [0, 0x80] {
            for _ in 0..ROUNDS {
                let mut registers = both.registers();
                if opcode == 0xf5 || opcode == 0xf7 {
                    let few = both.random.below(80) << 8 | both.random.below(80);
                    registers.gpr[gpr::RBX] = if both.random.below(2) == 0 { few } else { registers.gpr[gpr::RBX] };
                }
                both.check(&[0xc4, 0xe2, w | (15 - 3) << 3 | pp, opcode, modrm], registers, defined);
                registers.gpr[gpr::RSI] = both.machine.data() + 0x100;
                both.check(&[0xc4, 0xe2, w | (15 - 3) << 3 | pp, opcode, modrm & 0x38 | 6], registers, defined);
                let count = both.random.below(256) as u8;
                both.check(&[0xc4, 0xe3, w | 0x7b, 0xf0, 0xc7, count], registers, u64::MAX);
                // rorx
            }
        }
    }
}

#[test]
fn products() {
    let mut both = Comparison::new(28);
    let defined = !(rflags::SF | rflags::ZF | rflags::AF | rflags::PF);
    for (opcode, extension) in [([0xf6u8, 0xf7], 4), ([0xf6, 0xf7], 5)] {
        let narrow: &'static [u8] = &[0xf6];
        let wide: &'static [u8] = &[0xf7];
        assert_eq!(opcode, [narrow[0], wide[0]]);
        both.check_modrm(&Form { extension: Some(extension), defined, sizes: 1, ..Form::new(narrow) }, ROUNDS);
        both.check_modrm(&Form { extension: Some(extension), defined, ..Form::new(wide) }, ROUNDS);
    }
    both.check_modrm(&Form { defined, ..Form::new(&[0x0f, 0xaf]) }, ROUNDS);
    both.check_modrm(&Form { defined, immediate: Immediate::Word, ..Form::new(&[0x69]) }, ROUNDS);
    both.check_modrm(&Form { defined, immediate: Immediate::Byte, ..Form::new(&[0x6b]) }, ROUNDS);
}

/// The accumulator pair that a dividend of `bits` is made of.
fn set_dividend(registers: &mut common::host::Registers, bits: u32, dividend: u128) {
    let mask = (1u128 << bits) - 1;
    if bits == 8 {
        registers.gpr[gpr::RAX] = (dividend & 0xffff) as u64;
    } else {
        registers.gpr[gpr::RAX] = (dividend & mask) as u64;
        registers.gpr[gpr::RDX] = (dividend >> bits & mask) as u64;
    }
}

#[test]
fn quotients() {
    let mut both = Comparison::new(29);
    let undefined = rflags::ARITHMETIC;
    for (bits, code) in [(8u32, &[0xf6u8, 0xf1] as &[u8]), (16, &[0x66, 0xf7, 0xf1]), (32, &[0xf7, 0xf1]), (64, &[0x48, 0xf7, 0xf1])] {
        for _ in 0..4 * ROUNDS {
            let shift = 64 - bits;
            let divisor = (both.random.operand() << shift >> shift).max(1);
            let quotient = both.random.operand() << shift >> shift;
            let remainder = both.random.next() % divisor;
            let mut registers = both.registers();
            registers.gpr[gpr::RCX] = divisor;
            set_dividend(&mut registers, bits, u128::from(divisor) * u128::from(quotient) + u128::from(remainder));
            both.check(code, registers, !undefined);

            let signed = |value: u64| i128::from((value << shift) as i64 >> shift);
            let dividend = signed(divisor) * signed(quotient);
            let overflows = dividend == 1 << (bits - 1) && signed(divisor) == -1;
            if signed(divisor) != 0 && !overflows {
                set_dividend(&mut registers, bits, dividend as u128);
                let mut code = code.to_vec();
                *code.last_mut().unwrap() = 0xf9; // idiv
                both.check(&code, registers, !undefined);
            }
        }
    }
}

#[test]
fn division_errors_change_nothing() {
    let mut machine = Machine::new();
    for (rdx, rax, rcx, code) in [
        (0u64, 5u64, 0u64, &[0x48u8, 0xf7, 0xf1] as &[u8]), // div by zero
        (7, 0, 7, &[0x48, 0xf7, 0xf1]),                     // quotient 2^64
        (0, 5, 0, &[0x48, 0xf7, 0xf9]),                     // idiv by zero
        (u64::MAX, 1 << 63, u64::MAX, &[0x48, 0xf7, 0xf9]), // -2^63 / -1
        (1 << 63, 0, u64::MAX, &[0x48, 0xf7, 0xf9]),        // -2^127 / -1
        (0xffff_ffff, 1 << 31, 0xffff_ffff, &[0xf7, 0xf9]), // -2^31 / -1
        (0x8000_0000, 0, 0xffff_ffff, &[0xf7, 0xf9]),       // -2^63 / -1 in 32 bits
        (0, 0x8000, 0xff, &[0xf6, 0xf9]),
    ] {
        machine.cpu.set_gpr(gpr::RDX, rdx);
        machine.cpu.set_gpr(gpr::RAX, rax);
        machine.cpu.set_gpr(gpr::RCX, rcx);
        assert_eq!(machine.run(code, 1), Err(Stop::Fault), "{code:x?} {rdx:x} {rax:x} {rcx:x}");
        assert_eq!(machine.vector(), vector::DE);
        assert_eq!((machine.cpu.gpr(gpr::RAX), machine.cpu.gpr(gpr::RDX)), (rax, rdx));
    }
}

#[test]
fn bit_strings_fault_where_the_bit_is() {
    let mut machine = Machine::new();
    machine.unmap(DATA + 0x1000);
    machine.cpu.set_gpr(gpr::RSI, DATA);
    machine.cpu.set_gpr(gpr::RCX, 0x1000 * 8 + 65);
    assert_eq!(machine.run(&[0x48, 0x0f, 0xab, 0x0e], 1), Err(Stop::Fault));
    assert_eq!((machine.vector(), machine.cpu.fault.payload), (vector::PF, DATA + 0x1008));
}

#[test]
fn a_model_without_the_feature_does_not_know_the_instruction() {
    let without = ["bmi1", "bmi2", "abm", "popcnt"].map(|name| (name.to_owned(), false));
    let mut machine = Machine::new();
    machine.cpu.model = std::sync::Arc::new(softkvm_engine::model::Model::new("cascadelake", &without).expect("optional features"));
    for code in [&[0xc4u8, 0xe2, 0x60, 0xf2, 0xc7] as &[u8], &[0xc4, 0xe3, 0x7b, 0xf0, 0xc7, 1], &[0xf3, 0x0f, 0xb8, 0xc3]] {
        assert_eq!(machine.run(code, 1), Err(Stop::Fault), "{code:x?}");
        assert_eq!(machine.vector(), vector::UD);
    }
    machine.cpu.set_gpr(gpr::RBX, 0x50);
    machine.run(&[0xf3, 0x0f, 0xbd, 0xc3], 1).unwrap(); // lzcnt eax, ebx, which is bsr
    assert_eq!(machine.cpu.gpr(gpr::RAX), 6);
}
