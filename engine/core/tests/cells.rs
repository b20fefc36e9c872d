//! What translated code remembers of translations at each access: it is gone with the translation that it was copied from, however that is
//! taken away, and holds for the page that it was copied for (SDM vol. 3, 4.10.4).

mod common;

use common::{Machine, CODE};
use softkvm_engine::fault::vector;
use softkvm_engine::memory::nested::right;
use softkvm_engine::state::{cr4, gpr};
use softkvm_engine::virt::control::intercept;

const HLT: u8 = 0xf4;
const EXIT_EXCEPTION: u32 = 0;
const EXIT_HLT: u32 = 12;
const EXIT_NESTED: u32 = 48;
const PAGE: u64 = 4096;
/// A page of the guest, and frames that it is mapped to.
const PLACE: u64 = 0x18_0000;
const FRAMES: [u64; 2] = [0x1a_0000, 0x1c_0000];
/// Where a program leaves what it has read.
const RESULTS: u64 = 0x4_0000;
const DESCRIPTOR: u64 = 0x4_8000;
/// Bytes that one way of a table of the TLB covers.
const TLB_REACH: u64 = 16 << 20;
const TURNS: u64 = 12;

/// A machine that translates everything, and its frames filled with different bytes.
fn machine() -> Machine {
    let mut machine = Machine::new();
    for (n, frame) in FRAMES.into_iter().enumerate() {
        machine.slice(frame, PAGE as usize).fill(0x11 * (n as u8 + 1));
    }
    machine.map(PLACE, FRAMES[0]);
    machine.cpu.state.cr4 |= cr4::PCIDE;
    machine.cpu.refresh();
    machine.cpu.set_translator(Some(1));
    machine.cpu.control.intercepts |= 1 << intercept::HLT;
    machine
}

/// Runs `code` to an exit, and returns its reason.
fn run(machine: &mut Machine, code: &[u8]) -> u32 {
    machine.load(code);
    machine.cpu.budget = 1 << 40;
    machine.cpu.run();
    machine.cpu.exit.reason
}

/// Where the entry of the page of `la` is.
fn entry_of(machine: &Machine, la: u64) -> u64 {
    let mut table = machine.cpu.state.cr3;
    for level in (1..4).rev() {
        let entry = u64::from_le_bytes(machine.bytes(table + (la >> (12 + 9 * level) & 511) * 8));
        table = entry & 0x000f_ffff_ffff_f000;
    }
    table + (la >> 12 & 511) * 8
}

/// What may follow a change of the page's entry. RBX is the page, R12 a descriptor of it.
const INVALIDATIONS: [(&str, &[u8]); 9] = [
    ("invlpg [rbx]", &[0x0f, 0x01, 0x3b]),
    ("mov rax, cr3; mov cr3, rax", &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]),
    ("xor r9d, r9d; invpcid r9, [r12]", &[0x45, 0x31, 0xc9, 0x66, 0x45, 0x0f, 0x38, 0x82, 0x0c, 0x24]),
    ("mov r9d, 1; invpcid r9, [r12]", &[0x41, 0xb9, 1, 0, 0, 0, 0x66, 0x45, 0x0f, 0x38, 0x82, 0x0c, 0x24]),
    ("mov r9d, 2; invpcid r9, [r12]", &[0x41, 0xb9, 2, 0, 0, 0, 0x66, 0x45, 0x0f, 0x38, 0x82, 0x0c, 0x24]),
    ("mov r9d, 3; invpcid r9, [r12]", &[0x41, 0xb9, 3, 0, 0, 0, 0x66, 0x45, 0x0f, 0x38, 0x82, 0x0c, 0x24]),
    ("mov rax, cr4; xor eax, PGE; mov cr4, rax", &[0x0f, 0x20, 0xe0, 0x35, 0x80, 0, 0, 0, 0x0f, 0x22, 0xe0]),
    ("mov rax, cr0; xor eax, WP; mov cr0, rax", &[0x0f, 0x20, 0xc0, 0x35, 0, 0, 1, 0, 0x0f, 0x22, 0xc0]),
    (
        "mov rax, [rbx + 16 MB]; mov rax, [rbx + 32 MB], which take its places",
        &[0x48, 0x8b, 0x83, 0, 0, 0, 1, 0x48, 0x8b, 0x83, 0, 0, 0, 2],
    ),
];

#[test]
fn a_cell_dies_with_its_translation() {
    for (name, invalidation) in INVALIDATIONS {
        let mut machine = machine();
        [1, 2].into_iter().for_each(|n| machine.map(PLACE + n * TLB_REACH, FRAMES[0]));
        machine.poke(DESCRIPTOR, &[0u64.to_le_bytes(), PLACE.to_le_bytes()].concat());
        // again: mov rax, [rbx]; mov [rdi], rax; add rdi, 8; xor [rsi], r8; ...; dec r10d; jnz again; hlt
        let head = [0x48, 0x8b, 0x03, 0x48, 0x89, 0x07, 0x48, 0x83, 0xc7, 0x08, 0x4c, 0x31, 0x06];
        let mut code = [&head, invalidation, &[0x41, 0xff, 0xca, 0x75]].concat();
        code.extend([(-(code.len() as i32 + 1)) as u8, HLT]);
        let entry = entry_of(&machine, PLACE);
        let registers =
            [(gpr::RBX, PLACE), (gpr::RSI, entry), (gpr::RDI, RESULTS), (8, FRAMES[0] ^ FRAMES[1]), (10, TURNS), (12, DESCRIPTOR)];
        registers.into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
        assert_eq!(run(&mut machine, &code), EXIT_HLT, "{name}");
        let found: Vec<u8> = (0..TURNS).map(|turn| machine.bytes::<1>(RESULTS + 8 * turn)[0]).collect();
        let expected: Vec<u8> = (0..TURNS).map(|turn| 0x11 * (turn as u8 % 2 + 1)).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn an_address_space_has_cells_of_its_own() {
    let mut machine = machine();
    let (first, second) = (machine.cpu.state.cr3, 0x2f_0000);
    // A second root that differs in the place of the page: copies of all tables on the way there.
    let mut table = first;
    for (level, copy) in (0..4).rev().zip([second, second + PAGE, second + 2 * PAGE, second + 3 * PAGE]) {
        let entries = machine.peek(table, PAGE as usize);
        machine.poke(copy, &entries);
        let at = (PLACE >> (12 + 9 * level) & 511) * 8;
        table = u64::from_le_bytes(machine.bytes(table + at)) & 0x000f_ffff_ffff_f000;
        let next = if level == 0 { FRAMES[1] } else { copy + PAGE };
        machine.poke(copy + at, &(next | 0x67).to_le_bytes());
    }
    // again: mov rax, [rbx]; mov [rdi], rax; add rdi, 8; mov rax, cr3; xor rax, r8; bts rax, 63; mov cr3, rax; dec r10d; jnz again; hlt
    let code = [
        0x48, 0x8b, 0x03, 0x48, 0x89, 0x07, 0x48, 0x83, 0xc7, 0x08, 0x0f, 0x20, 0xd8, 0x4c, 0x31, 0xc0, 0x48, 0x0f, 0xba, 0xe8, 0x3f, 0x0f,
        0x22, 0xd8, 0x41, 0xff, 0xca, 0x75, 0xe3, HLT,
    ];
    let registers = [(gpr::RBX, PLACE), (gpr::RDI, RESULTS), (8, first ^ second ^ 1), (10, TURNS)];
    registers.into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
    assert_eq!(run(&mut machine, &code), EXIT_HLT);
    let found: Vec<u8> = (0..TURNS).map(|turn| machine.bytes::<1>(RESULTS + 8 * turn)[0]).collect();
    assert_eq!(found, (0..TURNS).map(|turn| 0x11 * (turn as u8 % 2 + 1)).collect::<Vec<_>>());
}

#[test]
fn what_may_be_accessed_with_ac_set_may_not_be_without() {
    let mut machine = machine();
    machine.map_supervisor_with_key(CODE, 0);
    machine.cpu.state.cr4 |= cr4::SMAP;
    machine.cpu.refresh();
    machine.cpu.control.exception_bitmap = 1 << vector::PF;
    machine.cpu.set_gpr(gpr::RBX, PLACE);
    // stac; again: mov rax, [rbx]; inc rdx; clac; jmp again
    let code = [0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x03, 0x48, 0xff, 0xc2, 0x0f, 0x01, 0xca, 0xeb, 0xf5];
    machine.cpu.set_gpr(gpr::RDX, 0);
    assert_eq!(run(&mut machine, &code), EXIT_EXCEPTION);
    assert_eq!((machine.cpu.exit.qualification, machine.cpu.gpr(gpr::RDX)), (PLACE, 1));
}

#[test]
fn the_hypervisor_takes_rights_away() {
    const READ: [u8; 4] = [0x48, 0x8b, 0x03, HLT];
    const WRITE: [u8; 4] = [0x48, 0x89, 0x03, HLT];
    for (code, kept, reason) in [
        (READ, right::READ | right::WRITE, EXIT_HLT),
        (READ, right::READ, EXIT_HLT),
        (READ, 0, EXIT_NESTED),
        (WRITE, right::READ | right::WRITE, EXIT_HLT),
        (WRITE, right::READ, EXIT_NESTED),
        (WRITE, 0, EXIT_NESTED),
    ] {
        let mut machine = machine();
        machine.cpu.npt.attach(&machine.cpu.signal.clone());
        machine.cpu.set_gpr(gpr::RBX, PLACE);
        (0..3).for_each(|_| assert_eq!(run(&mut machine, &code), EXIT_HLT));
        machine.cpu.npt.protect(FRAMES[0], PAGE, kept).expect("RAM");
        assert_eq!(run(&mut machine, &code), reason, "{code:x?} with {kept}");
    }
}

#[test]
fn writes_to_a_page_that_becomes_code_are_noticed() {
    let mut machine = machine();
    // again: mov [rbx + 1], cl; cmp ecx, 50; ja on; call rbx; add rdx, rax; on: dec ecx; jnz again; hlt
    let code = [0x88, 0x4b, 0x01, 0x83, 0xf9, 50, 0x77, 0x05, 0xff, 0xd3, 0x48, 0x01, 0xc2, 0xff, 0xc9, 0x75, 0xef, HLT];
    // mov al, 0; movzx eax, al; ret
    machine.poke(FRAMES[0], &[0xb0, 0, 0x0f, 0xb6, 0xc0, 0xc3]);
    [(gpr::RBX, PLACE), (gpr::RCX, 100), (gpr::RDX, 0)].into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
    assert_eq!(run(&mut machine, &code), EXIT_HLT);
    assert_eq!(machine.cpu.gpr(gpr::RDX), (1..=50).sum::<u64>());
}

#[test]
fn an_access_across_two_pages_is_not_one_to_the_second() {
    let mut machine = machine();
    machine.map(PLACE + PAGE, FRAMES[0] - 8 * PAGE);
    for at in 0..2 * PAGE {
        let frame = if at < PAGE { FRAMES[0] } else { FRAMES[0] - 9 * PAGE };
        machine.poke(frame + at, &[at as u8 ^ (at >> 8) as u8]);
    }
    // again: add rax, [rbx]; dec rbx; dec ecx; jnz again; hlt
    let code = [0x48, 0x03, 0x03, 0x48, 0xff, 0xcb, 0xff, 0xc9, 0x75, 0xf6, HLT];
    let start = PAGE + 20;
    let registers = [(gpr::RAX, 0), (gpr::RBX, PLACE + start), (gpr::RCX, 40)];
    registers.into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
    assert_eq!(run(&mut machine, &code), EXIT_HLT);
    let word = |at: u64| u64::from_le_bytes(std::array::from_fn(|n| (at + n as u64) as u8 ^ ((at + n as u64) >> 8) as u8));
    assert_eq!(machine.cpu.gpr(gpr::RAX), (0..40).map(|n| word(start - n)).fold(0, u64::wrapping_add));
}

#[test]
fn an_access_that_wanders_goes_without_a_cell() {
    let mut machine = machine();
    let frames: Vec<u64> = (0..16).map(|n| 0x10_0000 + (n * 5 % 16) * PAGE).collect();
    for (n, frame) in frames.iter().enumerate() {
        machine.map(PLACE + n as u64 * PAGE, *frame);
        machine.poke(*frame, &[n as u8]);
    }
    // again: movzx edx, byte [rbx]; add rax, rdx; add ebx, 4096; and ebx, 0x18ffff; inc dword [rsi]; dec ecx; jnz again; hlt
    let code = [
        0x0f, 0xb6, 0x13, 0x48, 0x01, 0xd0, 0x81, 0xc3, 0, 0x10, 0, 0, 0x81, 0xe3, 0xff, 0xff, 0x18, 0, 0xff, 0x06, 0xff, 0xc9, 0x75, 0xe8,
        HLT,
    ];
    let registers = [(gpr::RAX, 0), (gpr::RBX, PLACE), (gpr::RCX, 1600), (gpr::RSI, RESULTS)];
    registers.into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
    assert_eq!(run(&mut machine, &code), EXIT_HLT);
    assert_eq!(machine.cpu.gpr(gpr::RAX), 100 * (0..16).sum::<u64>());
    assert_eq!(u32::from_le_bytes(machine.bytes(RESULTS)), 1600);
    let block = machine.cpu.code.find(&machine.cpu.code_key(machine.data() - 0x10_0000 + CODE)).expect("the loop");
    // SAFETY: the code cache keeps the block, and nothing runs.
    assert_eq!(unsafe { (*block).wandering }, 1, "the byte's page changes each time, the counter's never");
}

#[test]
fn only_what_runs_all_the_time_gets_cells() {
    let mut machine = machine();
    machine.cpu.set_translator(Some(32));
    machine.cpu.clock.tick = u64::MAX;
    // again: add eax, [rbx]; dec ecx; jnz again; hlt
    let code = [0x03, 0x03, 0xff, 0xc9, 0x75, 0xfa, HLT];
    for (turns, busy) in [(10_000, false), (100_000, true)] {
        machine.load(&code);
        [(gpr::RBX, PLACE), (gpr::RCX, turns)].into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
        machine.cpu.run();
        let block = machine.cpu.code.find(&machine.cpu.code_key(machine.data() - 0x10_0000 + CODE)).expect("the loop");
        // SAFETY: the code cache keeps the block, and nothing runs.
        assert_eq!(unsafe { (*block).busy }, busy, "{turns}");
    }
}
