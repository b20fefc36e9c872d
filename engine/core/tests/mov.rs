//! Data movement and the stack against the host's CPU, and by the manual where the host cannot help.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Form, Immediate};
use common::{Machine, DATA, STACK_TOP};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::state::{gpr, rflags};
use softkvm_engine::uop::Stop;

const ROUNDS: usize = 60;

#[test]
fn mov_between_registers_memory_and_immediates() {
    let mut both = Comparison::new(1);
    for opcode in [&[0x88u8] as &'static [u8], &[0x89], &[0x8a], &[0x8b]] {
        both.check_modrm(&Form::new(opcode), ROUNDS);
    }
    both.check_modrm(&Form { extension: Some(0), immediate: Immediate::Byte, sizes: 1, ..Form::new(&[0xc6]) }, ROUNDS);
    both.check_modrm(&Form { extension: Some(0), immediate: Immediate::Word, ..Form::new(&[0xc7]) }, ROUNDS);
}

#[test]
fn widening_moves() {
    let mut both = Comparison::new(2);
    for opcode in [&[0x0fu8, 0xb6] as &'static [u8], &[0x0f, 0xb7], &[0x0f, 0xbe], &[0x0f, 0xbf], &[0x63]] {
        both.check_modrm(&Form::new(opcode), ROUNDS);
    }
    for code in [&[0x98u8] as &[u8], &[0x66, 0x98], &[0x48, 0x98], &[0x99], &[0x66, 0x99], &[0x48, 0x99]] {
        for _ in 0..ROUNDS {
            let registers = both.registers();
            both.check(code, registers, u64::MAX);
        }
    }
}

#[test]
fn conditional_moves_and_sets() {
    let mut both = Comparison::new(3);
    const CMOV: [[u8; 2]; 16] = opcodes(0x40);
    const SET: [[u8; 2]; 16] = opcodes(0x90);
    for n in 0..16 {
        both.check_modrm(&Form::new(&CMOV[n]), ROUNDS);
        both.check_modrm(&Form { extension: Some(0), sizes: 1, ..Form::new(&SET[n]) }, ROUNDS);
    }
}

const fn opcodes(first: u8) -> [[u8; 2]; 16] {
    let mut all = [[0x0f, 0]; 16];
    let mut n = 0;
    while n < 16 {
        all[n][1] = first + n as u8;
        n += 1;
    }
    all
}

#[test]
fn exchanges_and_byte_order() {
    let mut both = Comparison::new(4);
    both.check_modrm(&Form::new(&[0x86]), ROUNDS);
    both.check_modrm(&Form::new(&[0x87]), ROUNDS);
    both.check_modrm(&Form { lock: true, ..Form::new(&[0x87]) }, ROUNDS);
    for opcode in [&[0x0fu8, 0x38, 0xf0] as &'static [u8], &[0x0f, 0x38, 0xf1], &[0x0f, 0xc3]] {
        let sizes = if opcode == [0x0f, 0xc3] { 5 } else { 7 };
        both.check_modrm(&Form { memory_only: true, sizes, ..Form::new(opcode) }, ROUNDS);
    }
    for code in [[0x0f, 0xc8, 0x90], [0x48, 0x0f, 0xcb], [0x49, 0x0f, 0xcf]] {
        let registers = both.registers();
        both.check(&code[..if code[2] == 0x90 { 2 } else { 3 }], registers, u64::MAX);
    }
}

#[test]
fn addresses() {
    let mut both = Comparison::new(5);
    both.check_modrm(&Form { memory_only: true, ..Form::new(&[0x8d]) }, ROUNDS);
    // [rbx + rcx * 8 - 0x80], [ebx + ecx * 4 - 1], [r13 + r12 + 0x12345678], [ebx - 8], [0x12345678], addr32 [0xffffffff87654321]
    for code in [
        &[0x48u8, 0x8d, 0x44, 0xcb, 0x80] as &[u8],
        &[0x67, 0x48, 0x8d, 0x44, 0x8b, 0xff],
        &[0x4f, 0x8d, 0x84, 0x25, 0x78, 0x56, 0x34, 0x12],
        &[0x67, 0x8d, 0x43, 0xf8],
        &[0x48, 0x8d, 0x04, 0x25, 0x78, 0x56, 0x34, 0x12],
        &[0x67, 0x48, 0x8d, 0x04, 0x25, 0x21, 0x43, 0x65, 0x87],
    ] {
        for _ in 0..ROUNDS {
            let registers = both.registers();
            both.check(code, registers, u64::MAX);
        }
    }
}

#[test]
fn addresses_of_narrow_code() {
    let mut machine = Machine::with_size(CodeSize::Bits32);
    machine.cpu.set_gpr(gpr::RBX, DATA + 8);
    machine.poke(DATA, &[1, 2, 3, 4]);
    machine.run(&[0x8b, 0x43, 0xf8], 1).unwrap(); // mov eax, [ebx - 8]
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0x0403_0201);
    machine.run(&[0xa1, 0, 0, 0x10, 0], 1).unwrap(); // mov eax, [0x100000]
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0x0403_0201);
    machine.run(&[0xc7, 0x43, 0xfc, 5, 0, 0, 0], 1).unwrap(); // mov dword [ebx - 4], 5
    assert_eq!(machine.bytes(DATA + 4), [5, 0, 0, 0]);
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.poke(0x1ffe, &[0x34, 0x12]);
    machine.cpu.set_gpr(gpr::RBP, 0x2000);
    machine.run(&[0x8b, 0x46, 0xfe], 1).unwrap(); // mov ax, [bp - 2]
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0x1234);
}

#[test]
fn table_look_up_and_absolute_addresses() {
    let mut both = Comparison::new(6);
    for _ in 0..ROUNDS {
        let mut registers = both.registers();
        registers.gpr[gpr::RBX] = both.machine.data();
        both.check(&[0xd7], registers, u64::MAX);
        let mut absolute = vec![0x48, 0xa1];
        absolute.extend((both.machine.data() + 0x123).to_le_bytes());
        both.check(&absolute, registers, u64::MAX);
        absolute[1] = 0xa3;
        both.check(&absolute, registers, u64::MAX);
    }
}

#[test]
fn flags_in_ah() {
    let mut both = Comparison::new(7);
    for code in [[0x9f], [0x9e]] {
        for _ in 0..ROUNDS {
            let registers = both.registers();
            both.check(&code, registers, u64::MAX);
        }
    }
}

#[test]
fn push_and_pop() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RAX, 0x1122_3344_5566_7788);
    // push rax; push 0xfffffff0; push ax; pop cx; pop rdx; pop rsp
    machine.run(&[0x50, 0x6a, 0xf0, 0x66, 0x50, 0x66, 0x59, 0x5a, 0x5c], 6).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RCX) & 0xffff, 0x7788);
    assert_eq!(machine.cpu.gpr(gpr::RDX), 0xffff_ffff_ffff_fff0);
    assert_eq!(machine.cpu.gpr(gpr::RSP), 0x1122_3344_5566_7788);
}

#[test]
fn push_of_rsp_is_the_old_one_and_pop_computes_its_address_late() {
    let mut machine = Machine::new();
    machine.run(&[0x54, 0x8f, 0x04, 0x24], 1).unwrap(); // push rsp
    assert_eq!(machine.bytes(STACK_TOP - 8), STACK_TOP.to_le_bytes());
    machine.step().unwrap(); // pop [rsp]
    assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP);
    assert_eq!(machine.bytes(STACK_TOP), STACK_TOP.to_le_bytes());
}

#[test]
fn faults_leave_rsp_alone() {
    let mut machine = Machine::new();
    machine.unmap(DATA);
    machine.cpu.set_gpr(gpr::RBX, DATA);
    for code in [&[0x8fu8, 0x03] as &[u8], &[0xff, 0x33]] {
        // pop [rbx], push [rbx]
        assert_eq!(machine.run(code, 1), Err(Stop::Fault));
        assert_eq!((machine.vector(), machine.cpu.fault.payload), (vector::PF, DATA));
        assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP);
    }
    machine.cpu.set_gpr(gpr::RBP, DATA);
    assert_eq!(machine.run(&[0xc9], 1), Err(Stop::Fault)); // leave
    assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP);
    machine.cpu.set_gpr(gpr::RSP, DATA + 0x1000 + 24);
    assert_eq!(machine.run(&[0xc8, 0x20, 0, 0], 1), Err(Stop::Fault)); // enter 32, 0
    assert_eq!((machine.cpu.gpr(gpr::RSP), machine.cpu.gpr(gpr::RBP)), (DATA + 0x1018, DATA));
}

#[test]
fn frames() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RBP, 0x7_0000);
    machine.poke(0x7_0000 - 8, &0xabcdu64.to_le_bytes());
    machine.run(&[0xc8, 0x20, 0, 2, 0xc9], 1).unwrap(); // enter 32, 2
    assert_eq!(machine.cpu.gpr(gpr::RBP), STACK_TOP - 8);
    assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP - 24 - 32);
    assert_eq!(machine.bytes(STACK_TOP - 16), 0xabcdu64.to_le_bytes());
    assert_eq!(machine.bytes(STACK_TOP - 24), (STACK_TOP - 8).to_le_bytes());
    machine.step().unwrap(); // leave
    assert_eq!((machine.cpu.gpr(gpr::RBP), machine.cpu.gpr(gpr::RSP)), (0x7_0000, STACK_TOP));
}

#[test]
fn pusha_and_popa() {
    let mut machine = Machine::with_size(CodeSize::Bits32);
    for number in [0, 1, 2, 3, 5, 6, 7] {
        machine.cpu.set_gpr(number, 0x100 + number as u64);
    }
    machine.run(&[0x60, 0x61], 1).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP - 32);
    assert_eq!(machine.bytes::<4>(STACK_TOP - 20), (STACK_TOP as u32).to_le_bytes());
    machine.cpu.regs[..4].fill(0);
    machine.step().unwrap();
    assert_eq!((machine.cpu.gpr(gpr::RAX), machine.cpu.gpr(gpr::RBX), machine.cpu.gpr(gpr::RDI)), (0x100, 0x103, 0x107));
    assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP);
}

#[test]
fn popf_changes_what_the_privilege_allows() {
    let everything = rflags::WRITABLE & !rflags::TF;
    let mut machine = Machine::new();
    let pop = |machine: &mut Machine, flags: u64| {
        machine.set_flags(flags);
        machine.cpu.set_gpr(gpr::RSP, STACK_TOP);
        machine.poke(STACK_TOP, &everything.to_le_bytes());
        machine.run(&[0x9d], 1).unwrap();
        assert_eq!(machine.cpu.gpr(gpr::RSP), STACK_TOP + 8);
        machine.cpu.rflags() & rflags::WRITABLE
    };
    let kept = rflags::VM | rflags::VIF | rflags::VIP | rflags::RF;
    assert_eq!(pop(&mut machine, 0), everything & !kept);
    for segment in &mut machine.cpu.state.segments {
        segment.access_rights |= 3 << 5;
    }
    machine.cpu.refresh();
    assert_eq!(machine.cpu.cpl(), 3);
    assert_eq!(pop(&mut machine, 0), everything & !kept & !rflags::IOPL & !rflags::IF);
    assert_eq!(pop(&mut machine, rflags::IOPL), everything & !kept);
    machine.set_flags(rflags::ARITHMETIC | rflags::IF);
    machine.run(&[0x9c], 1).unwrap(); // pushfq
    assert_eq!(machine.bytes(STACK_TOP), (rflags::ARITHMETIC | rflags::IF | rflags::FIXED).to_le_bytes());
}

#[test]
fn movdir64b_needs_an_aligned_destination() {
    let mut machine = Machine::new();
    let line: Vec<u8> = (0..64).collect();
    machine.poke(DATA + 8, &line);
    machine.cpu.set_gpr(gpr::RSI, DATA + 8);
    machine.cpu.set_gpr(gpr::RDI, DATA + 128);
    let movdir64b = [0x66, 0x0f, 0x38, 0xf8, 0x3e];
    assert!(machine.run(&movdir64b, 1).is_ok());
    assert_eq!(machine.peek(DATA + 128, 64), line);
    machine.cpu.set_gpr(gpr::RDI, DATA + 136);
    assert!(machine.run(&movdir64b, 1).is_err());
    assert_eq!(machine.vector(), 13);
}

#[test]
fn bound_and_salc() {
    let mut machine = Machine::with_size(CodeSize::Bits32);
    machine.poke(DATA, &[(-2i32).to_le_bytes(), 5i32.to_le_bytes()].concat());
    machine.cpu.set_gpr(gpr::RSI, DATA);
    for (index, inside) in [(-3i32, false), (-2, true), (5, true), (6, false)] {
        machine.cpu.set_gpr(gpr::RAX, u64::from(index as u32));
        assert_eq!(machine.run(&[0x62, 0x06], 1).is_ok(), inside, "BOUND eax, [esi] with {index}");
    }
    assert_eq!(machine.vector(), 5);
    machine.set_flags(1);
    assert!(machine.run(&[0xd6], 1).is_ok());
    assert_eq!(machine.cpu.gpr(gpr::RAX) as u8, 0xff);
}
