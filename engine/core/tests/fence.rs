//! NOP, fences, cache lines, hypercalls and the undefined opcodes.

mod common;

use std::sync::Arc;

use common::{Machine, CODE, DATA};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{efer, gpr, rights, seg};
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

const CLFLUSH_RAX: &[u8] = &[0x0f, 0xae, 0x38];
const SERIALIZE: &[u8] = &[0x0f, 0x01, 0xe8];
const PAUSE: &[u8] = &[0xf3, 0x90];
const VMCALL: &[u8] = &[0x0f, 0x01, 0xc1];
const VMMCALL: &[u8] = &[0x0f, 0x01, 0xd9];
const VMLAUNCH: &[u8] = &[0x0f, 0x01, 0xc2];
const VMRUN: &[u8] = &[0x0f, 0x01, 0xd8];

fn amd() -> Machine {
    let mut machine = Machine::new();
    machine.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    machine
}

#[test]
fn hints_and_fences_change_nothing() {
    let endbr64: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa];
    let long_nop: &[u8] = &[0x66, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0];
    let prefetch_of_nothing: &[u8] = &[0x0f, 0x18, 0x08];
    let (lfence, mfence, sfence): (&[u8], &[u8], &[u8]) = (&[0x0f, 0xae, 0xe8], &[0x0f, 0xae, 0xf0], &[0x0f, 0xae, 0xf8]);
    for code in [&[0x90], endbr64, long_nop, prefetch_of_nothing, lfence, mfence, sfence, SERIALIZE, PAUSE] {
        let mut machine = Machine::new();
        machine.cpu.set_gpr(gpr::RAX, 0x7000_0000_0000);
        let before = machine.cpu.regs;
        assert_eq!(machine.run(code, 1), Ok(()), "{code:x?}");
        assert_eq!(machine.cpu.regs[..16], before[..16]);
        assert_eq!(machine.cpu.rip(), CODE + code.len() as u64);
    }
}

#[test]
fn flushing_a_line_checks_the_address_as_a_read() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RAX, DATA);
    assert_eq!(machine.run(CLFLUSH_RAX, 1), Ok(()));
    machine.unmap(DATA);
    assert_eq!(machine.run(CLFLUSH_RAX, 1), Err(Stop::Fault));
    assert_eq!((machine.vector(), machine.cpu.fault.error), (vector::PF, Some(0)));
}

#[test]
fn pause_exits_where_it_is_intercepted() {
    let mut machine = Machine::new();
    machine.cpu.control.intercepts = 1 << intercept::PAUSE;
    assert_eq!(machine.run(PAUSE, 1), Err(Stop::Exit));
    assert_eq!(machine.cpu.exit.reason, 40);
}

#[test]
fn a_loop_of_pauses_exits_when_its_window_is_over() {
    let mut machine = Machine::system(CodeSize::Bits64);
    (machine.cpu.control.pause_gap, machine.cpu.control.pause_window) = (u32::MAX, 1);
    assert_eq!(machine.run(PAUSE, 1), Ok(()), "the first one opens the window");
    assert_eq!(machine.run(PAUSE, 1), Err(Stop::Exit));
    assert_eq!(machine.cpu.exit.reason, 40);
    machine.enter_user();
    assert_eq!(machine.run(PAUSE, 1), Ok(()), "only the kernel is watched");
}

#[test]
fn hypercalls_exit_or_are_undefined() {
    for (mut machine, own, other, reason) in [(Machine::new(), VMCALL, VMMCALL, 18), (amd(), VMMCALL, VMCALL, 0x81)] {
        for (code, intercepts) in [(own, 0), (other, 0), (other, 1 << intercept::HYPERCALL)] {
            machine.cpu.control.intercepts = intercepts;
            assert_eq!(machine.run(code, 1), Err(Stop::Fault));
            assert_eq!(machine.vector(), vector::UD);
        }
        machine.cpu.control.intercepts = 1 << intercept::HYPERCALL;
        assert_eq!(machine.run(own, 1), Err(Stop::Exit));
        assert_eq!(machine.cpu.exit.reason, reason);
    }
}

#[test]
fn vm_instructions_belong_to_their_vendor() {
    let mut intel = Machine::new();
    intel.cpu.control.intercepts = 1 << intercept::VM_INSTRUCTION;
    assert_eq!(intel.run(VMLAUNCH, 1), Err(Stop::Exit));
    assert_eq!(intel.cpu.exit.reason, 20);
    assert_eq!(intel.run(VMRUN, 1), Err(Stop::Fault));
    let mut amd = amd();
    amd.cpu.control.intercepts = 1 << intercept::VM_INSTRUCTION;
    assert_eq!(amd.run(VMLAUNCH, 1), Err(Stop::Fault));
    assert_eq!(amd.run(VMRUN, 1), Err(Stop::Fault));
    amd.cpu.state.efer |= efer::SVME;
    assert_eq!(amd.run(VMRUN, 1), Err(Stop::Exit));
    assert_eq!(amd.cpu.exit.reason, 0x80);
    for number in [seg::CS, seg::SS] {
        amd.cpu.state.segments[number].access_rights |= 3 << rights::DPL_SHIFT;
    }
    amd.cpu.refresh();
    assert_eq!(amd.run(VMRUN, 1), Err(Stop::Fault));
    assert_eq!(amd.vector(), vector::GP);
}

#[test]
fn undefined_opcodes_are_undefined() {
    for code in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0], &[0x0f, 0xaa], &[0x0f, 0x37]] {
        let mut machine = Machine::new();
        assert_eq!(machine.run(code, 1), Err(Stop::Fault), "{code:x?}");
        assert_eq!(machine.vector(), vector::UD);
    }
}
