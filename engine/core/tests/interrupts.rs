//! Delivery of exceptions and interrupts: frames, stacks, error codes, double and triple faults, interception, injection.

mod common;

use std::sync::Arc;

use common::system::*;
use common::{Machine, CODE, STACK_TOP};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{interruptibility, rflags, seg, DescriptorTable};
use softkvm_engine::uop::Stop;

const INT3: [u8; 1] = [0xcc];
const UD2: [u8; 2] = [0x0f, 0x0b];
const IRETQ: [u8; 2] = [0x48, 0xcf];
/// mov rax, [0x300000]: a page that tests unmap.
const LOAD_HOLE: [u8; 8] = [0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00];
const HOLE: u64 = 0x30_0000;

const VALID: u32 = 1 << 31;
const EXTERNAL: u32 = VALID;
const NMI: u32 = VALID | 2 << 8 | 2;
const EXCEPTION: u32 = VALID | 3 << 8;
const HAS_ERROR: u32 = 1 << 11;

fn long() -> Machine {
    Machine::system(CodeSize::Bits64)
}

fn amd(mut machine: Machine) -> Machine {
    machine.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    machine
}

#[test]
fn a_breakpoint_in_user_code_switches_to_the_stack_of_ring_0() {
    let mut m = long();
    m.gate(vector::BP, USER_TRAP_GATE, 0);
    m.enter_user();
    m.set_flags(rflags::IF | rflags::CF);
    m.run_delivering(&INT3).unwrap();
    assert_eq!((m.handler(), m.cpu.cpl()), (3, 0));
    assert_eq!(m.cpu.gpr(4), (RING0_STACK & !15) - 40);
    assert_eq!([0, 1, 2, 3, 4].map(|n| m.stacked(n)), [CODE + 1, 0x2b, 0x203, USER_STACK, 0x23]);
    assert_eq!((m.cpu.state.segments[seg::CS].selector, m.cpu.state.segments[seg::SS].selector), (KERNEL_CODE, 0));
    assert_ne!(m.cpu.rflags() & rflags::IF, 0, "a trap gate leaves interrupts on");
    m.run(&IRETQ, 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.cpl(), m.cpu.gpr(4), m.cpu.rflags()), (CODE + 1, 3, USER_STACK, 0x203));
}

#[test]
fn faults_push_rf_and_interrupt_gates_turn_interrupts_off() {
    let mut m = long();
    m.set_flags(rflags::IF | rflags::TF);
    m.run_delivering(&UD2).unwrap();
    assert_eq!(m.handler(), 6);
    assert_eq!(m.stacked(2), 0x302 | rflags::RF);
    assert_eq!(m.cpu.rflags() & (rflags::IF | rflags::TF | rflags::RF), 0);
    assert_eq!(m.stacked(3), STACK_TOP, "the same stack");
}

#[test]
fn a_page_fault_sets_cr2_and_pushes_its_error_code() {
    let mut m = long();
    m.unmap(HOLE);
    m.enter_user();
    m.run_delivering(&LOAD_HOLE).unwrap();
    assert_eq!((m.handler(), m.cpu.state.cr2, m.stacked(0), m.stacked(1)), (14, HOLE, 4, CODE));
}

#[test]
fn an_interrupt_stack_is_used_without_a_change_of_privilege_too() {
    let mut m = long();
    m.gate(vector::UD, INTERRUPT_GATE, 1);
    m.run_delivering(&UD2).unwrap();
    assert_eq!(m.cpu.gpr(4), IST1 - 40);
    assert_eq!((m.stacked(3), m.stacked(4)), (STACK_TOP, KERNEL_DATA.into()));
    assert_eq!(m.cpu.state.segments[seg::SS].selector, KERNEL_DATA);
}

#[test]
fn a_gate_below_the_privilege_of_int_n_is_a_general_protection_fault() {
    let mut m = long();
    m.enter_user();
    m.run_delivering(&[0xcd, 0x20]).unwrap();
    assert_eq!((m.handler(), m.stacked(0), m.stacked(1)), (13, 0x20 << 3 | 2, CODE));
}

#[test]
fn faults_in_the_delivery_of_an_external_interrupt_say_so() {
    let mut m = long();
    m.gate(0x20, ABSENT_GATE, 0);
    m.cpu.deliver_event(EXTERNAL | 0x20, 0, 0).unwrap();
    assert_eq!((m.handler(), m.stacked(0)), (11, 0x20 << 3 | 3));
    m.cpu.state.idtr = DescriptorTable::new(IDT, 0x1ff);
    m.cpu.deliver_event(EXTERNAL | 0x20, 0, 0).unwrap();
    assert_eq!((m.handler(), m.stacked(0)), (13, 0x20 << 3 | 3));
}

#[test]
fn contributory_faults_make_a_double_fault() {
    let mut m = long();
    m.gate(vector::GP, ABSENT_GATE, 0);
    m.enter_user();
    m.run_delivering(&[0xf4]).unwrap();
    assert_eq!((m.handler(), m.stacked(0), m.stacked(1)), (8, 0, CODE));
}

#[test]
fn a_page_fault_after_a_benign_exception_is_just_a_page_fault() {
    let mut m = long();
    m.gate(vector::UD, INTERRUPT_GATE, 1);
    m.unmap(IST1 - 4096);
    m.run_delivering(&UD2).unwrap();
    assert_eq!((m.handler(), m.cpu.state.cr2), (14, IST1 - 8));
}

#[test]
fn a_fault_in_a_double_fault_shuts_down() {
    for (mut m, reason) in [(long(), 2), (amd(long()), 0x7f)] {
        m.gate(vector::GP, ABSENT_GATE, 0);
        m.gate(vector::DF, ABSENT_GATE, 0);
        m.enter_user();
        assert_eq!(m.run_delivering(&[0xf4]), Err(Stop::Exit));
        assert_eq!((m.cpu.exit.reason, m.cpu.exit.vectoring), (reason, 0));
        assert_eq!((m.cpu.rip(), m.cpu.cpl()), (CODE, 3));
    }
}

#[test]
fn a_wild_stack_pointer_is_a_stack_fault() {
    let mut m = long();
    m.gate(vector::SS, INTERRUPT_GATE, 1);
    m.cpu.set_gpr(4, 0x8000_0000_0000_0000);
    m.run_delivering(&UD2).unwrap();
    assert_eq!((m.handler(), m.stacked(0)), (12, 1));
}

#[test]
fn an_intercepted_exception_exits_before_its_side_effects() {
    let mut m = long();
    m.unmap(HOLE);
    m.cpu.control.exception_bitmap = 1 << vector::PF;
    assert_eq!(m.run_delivering(&LOAD_HOLE), Err(Stop::Exit));
    let exit = &m.cpu.exit;
    assert_eq!((exit.reason, exit.qualification, exit.interruption), (0, HOLE, EXCEPTION | HAS_ERROR | 14));
    assert_eq!((exit.interruption_error, m.cpu.state.cr2, m.cpu.rip()), (0, 0, CODE));

    let mut m = amd(long());
    m.unmap(HOLE);
    m.cpu.control.exception_bitmap = 1 << vector::PF;
    assert_eq!(m.run_delivering(&LOAD_HOLE), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification, m.cpu.exit.info2), (0x4e, 0, HOLE));
}

#[test]
fn page_faults_are_selected_by_error_code() {
    let mut m = long();
    m.unmap(HOLE);
    m.cpu.control.exception_bitmap = 1 << vector::PF;
    (m.cpu.control.page_fault_error_mask, m.cpu.control.page_fault_error_match) = (4, 4);
    m.run_delivering(&LOAD_HOLE).unwrap();
    assert_eq!(m.handler(), 14);
}

#[test]
fn breakpoints_are_told_as_software_exceptions() {
    let mut m = long();
    m.cpu.control.exception_bitmap = 1 << vector::BP;
    assert_eq!(m.run(&INT3, 1), Err(Stop::Exit));
    assert_eq!(m.cpu.exit.interruption, VALID | 6 << 8 | 3);
    assert_eq!(m.cpu.rip(), CODE);
}

#[test]
fn an_exit_during_delivery_tells_the_event_and_changes_nothing() {
    let mut m = long();
    m.gate(vector::UD, INTERRUPT_GATE, 1);
    m.cpu.npt.unmap(IST1 - 4096, 4096).unwrap();
    assert_eq!(m.run_delivering(&UD2), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.vectoring), (48, EXCEPTION | 6));
    assert_eq!((m.cpu.exit.gpa, m.cpu.rip(), m.cpu.gpr(4), m.cpu.vectoring), (IST1 - 8, CODE, STACK_TOP, 0));
    assert_eq!(m.run(&[0xcd, 6], 1), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.vectoring, m.cpu.rip()), (VALID | 4 << 8 | 6, CODE));
}

#[test]
fn a_nested_exception_that_is_intercepted_tells_the_first_one() {
    let mut m = long();
    m.gate(vector::GP, ABSENT_GATE, 0);
    m.cpu.control.exception_bitmap = 1 << vector::NP;
    m.enter_user();
    assert_eq!(m.run_delivering(&[0xf4]), Err(Stop::Exit));
    assert_eq!(m.cpu.exit.interruption, EXCEPTION | HAS_ERROR | 11);
    assert_eq!((m.cpu.exit.interruption_error, m.cpu.exit.vectoring), (13 << 3 | 3, EXCEPTION | HAS_ERROR | 13));
    m.cpu.control.exception_bitmap = 1 << vector::DF;
    assert_eq!(m.run_delivering(&[0xf4]), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.interruption, m.cpu.exit.vectoring), (EXCEPTION | HAS_ERROR | 8, 0));
}

#[test]
fn a_debug_exception_goes_to_dr6_and_clears_general_detect() {
    let mut m = long();
    m.cpu.state.dr7 = 0x2400;
    m.cpu.state.dr6 = 0xffff_0ff1;
    m.run_delivering(&[0x0f, 0x21, 0xc0]).unwrap();
    assert_eq!((m.handler(), m.cpu.state.dr6, m.cpu.state.dr7), (1, 0xffff_2ff0, 0x400));
    assert_ne!(m.stacked(2) & rflags::RF, 0, "a fault, not a trap");
}

#[test]
fn nmis_block_nmis_until_iret() {
    let mut m = long();
    m.cpu.deliver_event(NMI, 0, 0).unwrap();
    assert_eq!(m.handler(), 2);
    assert_ne!(m.cpu.state.interruptibility & interruptibility::NMI, 0);
    m.set_rip(CODE);
    m.run(&IRETQ, 1).unwrap();
    assert_eq!(m.cpu.state.interruptibility & interruptibility::NMI, 0);
}

#[test]
fn injected_software_interrupts_return_behind_their_instruction() {
    let mut m = long();
    m.set_rip(CODE);
    m.cpu.deliver_event(VALID | 4 << 8 | 0x21, 0, 2).unwrap();
    assert_eq!((m.handler(), m.stacked(0)), (0x21, CODE + 2));
}

#[test]
fn injected_exceptions_have_no_side_effects() {
    let mut m = long();
    m.cpu.state.cr2 = 0x1234;
    m.cpu.control.exception_bitmap = u32::MAX;
    m.cpu.deliver_event(EXCEPTION | HAS_ERROR | 14, 2, 0).unwrap();
    assert_eq!((m.handler(), m.stacked(0), m.cpu.state.cr2), (14, 2, 0x1234));
}

#[test]
fn user_code_of_32_bits_is_interrupted_in_long_mode() {
    let mut m = long();
    m.enter_user();
    m.cpu.state.segments[seg::CS].access_rights = 0xc0fb;
    m.cpu.state.segments[seg::CS].selector = USER_CODE_32;
    m.cpu.refresh();
    m.run_delivering(&UD2).unwrap();
    assert!(m.cpu.long_mode());
    assert_eq!([1, 3, 4].map(|n| m.stacked(n)), [USER_CODE_32.into(), USER_STACK, USER_DATA.into()]);
    m.run(&IRETQ, 1).unwrap();
    assert_eq!((m.cpu.code_size, m.cpu.cpl(), m.cpu.rip()), (CodeSize::Bits32, 3, CODE));
}

#[test]
fn protected_mode_takes_the_stack_of_the_tss() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.enter_user();
    m.set_flags(rflags::IF);
    m.run_delivering(&[0xfa]).unwrap();
    assert_eq!((m.handler(), m.cpu.cpl(), m.cpu.gpr(4)), (13, 0, RING0_STACK - 24));
    let frame = [0, 1, 2, 3, 4, 5].map(|n| m.stacked_32(n));
    let flags = (0x202 | rflags::RF) as u32;
    assert_eq!(frame, [0, CODE as u32, USER_CODE.into(), flags, USER_STACK as u32, USER_DATA.into()]);
    m.cpu.set_gpr(4, m.cpu.gpr(4) + 4);
    m.run(&[0xcf], 1).unwrap();
    assert_eq!((m.cpu.cpl(), m.cpu.rip(), m.cpu.gpr(4), m.cpu.rflags()), (3, CODE, USER_STACK, 0x202));
    assert!(m.cpu.state.segments[seg::DS].has(softkvm_engine::state::rights::UNUSABLE), "ring 0 data is hidden from ring 3");
}

#[test]
fn a_bad_stack_in_the_tss_is_an_invalid_tss_fault() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.poke(TSS + 8, &USER_DATA.to_le_bytes());
    m.enter_user();
    assert_eq!(m.run_delivering(&UD2), Err(Stop::Exit), "no stack for any handler");
    assert_eq!(m.cpu.exit.reason, 2);
    m.cpu.control.exception_bitmap = 1 << vector::TS;
    assert_eq!(m.run_delivering(&UD2), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.interruption_error, m.cpu.exit.vectoring), (u32::from(USER_DATA) & !3 | 1, EXCEPTION | 6));
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut m = Machine::with_size(CodeSize::Bits16);
    m.cpu.state.idtr = DescriptorTable::new(0, 0x3ff);
    m.poke(4 * 0x21, &[0x34, 0x12, 0x00, 0x20]);
    m.set_flags(rflags::IF);
    m.run(&[0xcd, 0x21], 1).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.state.segments[seg::CS].base), (0x1234, 0x2_0000));
    assert_eq!(m.cpu.rflags() & rflags::IF, 0);
    assert_eq!(m.bytes::<6>(0x7000 - 6), [0x02, 0x80, 0x08, 0x00, 0x02, 0x02]);
    m.poke(0x2_1234, &[0xcf]);
    m.finish().unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.state.segments[seg::CS].base, m.cpu.gpr(4)), (CODE + 2, 0x80, 0x7000));
    assert_ne!(m.cpu.rflags() & rflags::IF, 0);
}

#[test]
fn task_gates_are_the_hypervisors() {
    let mut m = Machine::system(CodeSize::Bits32);
    m.gate(vector::UD, 0x85, 0);
    assert_eq!(m.run_delivering(&UD2), Err(Stop::Exit));
    assert_eq!((m.cpu.exit.reason, m.cpu.exit.qualification), (9, u64::from(KERNEL_CODE) | 3 << 30));
    assert_eq!(m.cpu.exit.vectoring, EXCEPTION | 6);
}

#[test]
fn amd_silicon_injects_software_interrupts_with_the_next_rip_that_it_is_given() {
    for info in [VALID | 4 << 8 | 0x21, EXCEPTION | 3, EXCEPTION | 4] {
        let mut m = amd(long());
        m.set_rip(CODE);
        m.cpu.control.next_rip = CODE + 7;
        m.cpu.deliver_event(info, 0, 2).unwrap();
        assert_eq!(m.stacked(0), CODE + 7, "{info:#x}");
        let mut m = amd(long());
        m.cpu.model = Arc::new(Model::new("epyc", &[("nrip-save".to_owned(), false)]).unwrap());
        m.set_rip(CODE);
        m.cpu.control.next_rip = CODE + 7;
        m.cpu.deliver_event(info, 0, 2).unwrap();
        assert_eq!(m.stacked(0), CODE, "software has moved RIP: {info:#x}");
    }
}
