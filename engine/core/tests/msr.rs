//! CPUID, RDMSR, WRMSR, RDTSC and the random numbers, on both vendors' silicon.

mod common;

use std::sync::Arc;

use common::Machine;
use softkvm_engine::fault::vector;
use softkvm_engine::model::msrs::index;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr4, efer, gpr, rflags, rights, seg};
use softkvm_engine::uop::{Exec, Stop};
use softkvm_engine::virt::control::intercept;

const CPUID: &[u8] = &[0x0f, 0xa2];
const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];
const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
const RDPMC: &[u8] = &[0x0f, 0x33];
const RDRAND_RAX: &[u8] = &[0x48, 0x0f, 0xc7, 0xf0];
const RDPID_RAX: &[u8] = &[0xf3, 0x0f, 0xc7, 0xf8];

/// A machine of `model` whose hypervisor lets every MSR of the engine through.
fn machine(model: &str) -> Machine {
    let mut machine = Machine::new();
    machine.cpu.model = Arc::new(Model::new(model, &[]).unwrap());
    machine
}

fn read(machine: &mut Machine, index: u32) -> Exec<u64> {
    machine.cpu.set_gpr(gpr::RCX, index.into());
    machine.run(RDMSR, 1)?;
    Ok(machine.cpu.gpr(gpr::RDX) << 32 | machine.cpu.gpr(gpr::RAX))
}

fn write(machine: &mut Machine, index: u32, value: u64) -> Exec {
    machine.cpu.set_gpr(gpr::RCX, index.into());
    machine.cpu.set_gpr(gpr::RAX, value | 0xdead_0000_0000_0000);
    machine.cpu.set_gpr(gpr::RDX, value >> 32);
    machine.run(WRMSR, 1)
}

fn user_mode(machine: &mut Machine) {
    for number in [seg::CS, seg::SS] {
        machine.cpu.state.segments[number].access_rights |= 3 << rights::DPL_SHIFT;
    }
    machine.cpu.refresh();
}

#[test]
fn cpuid_always_exits_on_intel() {
    let mut machine = machine("cascadelake");
    assert_eq!(machine.run(CPUID, 1), Err(Stop::Exit));
    assert_eq!(machine.cpu.exit.reason, 10);
}

#[test]
fn cpuid_on_amd_follows_the_registers() {
    let mut machine = machine("epyc");
    machine.cpu.set_gpr(gpr::RAX, 1);
    machine.cpu.state.cr4 &= !cr4::OSXSAVE;
    machine.run(CPUID, 1).unwrap();
    assert_eq!((machine.cpu.gpr(gpr::RAX), machine.cpu.gpr(gpr::RCX) >> 27 & 1), (0x0083_0f10, 0));
    machine.cpu.set_gpr(gpr::RAX, 1);
    machine.cpu.state.cr4 |= cr4::OSXSAVE;
    machine.run(CPUID, 1).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RCX) >> 27 & 1, 1);
    machine.cpu.control.intercepts = 1 << intercept::CPUID;
    assert_eq!(machine.run(CPUID, 1), Err(Stop::Exit));
    assert_eq!(machine.cpu.exit.reason, 0x72);
}

#[test]
fn without_a_bitmap_every_msr_exits_and_is_named() {
    for (model, read_exit, write_exit) in [("cascadelake", (31, 0), (32, 0)), ("epyc", (0x7c, 0), (0x7c, 1))] {
        let mut machine = machine(model);
        assert_eq!(read(&mut machine, index::LSTAR), Err(Stop::Exit));
        let exit = &machine.cpu.exit;
        assert_eq!(((exit.reason, exit.qualification), exit.msr_index), (read_exit, index::LSTAR));
        assert_eq!(write(&mut machine, index::PAT, 0), Err(Stop::Exit));
        let exit = &machine.cpu.exit;
        assert_eq!(((exit.reason, exit.qualification), exit.msr_index), (write_exit, index::PAT));
    }
}

#[test]
fn msrs_and_the_tsc_need_privilege() {
    let mut machine = machine("cascadelake");
    user_mode(&mut machine);
    assert_eq!(read(&mut machine, index::TSC), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::GP);
    assert_eq!(machine.run(RDTSC, 1), Ok(()));
    machine.cpu.state.cr4 |= cr4::TSD;
    assert_eq!(machine.run(RDTSC, 1), Err(Stop::Fault));
    assert_eq!(machine.run(RDPMC, 1), Err(Stop::Fault));
}

#[test]
fn the_tsc_goes_through_offset_and_multiplier() {
    let mut machine = machine("cascadelake");
    machine.cpu.clock.multiplier = 1 << 20;
    machine.cpu.clock.offset = 5 << 56;
    machine.cpu.state.tsc_aux = 0x1_0000_0007;
    machine.run(RDTSCP, 1).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RDX) >> 24, 5);
    assert_eq!(machine.cpu.gpr(gpr::RCX), 7);
    machine.run(RDPID_RAX, 1).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RAX), 7);
    machine.cpu.control.intercepts = 1 << intercept::RDTSC;
    assert_eq!(machine.run(RDTSCP, 1), Err(Stop::Exit));
    assert_eq!(machine.cpu.exit.reason, 51);
}

#[test]
fn random_numbers_set_carry_alone() {
    let mut machine = machine("cascadelake");
    machine.set_flags(rflags::ARITHMETIC);
    let numbers: Vec<u64> = (0..4)
        .map(|_| {
            machine.run(RDRAND_RAX, 1).unwrap();
            machine.cpu.gpr(gpr::RAX)
        })
        .collect();
    assert_eq!(machine.cpu.rflags() & rflags::ARITHMETIC, rflags::CF);
    assert!(numbers.windows(2).all(|pair| pair[0] != pair[1]));
}

#[test]
fn a_feature_that_the_model_lacks_is_undefined() {
    let mut machine = Machine::new();
    let off = ["rdrand", "rdpid", "rdtscp"].map(|name| (name.to_owned(), false));
    machine.cpu.model = Arc::new(Model::new("cascadelake", &off).unwrap());
    for code in [RDRAND_RAX, RDPID_RAX, RDTSCP] {
        assert_eq!(machine.run(code, 1), Err(Stop::Fault));
        assert_eq!(machine.vector(), vector::UD);
    }
}

#[test]
fn long_mode_registers_of_the_saved_state_are_untouched_by_a_fault() {
    let mut machine = machine("cascadelake");
    let before = machine.cpu.state.efer;
    assert_ne!(before & efer::LMA, 0);
    user_mode(&mut machine);
    assert_eq!(write(&mut machine, index::EFER, 0), Err(Stop::Fault));
    assert_eq!(machine.cpu.state.efer, before);
}
