//! Debug exceptions through the dispatcher: breakpoints of DR0 to DR3, RF, general detect, single steps, and what comes first.

mod common;

use std::sync::Arc;

use common::system::*;
use common::{Machine, CODE, DATA};
use softkvm_engine::cpu::breakpoint::{dr6, dr7};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr4, gpr, rflags};
use softkvm_engine::virt::control::intercept;

const HLT: u8 = 0xf4;
const NOP: u8 = 0x90;
/// mov [DATA + 4], eax; mov eax, [DATA]; mov rsi, DATA; mov ss, ax; iretq
const STORE: [u8; 7] = [0x89, 0x04, 0x25, 0x04, 0x00, 0x10, 0x00];
const LOAD: [u8; 7] = [0x8b, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00];
const MOV_SS_AX: [u8; 2] = [0x8e, 0xd0];
const IRETQ: [u8; 2] = [0x48, 0xcf];

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const ACCESS: u64 = 3;
const FOUR_BYTES: u64 = 3;

/// A machine whose handlers halt, and HLT leaves the guest.
fn machine() -> Machine {
    let mut m = Machine::system(CodeSize::Bits64);
    (0..32).for_each(|vector| m.poke(HANDLERS + 16 * vector, &[HLT]));
    m.cpu.control.intercepts = 1 << intercept::HLT;
    m.cpu.clock.tick = u64::MAX;
    m.cpu.state.dr6 = dr6::FIXED;
    m
}

fn breakpoint(m: &mut Machine, number: usize, address: u64, condition: u64, length: u64) {
    m.cpu.state.dr[number] = address;
    m.cpu.state.dr7 |= 2 << (2 * number) | (condition | length << 2) << (16 + 4 * number);
    m.cpu.refresh_breakpoints();
}

/// Runs `code` to the next HLT.
fn run(m: &mut Machine, code: &[u8]) {
    m.load(code);
    m.cpu.run();
    assert!(m.cpu.exit.reason == 12, "left by {:#x} at {:#x}", m.cpu.exit.reason, m.cpu.rip());
}

/// Expects the handler of #DB with `bits` in DR6, and `rip` to return to.
fn trapped(m: &Machine, bits: u64, rip: u64) {
    assert_eq!(m.cpu.rip(), HANDLERS + 16 * u64::from(vector::DB));
    assert_eq!((m.cpu.state.dr6, m.stacked(0)), (dr6::FIXED | bits, rip));
    assert_eq!(m.cpu.state.pending_debug, 0);
}

#[test]
fn an_instruction_breakpoint_hits_before_its_instruction_and_rf_lets_it_pass() {
    let mut m = machine();
    breakpoint(&mut m, 2, CODE + 1, EXECUTE, 0);
    run(&mut m, &[NOP, NOP, HLT]);
    trapped(&m, 4, CODE + 1);
    assert_eq!(m.stacked(2) & rflags::RF, 0);
    let top = m.cpu.gpr(gpr::RSP);
    m.poke(top + 16, &(m.stacked(2) | rflags::RF).to_le_bytes());
    m.poke(CODE + 0x100, &IRETQ);
    m.set_rip(CODE + 0x100);
    m.cpu.run();
    assert_eq!((m.cpu.rip(), m.cpu.rflags() & rflags::RF), (CODE + 2, 0));
}

#[test]
fn a_data_breakpoint_traps_behind_the_access_that_touches_it() {
    for (condition, code, hit) in [(WRITE, STORE, true), (WRITE, LOAD, false), (ACCESS, LOAD, true), (ACCESS, STORE, true)] {
        let mut m = machine();
        m.poke(DATA, &[1; 8]);
        let address = if code == STORE { DATA + 6 } else { DATA + 2 };
        breakpoint(&mut m, 1, address, condition, FOUR_BYTES);
        run(&mut m, &[&[NOP][..], &code, &[NOP, HLT]].concat());
        if hit {
            trapped(&m, 2, CODE + 8);
        } else {
            assert_eq!(m.cpu.rip(), CODE + 9);
        }
    }
}

#[test]
fn accesses_beside_a_data_breakpoint_go_on() {
    let mut m = machine();
    breakpoint(&mut m, 0, DATA + 8, ACCESS, FOUR_BYTES);
    run(&mut m, &[&STORE[..], &LOAD, &[HLT]].concat());
    assert_eq!(m.cpu.rip(), CODE + 14);
}

#[test]
fn each_iteration_of_a_string_instruction_can_trap() {
    let mut m = machine();
    breakpoint(&mut m, 3, DATA + 2, WRITE, 0);
    m.cpu.set_gpr(gpr::RDI, DATA);
    m.cpu.set_gpr(gpr::RCX, 8);
    run(&mut m, &[0xf3, 0xaa, HLT]);
    trapped(&m, 8, CODE); // and goes on there
    assert_eq!((m.cpu.gpr(gpr::RDI), m.cpu.gpr(gpr::RCX)), (DATA + 3, 5));
}

#[test]
fn an_access_that_faults_does_not_trap() {
    let mut m = machine();
    m.unmap(DATA + 0x1000);
    breakpoint(&mut m, 0, DATA + 0xffe, WRITE, 0);
    run(&mut m, &[0x89, 0x04, 0x25, 0xfe, 0x0f, 0x10, 0x00, HLT]);
    assert_eq!(m.cpu.rip(), HANDLERS + 16 * u64::from(vector::PF));
    assert_eq!(m.cpu.state.pending_debug, 0);
}

#[test]
fn an_io_breakpoint_needs_debug_extensions() {
    for extensions in [0, cr4::DE] {
        let mut m = machine();
        m.cpu.state.cr4 |= extensions;
        breakpoint(&mut m, 0, 0x80, PORT, 0);
        run(&mut m, &[0xe6, 0x80, NOP, HLT]);
        match extensions {
            0 => assert_eq!(m.cpu.rip(), CODE + 3),
            _ => trapped(&m, 1, CODE + 2),
        }
    }
}

#[test]
fn mov_to_dr7_turns_breakpoints_on_and_off_where_it_stands() {
    let mut m = machine();
    m.cpu.state.dr[0] = CODE + 4;
    m.cpu.set_gpr(gpr::RAX, 0x402);
    run(&mut m, &[0x0f, 0x23, 0xf8, NOP, NOP, HLT]);
    trapped(&m, 1, CODE + 4);
    m.cpu.set_gpr(gpr::RAX, 0x400);
    run(&mut m, &[0x0f, 0x23, 0xf8, NOP, NOP, HLT]);
    assert_eq!(m.cpu.rip(), CODE + 5);
}

#[test]
fn general_detect_is_a_fault() {
    let mut m = machine();
    m.cpu.state.dr7 = dr7::GD | 0x400;
    run(&mut m, &[NOP, 0x0f, 0x21, 0xf0, HLT]);
    trapped(&m, dr6::BD, CODE + 1);
    assert_eq!((m.cpu.state.dr7, m.stacked(2) & rflags::RF), (0x400, rflags::RF));
}

#[test]
fn a_mov_ss_shadow_holds_traps_and_instruction_breakpoints_back_on_intels_silicon() {
    for (model, hit) in [("cascadelake", false), ("epyc", true)] {
        let mut m = machine();
        m.cpu.model = Arc::new(Model::new(model, &[]).unwrap());
        m.cpu.exit.reason = 0;
        m.cpu.set_gpr(gpr::RAX, KERNEL_DATA.into());
        breakpoint(&mut m, 0, CODE + 2, EXECUTE, 0);
        m.load(&[&MOV_SS_AX[..], &[NOP, HLT]].concat());
        m.cpu.run();
        assert_eq!(m.cpu.rip() == HANDLERS + 16, hit, "{model}");
    }
}

#[test]
fn a_debug_exception_in_a_mov_ss_shadow_takes_the_place_of_what_waits() {
    let mut m = machine();
    m.cpu.set_gpr(gpr::RAX, KERNEL_DATA.into());
    m.set_flags(rflags::TF);
    run(&mut m, &[&MOV_SS_AX[..], &[0xf1, NOP, HLT]].concat());
    trapped(&m, 0, CODE + 3);
}

#[test]
fn single_step_behind_syscall_and_sysret_goes_by_the_flags_that_they_load() {
    let syscall = [0x0f, 0x05];
    for masked in [true, false] {
        let mut m = machine();
        m.cpu.state.lstar = CODE + 0x100;
        m.cpu.state.star = u64::from(KERNEL_CODE) << 32;
        m.cpu.state.fmask = if masked { rflags::TF } else { 0 };
        m.poke(CODE + 0x100, &[NOP, HLT]);
        m.set_flags(rflags::TF);
        run(&mut m, &syscall);
        if masked {
            assert_eq!(m.cpu.rip(), CODE + 0x101);
        } else {
            trapped(&m, dr6::BS, CODE + 0x100);
        }
    }
    let mut m = machine();
    m.cpu.state.star = u64::from(USER_CODE_32) << 48;
    m.cpu.set_gpr(gpr::RCX, CODE + 0x100);
    m.cpu.set_gpr(11, rflags::TF);
    run(&mut m, &[0x48, 0x0f, 0x07]);
    trapped(&m, dr6::BS, CODE + 0x100);
}
