//! Loops of one block, whose accesses host code checks once for many turns: random ones over pages that lie anywhere, may not be written, or
//! are not there, run until they end, fault, or use up a budget of instructions; the interpreter's state is compared.
#![cfg(target_arch = "x86_64")]

mod common;

use common::pages::{Pages, PAGE};
use common::{Machine, Random, STACK_TOP};
use softkvm_engine::state::gpr;

/// Some frames are behind each other, some are not.
const PAGES: Pages = Pages { frames: &[2, 3, 0, 7, 6, 1, 4, 5], read_only: 6 };
const ROUNDS: u64 = 20;
const PROGRAMS: u64 = 500;
const RUNS: u64 = 6;

/// What a turn is made of. RBX moves; RSI, RDI, R13 and R15 are addresses, and so is RSP.
const PIECES: [&[u8]; 20] = [
    &[0x8a, 0x04, 0x1e],                                     // mov al, [rsi+rbx]
    &[0x88, 0x04, 0x1f],                                     // mov [rdi+rbx], al
    &[0x4d, 0x8b, 0x74, 0x1d, 0x08],                         // mov r14, [r13+rbx+8]
    &[0x4d, 0x89, 0x74, 0x9f, 0xfc],                         // mov [r15+rbx*4-4], r14
    &[0x01, 0x54, 0x5f, 0x04],                               // add [rdi+rbx*2+4], edx
    &[0x66, 0x83, 0x6c, 0x1e, 0x05, 0x07],                   // sub word [rsi+rbx+5], 7
    &[0x0f, 0x10, 0x04, 0x1e],                               // movups xmm0, [rsi+rbx]
    &[0x0f, 0x29, 0x44, 0x1f, 0x10],                         // movaps [rdi+rbx+16], xmm0
    &[0x66, 0x0f, 0xfe, 0x04, 0x1f],                         // paddd xmm0, [rdi+rbx]
    &[0x8b, 0x15, 0x04, 0x00, 0x00, 0x00],                   // mov edx, [rip+4]
    &[0x48, 0x8b, 0x14, 0x1c],                               // mov rdx, [rsp+rbx]
    &[0x48, 0x8b, 0x0e],                                     // mov rcx, [rsi]
    &[0x48, 0x8d, 0x54, 0x73, 0x05],                         // lea rdx, [rbx+rsi*2+5]
    &[0x3a, 0x14, 0x1e, 0x48, 0x0f, 0x42, 0xc2],             // cmp dl, [rsi+rbx]; cmovb rax, rdx
    &[0x48, 0x0f, 0xaf, 0xd0],                               // imul rdx, rax
    &[0x48, 0xc1, 0xe2, 0x03, 0x48, 0xd3, 0xe8],             // shl rdx, 3; shr rax, cl
    &[0x48, 0x01, 0xd1, 0x11, 0xc0, 0x0f, 0x92, 0xc2],       // add rcx, rdx; adc eax, eax; setc dl
    &[0x48, 0x8b, 0x2e, 0x48, 0x83, 0xc6, 0x04],             // mov rbp, [rsi]; add rsi, 4
    &[0x48, 0x83, 0xc7, 0xf0, 0x48, 0x89, 0x4f, 0x08],       // add rdi, -16; mov [rdi+8], rcx
    &[0x4d, 0x8d, 0x6d, 0x02, 0x41, 0x0f, 0xb6, 0x45, 0xfe], // lea r13, [r13+2]; movzx eax, byte [r13-2]
];

/// What moves RBX.
const STEPS: [&[u8]; 9] = [
    &[0x48, 0x83, 0xc3, 0x01],                   // add rbx, 1
    &[0x48, 0x83, 0xc3, 0x10],                   // add rbx, 16
    &[0x48, 0x83, 0xeb, 0x08],                   // sub rbx, 8
    &[0x48, 0x81, 0xc3, 0x00, 0x01, 0x00, 0x00], // add rbx, 256
    &[0x48, 0x8d, 0x5b, 0x03],                   // lea rbx, [rbx+3]
    &[0x48, 0x8d, 0x5b, 0xd0],                   // lea rbx, [rbx-48]
    &[0x48, 0xff, 0xc3],                         // inc rbx
    &[0x83, 0xc3, 0x04],                         // add ebx, 4
    &[],
];

/// What makes the flags for the jump.
const ENDS: [&[u8]; 6] = [
    &[0x4c, 0x39, 0xc3],                         // cmp rbx, r8
    &[0x41, 0x83, 0xe9, 0x01],                   // sub r9d, 1
    &[0x4d, 0x85, 0xc9],                         // test r9, r9
    &[0x48, 0x81, 0xfb, 0x00, 0x08, 0x00, 0x00], // cmp rbx, 2048
    &[0x49, 0x83, 0xc3, 0x7f],                   // add r11, 127
    &[0x41, 0xff, 0xc9],                         // dec r9d
];

/// again: pieces, and between them a step; an end; Jcc again; hlt
fn program(random: &mut Random) -> Vec<u8> {
    let count = 1 + random.below(4);
    let at = random.below(count + 1);
    let mut code = Vec::new();
    for n in 0..=count {
        if n == at {
            code.extend(STEPS[random.below(STEPS.len() as u64) as usize]);
        }
        if n < count {
            code.extend(PIECES[random.below(PIECES.len() as u64) as usize]);
        }
    }
    code.extend(ENDS[random.below(ENDS.len() as u64) as usize]);
    let condition = if random.below(2) == 0 { 5 } else { random.below(16) as u8 };
    let back = (code.len() as u8 + 2).wrapping_neg();
    code.extend([0x70 | condition, back, 0xf4]);
    code
}

/// Somewhere in the pages, and not seldom at an edge.
fn address(random: &mut Random) -> u64 {
    let page = PAGES.any(random);
    match random.below(3) {
        0 => page + random.below(PAGE),
        1 => page + 16 * random.below(PAGE / 16),
        _ => page + PAGE - 1 - random.below(64),
    }
}

fn prepare(machine: &mut Machine, random: &mut Random) {
    for n in 0..16 {
        let value = match n {
            gpr::RSI | gpr::RDI | 13 | 15 => address(random),
            gpr::RBX => random.below(100),
            gpr::RSP if random.below(2) == 0 => STACK_TOP - 0x1000,
            gpr::RSP => address(random),
            8 => 16 * random.below(200),
            9 => random.below(500),
            _ => random.operand(),
        };
        machine.cpu.set_gpr(n, value);
    }
    machine.cpu.budget = if random.below(2) == 0 { random.below(400) as i64 } else { 5000 };
}

#[test]
fn turns_are_those_of_the_interpreter() {
    for seed in 0..ROUNDS {
        let mut random = Random::new(seed);
        let programs: Vec<Vec<u8>> = (0..PROGRAMS).map(|_| program(&mut random)).collect();
        PAGES.compare(&programs, RUNS, prepare);
    }
}
