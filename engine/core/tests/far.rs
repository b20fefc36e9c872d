//! Far transfers of control: jumps, calls, gates, returns, system calls.

mod common;

use std::sync::Arc;

use common::guest::Guest;
use common::system::*;
use common::{Machine, CODE, STACK_TOP};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, gpr, interruptibility, rflags, rights, seg, Segment};
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::exits::code;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SYSRETQ: [u8; 3] = [0x48, 0x0f, 0x07];
const IRETQ: [u8; 2] = [0x48, 0xcf];
const TARGET: u64 = 0x5_0000;
const R11: usize = 11;

fn long() -> Machine {
    Machine::system(CodeSize::Bits64)
}

/// Pushes 64-bit words, the last one on top.
fn push(m: &mut Machine, words: &[u64]) {
    for word in words {
        let top = m.cpu.gpr(gpr::RSP) - 8;
        m.poke(top, &word.to_le_bytes());
        m.cpu.set_gpr(gpr::RSP, top);
    }
}

fn push_32(m: &mut Machine, words: &[u32]) {
    for word in words {
        let top = m.cpu.gpr(gpr::RSP) - 4;
        m.poke(top, &word.to_le_bytes());
        m.cpu.set_gpr(gpr::RSP, top);
    }
}

/// jmp or call far [CODE + 0x100], through a pointer of 32 bits.
fn indirect(m: &mut Machine, selector: u16, offset: u32, call: bool) -> [u8; 7] {
    m.poke(CODE + 0x100, &offset.to_le_bytes());
    m.poke(CODE + 0x104, &selector.to_le_bytes());
    let modrm = if call { 0x1c } else { 0x2c };
    [0xff, modrm, 0x25, 0x00, 0x81, 0x00, 0x00]
}

fn gate(selector: u16, access: u64, parameters: u64) -> u64 {
    TARGET & 0xffff | u64::from(selector) << 16 | parameters << 32 | access << 40 | (TARGET & 0xffff_0000) << 32
}

fn has_faulted(m: &Machine, vector: u8, error: u32) -> bool {
    (m.cpu.fault.vector, m.cpu.fault.error) == (vector, Some(error))
}

#[test]
fn iret_checks_where_it_goes() {
    let cases = [
        (0, 0x10, 0x8000, vector::GP, 0),
        (KERNEL_DATA, KERNEL_DATA, 0x8000, vector::GP, u32::from(KERNEL_DATA)),
        (0x1f8, KERNEL_DATA, 0x8000, vector::GP, 0x1f8),
        (USER_CODE, KERNEL_DATA, 0x8000, vector::GP, u32::from(KERNEL_DATA)),
        (USER_CODE, 3, 0x8000, vector::GP, 0),
        (USER_CODE, ABSENT_DATA | 3, 0x8000, vector::GP, u32::from(ABSENT_DATA)),
        (KERNEL_CODE, ABSENT_DATA, 0x8000, vector::SS, u32::from(ABSENT_DATA)),
        (USER_CODE, USER_DATA, 1 << 47, vector::GP, 0),
    ];
    for (cs, ss, rip, vector, error) in cases {
        let mut m = long();
        push(&mut m, &[ss.into(), 0x1000, 2, cs.into(), rip]);
        let rsp = m.cpu.gpr(gpr::RSP);
        m.expect_fault(&IRETQ, vector, error);
        assert_eq!((m.cpu.gpr(gpr::RSP), m.cpu.cpl()), (rsp, 0), "{cs:x} {ss:x}");
    }
}

#[test]
fn iret_of_user_code_cannot_raise_its_privilege() {
    let mut m = long();
    m.enter_user();
    m.set_flags(rflags::IF);
    push(&mut m, &[USER_DATA.into(), USER_STACK, 0x3000 | rflags::DF | rflags::NT, USER_CODE.into(), TARGET]);
    m.run(&IRETQ, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.rflags()), (TARGET, 0x202 | rflags::DF | rflags::NT));
    m.cpu.rflags &= !rflags::NT;
    push(&mut m, &[KERNEL_DATA.into(), USER_STACK, 2, KERNEL_CODE.into(), TARGET]);
    m.expect_fault(&IRETQ, vector::GP, KERNEL_CODE.into());
}

#[test]
fn iret_within_ring_0_takes_rsp_and_a_null_ss() {
    let mut m = long();
    push(&mut m, &[0, 0x6000, rflags::IF, KERNEL_CODE.into(), TARGET]);
    m.run(&IRETQ, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.gpr(gpr::RSP), m.cpu.cpl()), (TARGET, 0x6000, 0));
    assert_eq!(m.cpu.state.segments[seg::SS].selector, 0);
    assert_ne!(m.cpu.rflags() & rflags::IF, 0);
}

#[test]
fn nested_tasks_return_to_the_hypervisor_or_fault() {
    let mut m = long();
    m.set_flags(rflags::NT);
    m.expect_fault(&IRETQ, vector::GP, 0);
    let mut m = Machine::system(CodeSize::Bits32);
    m.set_flags(rflags::NT);
    m.poke(TSS, &TASK.to_le_bytes());
    m.expect_fault(&[0xcf], vector::TS, TASK.into());
    m.describe(TASK, m.descriptor(TASK) | 2 << 40);
    assert_eq!(m.run(&[0xcf], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (9, u64::from(TASK) | 1 << 30));
}

#[test]
fn iret_enters_virtual_8086_mode() {
    let mut m = Machine::system(CodeSize::Bits32);
    push_32(&mut m, &[5, 4, 3, 2, 0x1000, 0xfff0, (rflags::VM | rflags::IF) as u32 | 2, 0x2000, 0x123]);
    m.run(&[0xcf], 1).unwrap();
    assert_eq!((m.cpu.cpl(), m.cpu.rip(), m.cpu.code_size), (3, 0x123, CodeSize::Bits16));
    assert_eq!((m.cpu.state.segments[seg::CS].base, m.cpu.gpr(gpr::RSP)), (0x2_0000, 0xfff0));
    assert_eq!([seg::ES, seg::DS, seg::FS, seg::GS].map(|n| m.cpu.state.segments[n].base), [0x20, 0x30, 0x40, 0x50]);
    m.poke(0x2_0123, &[0xcd, 0x20]);
    assert_eq!(m.step(), Err(Stop::Fault), "INT n needs IOPL 3");
    m.cpu.deliver_fault().unwrap();
    assert_eq!((m.handler(), m.cpu.cpl(), m.cpu.rflags() & rflags::VM), (13, 0, 0));
    let frame = [0, 1, 2, 4, 5, 6, 7, 8, 9].map(|n| m.stacked_32(n));
    assert_eq!(frame, [0, 0x123, 0x2000, 0xfff0, 0x1000, 2, 3, 4, 5]);
    assert_eq!(m.cpu.state.segments[seg::FS].selector, 0);
}

#[test]
fn far_jumps_check_privilege() {
    let cases = [(0, vector::GP, 0), (USER_CODE, vector::GP, 0x28), (KERNEL_DATA, vector::GP, 0x10), (0x1f8, vector::GP, 0x1f8)];
    for (selector, vector, error) in cases {
        let mut m = long();
        let code = indirect(&mut m, selector, TARGET as u32, false);
        m.expect_fault(&code, vector, error);
    }
    let mut m = long();
    let code = indirect(&mut m, KERNEL_CODE, TARGET as u32, false);
    m.run(&code, 1).unwrap();
    assert_eq!(m.cpu.rip(), TARGET);
}

#[test]
fn conforming_code_keeps_the_privilege_of_its_caller() {
    let mut m = long();
    m.enter_user();
    let code = indirect(&mut m, CONFORMING, TARGET as u32, false);
    m.run(&code, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.state.segments[seg::CS].selector), (TARGET, 3, CONFORMING | 3));
}

#[test]
fn far_calls_and_returns_pair_up() {
    let mut m = long();
    let code = indirect(&mut m, KERNEL_CODE, TARGET as u32, true);
    m.run(&code, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.stacked_32(0), m.stacked_32(1)), (TARGET, CODE as u32 + 7, KERNEL_CODE.into()));
    m.poke(TARGET, &[0xca, 0x10, 0x00]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.gpr(gpr::RSP)), (CODE + 7, STACK_TOP + 16));
}

#[test]
fn a_call_gate_switches_stacks_and_copies_parameters() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.describe(FREE, gate(KERNEL_CODE, 0xec, 2));
    m.enter_user();
    push_32(&mut m, &[0x11, 0x22]);
    m.run(&[0x9a, 0, 0, 0, 0, FREE as u8 | 3, 0], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.gpr(gpr::RSP)), (TARGET, 0, RING0_STACK - 24));
    let frame = [0, 1, 2, 3, 4, 5].map(|n| m.stacked_32(n));
    assert_eq!(frame, [CODE as u32 + 7, USER_CODE.into(), 0x22, 0x11, USER_STACK as u32 - 8, USER_DATA.into()]);
    m.poke(TARGET, &[0xca, 8, 0]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.gpr(gpr::RSP)), (CODE + 7, 3, USER_STACK));
}

#[test]
fn a_call_gate_of_long_mode_is_16_bytes() {
    let mut m = long();
    m.describe(FREE, gate(KERNEL_CODE, 0xec, 0));
    m.enter_user();
    let code = indirect(&mut m, FREE | 3, 0, true);
    m.run(&code, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl()), (TARGET, 0));
    assert_eq!([0, 1, 2, 3].map(|n| m.stacked(n)), [CODE + 7, USER_CODE.into(), USER_STACK, USER_DATA.into()]);
    m.poke(TARGET, &[0x48, 0xcb]);
    m.step().unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.gpr(gpr::RSP)), (CODE + 7, 3, USER_STACK));
    m.describe(FREE + 8, 1 << 40);
    m.expect_fault(&code, vector::GP, FREE.into());
}

#[test]
fn a_jump_to_a_task_is_the_hypervisors() {
    let mut m = Machine::system(CodeSize::Bits32);
    assert_eq!(m.run(&[0xea, 0, 0, 0, 0, TASK as u8, 0], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (9, u64::from(TASK) | 2 << 30));
    let mut m = long();
    let code = indirect(&mut m, TASK, 0, false);
    m.expect_fault(&code, vector::GP, TASK.into());
}

#[test]
fn real_mode_jumps_set_the_base() {
    let mut m = Machine::with_size(CodeSize::Bits16);
    m.run(&[0xea, 0x34, 0x12, 0x00, 0x20], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.state.segments[seg::CS].base), (0x1234, 0x2_0000));
}

#[test]
fn the_jump_after_setting_pe_enters_protected_mode() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.cpu.state.segments[seg::CS].access_rights = 0x9b;
    m.cpu.refresh();
    assert_eq!(m.cpu.code_size, CodeSize::Bits16);
    m.run(&[0x66, 0xea, 0, 0, 5, 0, KERNEL_CODE as u8, 0], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.code_size), (TARGET, CodeSize::Bits32));
}

fn with_syscall(mut m: Machine) -> Machine {
    m.cpu.state.star = u64::from(KERNEL_CODE) << 32 | u64::from(USER_CODE_32) << 48;
    (m.cpu.state.lstar, m.cpu.state.cstar, m.cpu.state.fmask) = (TARGET, TARGET + 16, rflags::IF | rflags::DF);
    m
}

#[test]
fn syscall_and_sysret_are_inverse() {
    let mut m = with_syscall(long());
    m.enter_user();
    m.set_flags(rflags::IF | rflags::ZF);
    m.run(&SYSCALL, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.gpr(gpr::RCX), m.cpu.gpr(R11)), (TARGET, 0, CODE + 2, 0x242));
    assert_eq!((m.cpu.rflags(), m.cpu.state.segments[seg::SS].selector), (0x42, KERNEL_DATA));
    m.run(&SYSRETQ, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.rflags()), (CODE + 2, 3, 0x242));
    assert_eq!([seg::CS, seg::SS].map(|n| m.cpu.state.segments[n].selector), [USER_CODE, USER_DATA]);
}

#[test]
fn sysret_to_a_wild_address_faults_in_ring_0_on_intel_only() {
    let mut m = with_syscall(long());
    m.cpu.set_gpr(gpr::RCX, 1 << 47);
    m.expect_fault(&SYSRETQ, vector::GP, 0);
    assert_eq!(m.cpu.cpl(), 0);
    m.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    m.run(&SYSRETQ, 1).unwrap();
    assert_eq!(m.cpu.cpl(), 3);
}

#[test]
fn syscall_of_32_bit_code_is_amds() {
    for (name, works) in [("cascadelake", false), ("epyc", true)] {
        let mut m = with_syscall(long());
        m.cpu.model = Arc::new(Model::new(name, &[]).unwrap());
        m.enter_user();
        m.cpu.state.segments[seg::CS].access_rights = 0xc0fb;
        m.cpu.refresh();
        let outcome = m.run(&SYSCALL, 1);
        assert_eq!(outcome.is_ok(), works, "{name}");
        if works {
            assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.long_mode()), (TARGET + 16, 0, true));
        } else {
            assert_eq!(m.vector(), vector::UD);
        }
    }
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = long();
    m.enter_user();
    assert_eq!(m.run(&[0x0f, 0x34], 1), Err(Stop::Fault));
    assert!(has_faulted(&m, vector::GP, 0), "no code segment");
    m.cpu.state.sysenter_cs = KERNEL_CODE.into();
    (m.cpu.state.sysenter_eip, m.cpu.state.sysenter_esp) = (TARGET, 0x6000);
    m.run(&[0x0f, 0x34], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.gpr(gpr::RSP), m.cpu.cpl(), m.cpu.rflags() & rflags::IF), (TARGET, 0x6000, 0, 0));
    m.cpu.set_gpr(gpr::RDX, 0x1_2000);
    m.cpu.set_gpr(gpr::RCX, USER_STACK);
    m.run(&[0x48, 0x0f, 0x35], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.gpr(gpr::RSP), m.cpu.cpl()), (0x1_2000, USER_STACK, 3));
    assert_eq!(m.cpu.state.segments[seg::CS].selector, (KERNEL_CODE + 32) | 3);
    m.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    assert_eq!((m.run(&[0x0f, 0x34], 1), m.vector()), (Err(Stop::Fault), vector::UD));
}

#[test]
fn into_traps_only_on_overflow() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.run(&[0xce], 1).unwrap();
    assert_eq!(m.cpu.rip(), CODE + 1);
    m.set_flags(rflags::OF);
    m.run(&[0xce], 1).unwrap();
    assert_eq!((m.handler(), m.stacked_32(0)), (4, CODE as u32 + 1));
}

#[test]
fn sti_holds_interrupts_back_once() {
    let mut m = long();
    m.run(&[0xfb], 1).unwrap();
    assert_eq!(m.cpu.state.interruptibility, interruptibility::STI);
    m.cpu.state.interruptibility = 0;
    m.run(&[0xfb], 1).unwrap();
    assert_eq!(m.cpu.state.interruptibility, 0, "interrupts were on already");
    m.enter_user();
    m.expect_fault(&[0xfb], vector::GP, 0);
    m.expect_fault(&[0xfa], vector::GP, 0);
}

#[test]
fn the_same_offset_in_another_real_mode_segment_is_other_code() {
    let mut guest = Guest::new(&[0xb8, 1, 0, 0xea, 0, 0, 0, 0x02]); // mov ax, 1; jmp 0200:0000
    guest.poke(0x2000, &[0xb8, 2, 0, 0xea, 0, 0, 0, 0x03]);
    guest.poke(0x3000, &[0x0f, 0xa2]); // cpuid
    let data = rights::PRESENT | rights::S | rights::RW | rights::ACCESSED;
    let state = &mut guest.block().state;
    for number in 0..6 {
        let kind = if number == seg::CS { rights::CODE } else { 0 };
        state.segments[number] = Segment::new((CODE >> 4) as u16, data | kind, 0xffff, CODE);
    }
    (state.cr0, state.rip, state.gpr[gpr::RAX]) = (cr0::ET | cr0::NE, 0, 0);
    let control = &mut guest.block().control;
    (control.instruction_budget, control.tsc_rate) = (100, 4); // in virtual time no tick comes first
    assert_eq!(guest.enter(), code::CPUID.vmx);
    let state = &guest.block().state;
    assert_eq!((state.segments[seg::CS].selector, state.gpr[gpr::RAX]), (0x300, 2));
}
