//! What a hypervisor that watches memory asks of the silicon: rights waived for one instruction, devices, and hidden breakpoints.

mod common;

use std::sync::Arc;

use common::{Machine, CODE, DATA};
use softkvm_engine::memory::nested::right;
use softkvm_engine::state::gpr;
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::exits::code;

const PAGE: u64 = 4096;
const STORE: [u8; 2] = [0x88, 0x03]; // mov [rbx], al
const ADD: [u8; 2] = [0x00, 0x03]; // add [rbx], al

fn machine(rights: u8) -> Machine {
    let mut machine = Machine::new();
    machine.cpu.npt.protect(DATA, PAGE, rights).unwrap();
    machine.cpu.flush_nested();
    machine.cpu.refresh_table();
    machine.cpu.set_gpr(gpr::RBX, DATA);
    machine.cpu.set_gpr(gpr::RAX, 5);
    machine
}

/// Exit qualification of the access that `code` makes, or none.
fn violation(machine: &mut Machine, code: &[u8]) -> Option<u64> {
    match machine.run(code, 1) {
        Err(Stop::Exit) => {
            assert_eq!(machine.cpu.exit.reason, code::NESTED_FAULT.vmx);
            assert_eq!((machine.cpu.exit.gpa, machine.cpu.exit.gla), (DATA, DATA));
            Some(machine.cpu.exit.qualification & 7)
        }
        other => {
            assert_eq!(other, Ok(()));
            None
        }
    }
}

#[test]
fn a_waiver_is_for_its_right_and_leaves_nothing_in_the_tlb() {
    let mut machine = machine(right::READ);
    assert_eq!(violation(&mut machine, &STORE), Some(2));
    machine.cpu.waivers.set(&[DATA | 1]);
    assert_eq!(violation(&mut machine, &STORE), Some(2));
    machine.cpu.waivers.set(&[DATA | 2]);
    assert_eq!(violation(&mut machine, &STORE), None);
    machine.cpu.end_waivers();
    assert_eq!(violation(&mut machine, &STORE), Some(2));
}

#[test]
fn what_reads_and_writes_needs_both_rights_and_reads_first() {
    for (rights, expected) in [(0, Some(1)), (right::READ, Some(2)), (right::WRITE, Some(1)), (right::READ | right::WRITE, None)] {
        assert_eq!(violation(&mut machine(rights), &ADD), expected, "rights {rights}");
    }
    assert_eq!(violation(&mut machine(right::WRITE), &STORE), None);
}

#[test]
fn a_device_is_asked_for_data_at_once_and_has_no_code() {
    let mut machine = Machine::new();
    machine.cpu.npt.map_device(DATA, PAGE).unwrap();
    machine.cpu.flush_nested();
    machine.cpu.refresh_table();
    machine.cpu.set_gpr(gpr::RBX, DATA);
    machine.cpu.set_gpr(gpr::RAX, 5);
    assert_eq!(machine.run(&STORE, 1), Err(Stop::Exit));
    let (reason, access) = (machine.cpu.exit.reason, machine.cpu.exit.access);
    assert_eq!((reason, access.gpa, access.size, access.write, access.data[0]), (code::ACCESS.vmx, DATA, 1, 1, 5));
    machine.set_rip(DATA);
    assert_eq!(machine.step(), Err(Stop::Exit));
    assert_eq!((machine.cpu.exit.reason, machine.cpu.exit.qualification & 0x3f), (code::NESTED_FAULT.vmx, 4));
}

#[test]
fn the_walkers_waiver_is_not_the_softwares() {
    let mut machine = machine(right::READ);
    machine.cpu.waivers.set(&[DATA | 8]);
    assert_eq!(violation(&mut machine, &STORE), Some(2));
}

#[test]
fn a_store_that_changes_nothing_needs_no_right_where_nobody_cares() {
    let mut machine = machine(right::READ | right::SAME);
    machine.poke(DATA, &[5]);
    assert_eq!(violation(&mut machine, &STORE), None);
    machine.cpu.set_gpr(gpr::RAX, 0x105);
    assert_eq!(violation(&mut machine, &[0x66, 0x89, 0x03]), Some(2)); // mov [rbx], ax
    assert_eq!(violation(&mut machine, &STORE), None);
    machine.cpu.set_gpr(gpr::RAX, 0);
    assert_eq!(violation(&mut machine, &STORE), Some(2));
    assert_eq!(violation(&mut machine, &ADD), Some(2), "what it stores is not known before it reads");
    assert_eq!(machine.peek(DATA, 2), [5, 0]);
}

#[test]
fn a_store_across_pages_is_done_where_it_may_be() {
    let mut machine = machine(right::READ | right::SAME);
    machine.cpu.set_gpr(gpr::RBX, DATA - 2);
    machine.cpu.set_gpr(gpr::RAX, 0x0000_1234);
    assert_eq!(machine.run(&[0x89, 0x03], 1), Ok(())); // mov [rbx], eax
    assert_eq!(machine.peek(DATA - 2, 4), [0x34, 0x12, 0, 0]);
    machine.cpu.set_gpr(gpr::RAX, 0x0001_5678);
    assert_eq!(machine.run(&[0x89, 0x03], 1), Err(Stop::Exit));
    assert_eq!(machine.peek(DATA - 2, 4), [0x34, 0x12, 0, 0]);
}

#[test]
fn a_breakpoint_is_met_before_its_instruction_and_follows_the_table() {
    let mut machine = Machine::new();
    let npt = Arc::clone(&machine.cpu.npt);
    npt.set_breakpoints(&[CODE + 2], &[]);
    machine.cpu.clock.tick = u64::MAX;
    machine.poke(CODE, &[0x90, 0x90, 0x48, 0xff, 0xc0, 0xf4]); // nop; nop; inc rax; hlt
    machine.cpu.set_rip(CODE);
    machine.cpu.run();
    assert_eq!((machine.cpu.exit.reason, machine.cpu.exit.gpa, machine.cpu.rip()), (code::BREAKPOINT.vmx, CODE + 2, CODE + 2));
    machine.cpu.run();
    assert_eq!(machine.cpu.exit.reason, code::BREAKPOINT.vmx, "it stays");
    npt.set_breakpoints(&[], &[CODE + 2]);
    machine.cpu.shoot_down();
    machine.cpu.control.intercepts = 1 << softkvm_engine::virt::control::intercept::HLT;
    machine.cpu.run();
    assert_eq!((machine.cpu.exit.reason, machine.cpu.gpr(gpr::RAX)), (code::HLT.vmx, 1));
}
