//! Translations as a cache: links between blocks, code that is written while it is linked, and less room than there is code.
#![cfg(target_arch = "x86_64")]

mod common;

use common::{Machine, CODE};
use softkvm_engine::state::gpr;
use softkvm_engine::virt::control::intercept;

const HLT: u8 = 0xf4;
const EXIT_HLT: u32 = 12;
/// Programs of blocks: one in each so many bytes.
const STRIDE: u64 = 64;

/// Runs the machine to HLT.
fn run(machine: &mut Machine) {
    let cpu = &mut machine.cpu;
    cpu.control.intercepts |= 1 << intercept::HLT;
    cpu.budget = 1 << 40;
    cpu.run();
    assert_eq!(cpu.exit.reason, EXIT_HLT);
}

/// JMP rel32 from behind its own bytes, at `at`, to `to`.
fn jump(at: u64, to: u64) -> Vec<u8> {
    let distance = to.wrapping_sub(at + 5) as i32;
    [&[0xe9][..], &distance.to_le_bytes()].concat()
}

/// `blocks` blocks in a ring, each of which adds to RAX and counts RCX down, and HLT at the end.
fn ring(machine: &mut Machine, blocks: u64) {
    let end = CODE + blocks * STRIDE;
    for n in 0..blocks {
        let at = CODE + n * STRIDE;
        // add rax, imm32; sub rcx, 1; jz end; jmp next
        let mut code = [&[0x48, 0x05][..], &(n as u32 + 1).to_le_bytes(), &[0x48, 0x83, 0xe9, 1, 0x0f, 0x84]].concat();
        code.extend((end.wrapping_sub(at + code.len() as u64 + 4) as i32).to_le_bytes());
        code.extend(jump(at + code.len() as u64, CODE + (n + 1) % blocks * STRIDE));
        machine.poke(at, &code);
    }
    machine.poke(end, &[HLT]);
}

/// What the ring leaves in RAX after `turns` blocks.
fn sum(blocks: u64, turns: u64) -> u64 {
    (0..turns).map(|turn| turn % blocks + 1).sum()
}

#[test]
fn more_code_than_room_runs_all_the_same() {
    const BLOCKS: u64 = 6000;
    let mut machine = Machine::new();
    machine.load(&[HLT]);
    machine.cpu.set_translator_within(1 << 20, Some(1));
    ring(&mut machine, BLOCKS);
    let turns = 5 * BLOCKS - 7;
    machine.cpu.set_gpr(gpr::RAX, 0);
    machine.cpu.set_gpr(gpr::RCX, turns);
    run(&mut machine);
    assert_eq!(machine.cpu.gpr(gpr::RAX), sum(BLOCKS, turns));
    let translator = machine.cpu.translator.as_ref().unwrap();
    assert!(translator.evicted() > BLOCKS && translator.translated() > 2 * BLOCKS, "{} evicted", translator.evicted());
    assert!(translator.bytes() <= 1 << 20);
}

#[test]
fn linked_blocks_run_without_the_dispatcher() {
    const BLOCKS: u64 = 200;
    let mut machine = Machine::new();
    machine.load(&[HLT]);
    machine.cpu.set_translator(Some(1));
    ring(&mut machine, BLOCKS);
    machine.cpu.set_gpr(gpr::RCX, 100 * BLOCKS);
    run(&mut machine);
    assert!(machine.cpu.blocks_run < 5 * BLOCKS, "{} entries", machine.cpu.blocks_run);
    assert!(machine.cpu.native.counts.links >= BLOCKS);
}

#[test]
fn blocks_that_the_jump_cache_has_forgotten_are_linked() {
    const BLOCKS: u64 = 50;
    /// Two addresses that differ so have the same place in the jump cache.
    const ALIAS: u64 = 1 << 21 | 1 << 6;
    let mut machine = Machine::new();
    machine.load(&[HLT]);
    machine.cpu.set_translator(Some(16));
    ring(&mut machine, BLOCKS);
    let places: Vec<u64> = (CODE..=CODE + BLOCKS * STRIDE).step_by(STRIDE as usize).flat_map(|at| [at, at + 15]).collect();
    for pair in places.windows(2) {
        machine.poke(pair[0] ^ ALIAS, &jump(pair[0] ^ ALIAS, pair[1] ^ ALIAS));
    }
    machine.poke(places[places.len() - 1] ^ ALIAS, &[HLT]);
    for (start, turns) in [(CODE, 3 * BLOCKS), (CODE ^ ALIAS, 0), (CODE, 200 * BLOCKS)] {
        machine.set_rip(start);
        machine.cpu.set_gpr(gpr::RCX, turns);
        run(&mut machine);
    }
    assert!(machine.cpu.blocks_run < 60 * BLOCKS, "{} entries", machine.cpu.blocks_run);
}

#[test]
fn a_linked_block_that_is_rewritten_is_left() {
    let mut machine = Machine::new();
    let (victim, page_ahead) = (CODE + 0x200, CODE + 0x1000);
    // again: call victim; call page_ahead; dec ecx; jz done; cmp ecx, 50; jne again; mov byte [rel victim + 1], 7;
    //        mov byte [rel page_ahead + 1], 9; jmp again; done: hlt
    let mut code = Vec::new();
    let call = |code: &mut Vec<u8>, to: u64| {
        let distance = to.wrapping_sub(CODE + code.len() as u64 + 5) as i32;
        code.push(0xe8);
        code.extend(distance.to_le_bytes());
    };
    call(&mut code, victim);
    call(&mut code, page_ahead);
    code.extend([0xff, 0xc9, 0x74, 0x15, 0x83, 0xf9, 50, 0x75, 0xed]);
    for (to, value) in [(victim + 1, 7), (page_ahead + 1, 9)] {
        let distance = to.wrapping_sub(CODE + code.len() as u64 + 7) as i32;
        code.extend([0xc6, 0x05]);
        code.extend(distance.to_le_bytes());
        code.push(value);
    }
    code.extend([0xeb, 0xdd, HLT]);
    machine.load(&code);
    for at in [victim, page_ahead] {
        machine.poke(at, &[0xb2, 1, 0x48, 0x0f, 0xb6, 0xd2, 0x48, 0x01, 0xd0, 0xc3]);
        // mov dl, 1; movzx rdx, dl; add rax, rdx; ret
    }
    machine.cpu.set_translator(Some(1));
    machine.cpu.set_gpr(gpr::RAX, 0);
    machine.cpu.set_gpr(gpr::RCX, 100);
    run(&mut machine);
    assert_eq!(machine.cpu.gpr(gpr::RAX), 50 * 2 + 50 * (7 + 9));
}

/// Programs of calls and returns that end with HLT, with a count in RCX.
const CALLS: [(&str, &[u8]); 8] = [
    // call f; hlt; f: dec rcx; jz r; call f; inc rax; r: ret
    (
        "deeper than the host's stack has room for",
        &[
            0xe8, 0x01, 0, 0, 0, 0xf4, 0x48, 0xff, 0xc9, 0x74, 0x08, 0xe8, 0xf6, 0xff, 0xff, 0xff, 0x48, 0xff, 0xc0, 0xc3, //
        ],
    ),
    // a: lea rdx, [rip + b]; call f; b: dec rcx; jnz a; hlt; f: add rax, rcx; pop rdx; jmp rdx
    (
        "a jump in the place of a return",
        &[
            0x48, 0x8d, 0x15, 0x05, 0, 0, 0, 0xe8, 0x06, 0, 0, 0, 0x48, 0xff, 0xc9, 0x75, 0xef, 0xf4, 0x48, 0x01, 0xc8, 0x5a, 0xff,
            0xe2, //
        ],
    ),
    // a: call f; hlt; b: dec rcx; jnz a; hlt; f: inc rax; add qword ptr [rsp], 1; ret
    (
        "a return elsewhere",
        &[
            0xe8, 0x07, 0, 0, 0, 0xf4, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xf4, 0x48, 0xff, 0xc0, 0x48, 0x83, 0x04, 0x24, 0x01, 0xc3, //
        ],
    ),
    // a: push rcx; call f; dec rcx; jnz a; hlt; f: add rax, [rsp + 8]; ret 8
    (
        "a return that releases arguments",
        &[
            0x51, 0xe8, 0x06, 0, 0, 0, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xf4, 0x48, 0x03, 0x44, 0x24, 0x08, 0xc2, 0x08, 0, //
        ],
    ),
    // mov rbx, rsp; sub rbx, 0x1000; lea rdx, [rip + g]; mov [rbx], rdx; a: call s; dec rcx; jnz a; hlt; s: xchg rbx, rsp; ret;
    // g: add rax, rcx; call s; jmp g
    (
        "two stacks",
        &[
            0x48, 0x89, 0xe3, 0x48, 0x81, 0xeb, 0, 0x10, 0, 0, 0x48, 0x8d, 0x15, 0x12, 0, 0, 0, 0x48, 0x89, 0x13, 0xe8, 0x06, 0, 0, 0,
            0x48, 0xff, 0xc9, 0x75, 0xf6, 0xf4, 0x48, 0x87, 0xe3, 0xc3, 0x48, 0x01, 0xc8, 0xe8, 0xf4, 0xff, 0xff, 0xff, 0xeb, 0xf6, //
        ],
    ),
    // lea rdx, [rip + f]; mov [rsp - 64], rdx; a: call rdx; call [rsp - 64]; dec rcx; jnz a; hlt; f: add rax, rcx; ret
    (
        "calls through a register and through memory",
        &[
            0x48, 0x8d, 0x15, 0x11, 0, 0, 0, 0x48, 0x89, 0x54, 0x24, 0xc0, 0xff, 0xd2, 0xff, 0x54, 0x24, 0xc0, 0x48, 0xff, 0xc9, 0x75,
            0xf5, 0xf4, 0x48, 0x01, 0xc8, 0xc3, //
        ],
    ),
    // mov byte [0], 0xf4 (hlt); call f; hlt; f: inc rax; push 0; ret
    (
        "a return to where no call came from",
        &[
            0xc6, 0x04, 0x25, 0, 0, 0, 0, 0xf4, 0xe8, 0x01, 0, 0, 0, 0xf4, 0x48, 0xff, 0xc0, 0x6a, 0, 0xc3, //
        ],
    ),
    // a: call f; b: mov dl, 1; movzx edx, dl; add rax, rdx; dec rcx; jnz a; hlt; f: mov byte [rip + b + 1], cl; ret
    (
        "code behind the call that is rewritten before the return",
        &[
            0xe8, 0x0e, 0, 0, 0, 0xb2, 0x01, 0x0f, 0xb6, 0xd2, 0x48, 0x01, 0xd0, 0x48, 0xff, 0xc9, 0x75, 0xee, 0xf4, 0x88, 0x0d, 0xed,
            0xff, 0xff, 0xff, 0xc3, //
        ],
    ),
];

#[test]
fn calls_and_returns_of_every_kind_go_where_they_say() {
    let outcome = |code: &[u8], at: u64, tier: Option<u32>| {
        let mut machine = Machine::new();
        machine.load(&[HLT]);
        machine.poke(at, code);
        machine.poke(CODE, &jump(CODE, at));
        machine.cpu.set_translator(tier);
        (0..16).filter(|n| *n != gpr::RSP).for_each(|n| machine.cpu.set_gpr(n, 0));
        machine.cpu.set_gpr(gpr::RCX, 5000);
        run(&mut machine);
        let registers: Vec<u64> = (0..16).map(|n| machine.cpu.gpr(n)).collect();
        (registers, machine.cpu.rip(), machine.cpu.instructions())
    };
    for (name, code) in CALLS {
        // In one page, and with the end of a page behind each of the first instructions.
        for at in std::iter::once(CODE + 0x400).chain((0..14).map(|n| CODE + 0x1000 - n)) {
            assert_eq!(outcome(code, at, None), outcome(code, at, Some(1)), "{name}, at {at:#x}");
        }
    }
}
