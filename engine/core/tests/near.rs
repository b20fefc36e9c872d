//! Accesses beside each other, of which host code looks up the first: random ones around the edges of pages that may not be written or are
//! not there, with everything between them that moves their bases; the interpreter's state is compared.
#![cfg(target_arch = "x86_64")]

mod common;

use common::pages::{Pages, PAGE};
use common::{Machine, Random};
use softkvm_engine::state::gpr;

/// No frame is behind the one before.
const PAGES: Pages = Pages { frames: &[2, 0, 3, 1], read_only: 2 };
const ROUNDS: u64 = 20;
const PROGRAMS: u64 = 600;
const RUNS: u64 = 8;

/// Bases RBX, RSP and R12 and what is done with them.
const PIECES: [&[u8]; 28] = [
    &[0x55],                                     // push rbp
    &[0x50],                                     // push rax
    &[0x41, 0x55],                               // push r13
    &[0x6a, 0x85],                               // push -123
    &[0x5d],                                     // pop rbp
    &[0x5a],                                     // pop rdx
    &[0x41, 0x5f],                               // pop r15
    &[0x48, 0x8b, 0x44, 0x24, 0x10],             // mov rax, [rsp+16]
    &[0x48, 0x89, 0x54, 0x24, 0xf8],             // mov [rsp-8], rdx
    &[0x4c, 0x8b, 0x6c, 0x24, 0x08],             // mov r13, [rsp+8]
    &[0x48, 0x83, 0xec, 0x18],                   // sub rsp, 24
    &[0x48, 0x8d, 0x64, 0x24, 0x20],             // lea rsp, [rsp+32]
    &[0x8b, 0x03],                               // mov eax, [rbx]
    &[0x66, 0x89, 0x43, 0x3d],                   // mov [rbx+61], ax
    &[0x48, 0x03, 0x53, 0xe4],                   // add rdx, [rbx-28]
    &[0x83, 0x6b, 0x04, 0x07],                   // sub dword [rbx+4], 7
    &[0x0f, 0xb6, 0x6b, 0x0b],                   // movzx ebp, byte [rbx+11]
    &[0x4c, 0x89, 0xbb, 0xd0, 0x00, 0x00, 0x00], // mov [rbx+208], r15
    &[0x48, 0x83, 0xc3, 0x08],                   // add rbx, 8
    &[0x49, 0x89, 0xdc],                         // mov r12, rbx
    &[0x4c, 0x89, 0xe3],                         // mov rbx, r12
    &[0x49, 0x8b, 0x44, 0x24, 0x18],             // mov rax, [r12+24]
    &[0x45, 0x89, 0x6c, 0x24, 0xfc],             // mov [r12-4], r13d
    &[0x0f, 0x10, 0x03],                         // movups xmm0, [rbx]
    &[0x0f, 0x29, 0x43, 0x10],                   // movaps [rbx+16], xmm0
    &[0x45, 0x31, 0xff, 0x4c, 0x0f, 0xaf, 0xe8], // xor r15d, r15d; imul r13, rax
    &[0x41, 0x0f, 0x92, 0xc5, 0x48, 0x11, 0xc2], // setc r13b; adc rdx, rax
    &[0x41, 0x0f, 0x01, 0xe7],                   // smsw r15d, which the interpreter runs
];

/// again: pieces; sub cl, 1; jne again; hlt
fn program(random: &mut Random) -> Vec<u8> {
    let count = 2 + random.below(9);
    let mut code = Vec::new();
    for _ in 0..count {
        code.extend(PIECES[random.below(PIECES.len() as u64) as usize]);
    }
    code.extend([0x80, 0xe9, 0x01]);
    let back = (code.len() as u8 + 2).wrapping_neg();
    code.extend([0x75, back, 0xf4]);
    code
}

/// Somewhere in the pages, and mostly at an edge.
fn address(random: &mut Random) -> u64 {
    let page = PAGES.any(random);
    match random.below(4) {
        0 => page + random.below(PAGE),
        1 => page + 16 * random.below(8),
        _ => page + PAGE - random.below(128),
    }
}

fn prepare(machine: &mut Machine, random: &mut Random) {
    for n in 0..16 {
        let value = if [gpr::RBX, gpr::RSP, 12].contains(&n) { address(random) } else { random.operand() };
        machine.cpu.set_gpr(n, value);
    }
    machine.cpu.set_gpr(gpr::RCX, 1 + random.below(20));
    machine.cpu.budget = 1000;
}

#[test]
fn accesses_beside_each_other_are_those_of_the_interpreter() {
    for seed in 0..ROUNDS {
        let mut random = Random::new(seed);
        let programs: Vec<Vec<u8>> = (0..PROGRAMS).map(|_| program(&mut random)).collect();
        PAGES.compare(&programs, RUNS, prepare);
    }
}
