//! Near control transfers.

mod common;

use common::{Machine, CODE, DATA, STACK_TOP};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::state::{gpr, rflags};
use softkvm_engine::uop::Stop;

const NOT_CANONICAL: u64 = 1 << 47;

/// Conditions as the manual defines them (SDM vol. 1, app. B).
fn condition(number: u8, flags: u64) -> bool {
    let set = |flag| flags & flag != 0;
    let less = set(rflags::SF) != set(rflags::OF);
    let positive = [
        set(rflags::OF),
        set(rflags::CF),
        set(rflags::ZF),
        set(rflags::CF) || set(rflags::ZF),
        set(rflags::SF),
        set(rflags::PF),
        less,
        less || set(rflags::ZF),
    ];
    positive[usize::from(number / 2)] != (number % 2 == 1)
}

#[test]
fn every_condition_with_every_combination_of_flags() {
    const FLAGS: [u64; 5] = [rflags::CF, rflags::PF, rflags::ZF, rflags::SF, rflags::OF];
    let mut machine = Machine::new();
    for number in 0..16 {
        for combination in 0..32 {
            let image = FLAGS.iter().enumerate().filter(|(n, _)| combination >> n & 1 != 0).map(|(_, flag)| flag).sum();
            machine.set_flags(image);
            machine.run(&[0x70 + number, 0x10], 1).unwrap();
            let short = CODE + 2 + if condition(number, image) { 0x10 } else { 0 };
            assert_eq!(machine.cpu.rip(), short, "condition {number:x}, flags {image:x}");
            machine.run(&[0x0f, 0x80 + number, 0, 0xff, 0xff, 0xff], 1).unwrap();
            let near = if condition(number, image) { CODE + 6 - 0x100 } else { CODE + 6 };
            assert_eq!(machine.cpu.rip(), near);
        }
    }
}

#[test]
fn branches_on_the_result_of_arithmetic() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RAX, 5);
    for (immediate, jump, taken) in [(5, 0x74, true), (5, 0x75, false), (6, 0x7c, true), (6, 0x72, true), (4, 0x7f, true), (5, 0x76, true)]
    {
        machine.run(&[0x83, 0xf8, immediate, jump, 2], 2).unwrap(); // cmp eax, imm; jcc
        assert_eq!(machine.cpu.rip() == CODE + 7, taken, "{immediate} {jump:x}");
    }
}

#[test]
fn jumps_calls_and_returns() {
    let mut machine = Machine::new();
    machine.run(&[0xe8, 0xfb, 0, 0, 0], 1).unwrap(); // call +0x100
    assert_eq!(machine.cpu.rip(), CODE + 0x100);
    assert_eq!(machine.bytes(STACK_TOP - 8), (CODE + 5).to_le_bytes());
    machine.poke(CODE + 0x100, &[0xc2, 0x10, 0]); // ret 16
    machine.step().unwrap();
    assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RSP)), (CODE + 5, STACK_TOP + 16));
    machine.cpu.set_gpr(gpr::RBX, DATA);
    machine.poke(DATA + 8, &0x9000u64.to_le_bytes());
    machine.run(&[0xff, 0x63, 8], 1).unwrap(); // jmp [rbx + 8]
    assert_eq!(machine.cpu.rip(), 0x9000);
    machine.run(&[0xff, 0xd3], 1).unwrap(); // call rbx
    assert_eq!(machine.cpu.rip(), DATA);
    machine.run(&[0xeb, 0xfe], 1).unwrap(); // jmp $
    assert_eq!(machine.cpu.rip(), CODE);
}

#[test]
fn targets_that_are_not_canonical_change_nothing() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RAX, NOT_CANONICAL);
    machine.poke(STACK_TOP, &NOT_CANONICAL.to_le_bytes());
    for code in [&[0xffu8, 0xe0] as &[u8], &[0xff, 0xd0], &[0xff, 0x24, 0x24], &[0xff, 0x14, 0x24], &[0xc3], &[0xc2, 8, 0]] {
        assert_eq!(machine.run(code, 1), Err(Stop::Fault), "{code:x?}");
        assert_eq!((machine.vector(), machine.cpu.fault.error), (vector::GP, Some(0)));
        assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RSP)), (CODE, STACK_TOP));
        assert_eq!(machine.bytes(STACK_TOP - 8), [0; 8]);
    }
}

#[test]
fn targets_outside_the_code_segment_change_nothing() {
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.cpu.set_gpr(gpr::RAX, 0x1_0000);
    machine.load(&[0x66, 0xff, 0xe0]); // jmp eax
    assert_eq!(machine.step(), Err(Stop::Fault));
    assert_eq!((machine.vector(), machine.cpu.rip()), (vector::GP, CODE));
    machine.load(&[0x66, 0xe9, 0, 0, 1, 0]); // jmp +0x10000
    assert_eq!(machine.step(), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::GP);
}

#[test]
fn narrow_code_wraps() {
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.poke(0x10, &[0xeb, 0xe0]); // jmp -0x20
    machine.set_rip(0x10);
    machine.step().unwrap();
    assert_eq!(machine.cpu.rip(), 0xfff2);
    machine.run(&[0xe8, 0xfd, 0x7f], 1).unwrap(); // call +0x7ffd
    assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RSP)), (0, 0x6ffe));
    assert_eq!(machine.bytes::<2>(0x6ffe), (CODE as u16 + 3).to_le_bytes());
    let mut machine = Machine::with_size(CodeSize::Bits32);
    machine.run(&[0x66, 0xe9, 0, 0x80], 1).unwrap(); // jmp with 16-bit operand size
    assert_eq!(machine.cpu.rip(), CODE + 4 - 0x8000);
}

#[test]
fn loops() {
    const HERE: u64 = CODE;
    const NEXT: u64 = CODE + 2;
    let mut machine = Machine::new();
    for (opcode, flags, rcx, rip) in [
        (0xe2, 0, 2, HERE),
        (0xe2, 0, 1, NEXT),
        (0xe2, 0, 0, HERE),
        (0xe1, rflags::ZF, 2, HERE),
        (0xe1, 0, 2, NEXT),
        (0xe0, 0, 2, HERE),
        (0xe0, rflags::ZF, 2, NEXT),
    ] {
        machine.set_flags(flags);
        machine.cpu.set_gpr(gpr::RCX, rcx);
        machine.run(&[opcode, 0xfe], 1).unwrap();
        assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RCX)), (rip, rcx.wrapping_sub(1)), "{opcode:x}");
    }
    machine.cpu.set_gpr(gpr::RCX, 0x1_0000_0001);
    machine.run(&[0x67, 0xe2, 0xfd], 1).unwrap(); // loop on ECX
    assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RCX)), (CODE + 3, 0));
    machine.cpu.set_gpr(gpr::RCX, 1 << 32);
    machine.run(&[0x67, 0xe3, 5], 1).unwrap(); // jecxz
    assert_eq!(machine.cpu.rip(), CODE + 8);
    machine.run(&[0xe3, 5], 1).unwrap(); // jrcxz
    assert_eq!(machine.cpu.rip(), CODE + 2);
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.cpu.set_gpr(gpr::RCX, 0x7777_0001);
    machine.run(&[0xe2, 0xfe], 1).unwrap();
    assert_eq!((machine.cpu.rip(), machine.cpu.gpr(gpr::RCX)), (CODE + 2, 0x7777_0000));
}
