//! Machines whose performance monitoring unit is on, programs full of branches, and the truth about them from single instructions.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::jit::Tier;
use softkvm_engine::model::Model;
use softkvm_engine::pmu::branch::Kind;
use softkvm_engine::pmu::counter::ring;
use softkvm_engine::pmu::log::{BranchLog, Filter, RECORD_SIZE};
use softkvm_engine::pmu::Pmu;
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

use super::system::HANDLERS;
use super::{Machine, Random, CODE};

pub const EXIT_NMI: u32 = 0;
pub const EXIT_HLT: u32 = 12;
/// Vector whose handler returns at once.
pub const SERVICE: u8 = 0x21;
pub const EVERYTHING: Filter = Filter { rings: ring::KERNEL | ring::USER, low: 0, high: u64::MAX };

/// One transfer of control: kind, from, to.
pub type Branch = (Kind, u64, u64);

/// A machine of `model` with descriptor tables in 64-bit mode, which translates all that it can; the handler of [`SERVICE`] is an IRETQ.
pub fn machine(model: &str) -> Machine {
    let mut machine = Machine::system(CodeSize::Bits64);
    let model = Arc::new(Model::new(model, &[]).expect("a model"));
    machine.cpu.pmu = Pmu::new(&model);
    machine.cpu.model = model;
    machine.cpu.set_translator(Tier::Translator.threshold());
    machine.cpu.clock.tick = u64::MAX;
    machine.cpu.control.intercepts = 1 << intercept::HLT;
    machine.poke(HANDLERS + 16 * u64::from(SERVICE), &[0x48, 0xcf]);
    machine
}

/// Runs the guest as a VM entry does, until it exits; returns the reason.
pub fn enter(machine: &mut Machine) -> u32 {
    machine.cpu.begin_watch();
    machine.cpu.run();
    machine.cpu.end_watch();
    machine.cpu.exit.reason
}

/// Writes an MSR of the PMU between two runs.
pub fn set(machine: &mut Machine, index: u32, value: u64) {
    machine.cpu.pmu.write(index, value).unwrap_or_else(|_| panic!("{index:#x} does not take {value:#x}"));
}

/// Reads one.
pub fn get(machine: &Machine, index: u32) -> u64 {
    machine.cpu.pmu.read(index).unwrap_or_else(|_| panic!("no {index:#x}"))
}

/// Starts the branch log.
pub fn log_branches(machine: &mut Machine) {
    machine.cpu.pmu.log = Some(BranchLog::new(1 << 20, EVERYTHING));
}

/// What the branch log holds, without its records of CR3.
pub fn logged(machine: &mut Machine) -> Vec<Branch> {
    let bytes = machine.cpu.pmu.log.as_mut().expect("a log").take();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    bytes
        .chunks(RECORD_SIZE)
        .filter(|record| record[16] != 0)
        .map(|record| (Kind::ALL[usize::from(record[16])], word(&record[..8]), word(&record[8..16])))
        .collect()
}

/// What single instructions tell: instructions, and every branch with whether it was taken.
pub struct Truth {
    pub instructions: u64,
    pub branches: Vec<(Branch, bool)>,
}

/// Runs the loaded program one reference handler at a time, up to HLT.
pub fn truth(machine: &mut Machine) -> Truth {
    let mut truth = Truth { instructions: 0, branches: Vec::new() };
    loop {
        let from = machine.cpu.rip();
        let bytes = machine.peek(from, 15);
        let insn = Decoder::with_ip(64, &bytes, from, DecoderOptions::NONE).decode();
        match machine.step() {
            Ok(()) => {}
            Err(Stop::Again) => continue,
            Err(_) => return truth,
        }
        truth.instructions += 1;
        let kind = Kind::of(&insn);
        if kind != Kind::None {
            let to = machine.cpu.rip();
            let conditional = matches!(kind, Kind::Conditional | Kind::Loop);
            truth.branches.push(((kind, from, to), !conditional || to != insn.next_ip()));
        }
    }
}

const FUNCTIONS: u64 = 4;
const FUNCTION_SIZE: u64 = 0x200;

/// A program of nested functions with every kind of near branch, software interrupts and repeated string instructions. Ends with HLT.
pub fn program(seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut code = vec![0xf4; (FUNCTIONS * FUNCTION_SIZE) as usize];
    for n in 0..FUNCTIONS {
        let body = function(&mut random, n);
        code[(n * FUNCTION_SIZE) as usize..][..body.len()].copy_from_slice(&body);
    }
    code
}

fn function(random: &mut Random, n: u64) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 0x180 {
        let at = n * FUNCTION_SIZE + code.len() as u64;
        match random.below(12) {
            0 | 1 => code.extend([0x75 + random.below(2) as u8 * 9, 1 + random.below(3) as u8, 0x90, 0x90, 0x90]),
            // test al, imm; jcc
            2 | 3 => code.extend([0xa8, random.next() as u8, 0x70 + random.below(16) as u8, 1, 0x90]),
            // mov ecx, count; inc eax; loop
            4 => code.extend([0xb9, 1 + random.below(20) as u8, 0, 0, 0, 0xff, 0xc0, 0xe2, 0xfc]),
            5 if n + 1 < FUNCTIONS => {
                let distance = ((n + 1) * FUNCTION_SIZE) as i64 - at as i64 - 5;
                code.push(0xe8);
                code.extend((distance as i32).to_le_bytes());
            }
            // mov ebx, function; call rbx
            6 if n + 1 < FUNCTIONS => {
                code.push(0xbb);
                code.extend(((CODE + (n + 1) * FUNCTION_SIZE) as u32).to_le_bytes());
                code.extend([0xff, 0xd3]);
            }
            // mov ebx, next; jmp rbx
            7 => {
                code.push(0xbb);
                code.extend(((CODE + at + 7 + 1) as u32).to_le_bytes());
                code.extend([0xff, 0xe3, 0x90]);
            }
            8 => code.extend([0xeb, 2, 0x90, 0x90]),
            9 => code.extend([0xcd, SERVICE]),
            // call next; pop rbx; mov ecx, count; jrcxz
            10 => code.extend([0xe8, 0, 0, 0, 0, 0x5b, 0xb9, random.below(2) as u8, 0, 0, 0, 0xe3, 1, 0x90]),
            // mov edi, data; mov ecx, count; rep stosb
            _ => code.extend([0xbf, 0, 0, 0x10, 0, 0xb9, random.below(200) as u8, random.below(32) as u8, 0, 0, 0xf3, 0xaa]),
        }
        code.extend([0x01, 0xd8]);
    }
    code.push(if n == 0 { 0xf4 } else { 0xc3 });
    code
}
