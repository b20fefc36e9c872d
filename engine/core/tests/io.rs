//! IN, OUT, INS, OUTS: permission, exits of both vendors, and the empty bus.

mod common;

use std::sync::Arc;

use common::{Machine, DATA};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::model::Model;
use softkvm_engine::state::{gpr, rflags, rights, seg, Segment};
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

const IN_AL_DX: &[u8] = &[0xec];
const IN_AL_71: &[u8] = &[0xe4, 0x71];
const OUT_DX_EAX: &[u8] = &[0xef];
const REP_INSB: &[u8] = &[0xf3, 0x6c];
const REP_OUTSD: &[u8] = &[0xf3, 0x6f];
const TSS: u64 = 0x3000;

fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RDX, 0x3f8);
    machine
}

fn intercepted() -> Machine {
    let mut machine = machine();
    machine.cpu.control.intercepts = 1 << intercept::IO;
    machine
}

/// A user-mode machine with a 64-bit TSS whose I/O map starts at 104 and ends at the limit.
fn user() -> Machine {
    let mut machine = machine();
    let state = &mut machine.cpu.state;
    state.segments[seg::TR] = Segment::new(0x40, rights::PRESENT | 0xb, 104 + 0x80, TSS);
    for number in [seg::CS, seg::SS] {
        state.segments[number].access_rights |= 3 << rights::DPL_SHIFT;
    }
    machine.cpu.refresh();
    machine.poke(TSS + 102, &104u16.to_le_bytes());
    machine
}

#[test]
fn an_empty_bus_floats_high() {
    let mut machine = machine();
    machine.cpu.set_gpr(gpr::RAX, 0);
    machine.run(IN_AL_DX, 1).unwrap();
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0xff);
    machine.run(OUT_DX_EAX, 1).unwrap();
}

#[test]
fn rep_ins_fills_memory_and_counts_down() {
    let mut machine = machine();
    machine.cpu.set_gpr(gpr::RDI, DATA);
    machine.cpu.set_gpr(gpr::RCX, 3);
    machine.run(REP_INSB, 1).unwrap();
    assert_eq!(machine.peek(DATA, 4), [0xff, 0xff, 0xff, 0]);
    assert_eq!((machine.cpu.gpr(gpr::RDI), machine.cpu.gpr(gpr::RCX)), (DATA + 3, 0));
}

#[test]
fn a_repetition_of_zero_does_nothing() {
    let mut machine = intercepted();
    machine.cpu.set_gpr(gpr::RCX, 0);
    machine.cpu.set_gpr(gpr::RDI, 0xdead_0000_0000);
    machine.run(REP_INSB, 1).unwrap();
}

#[test]
fn intel_tells_the_access_in_the_qualification() {
    let mut machine = intercepted();
    assert_eq!(machine.run(IN_AL_71, 1), Err(Stop::Exit));
    let exit = &machine.cpu.exit;
    assert_eq!((exit.reason, exit.qualification), (30, 0x71 << 16 | 1 << 6 | 1 << 3));
    assert_eq!((exit.io_port, exit.io_size, exit.io_flags, exit.io_count), (0x71, 1, 1, 1));
}

#[test]
fn intel_tells_the_string_and_where_it_is() {
    let mut machine = intercepted();
    machine.cpu.set_gpr(gpr::RSI, DATA + 8);
    machine.cpu.set_gpr(gpr::RCX, 5);
    machine.cpu.set_rflags(rflags::FIXED | rflags::DF);
    assert_eq!(machine.run(REP_OUTSD, 1), Err(Stop::Exit));
    let exit = &machine.cpu.exit;
    assert_eq!(exit.qualification, 0x3f8 << 16 | 1 << 5 | 1 << 4 | 3);
    assert_eq!((exit.io_flags, exit.io_count, exit.io_gla), (2 | 4 | 16 | 32, 5, DATA + 8));
    assert_eq!((exit.instruction_info, machine.cpu.gpr(gpr::RCX)), (2 << 7 | 3 << 15, 5));
}

#[test]
fn amd_tells_the_access_in_exitinfo() {
    let mut machine = intercepted();
    machine.cpu.model = Arc::new(Model::new("epyc", &[]).unwrap());
    machine.cpu.set_gpr(gpr::RSI, DATA);
    machine.cpu.set_gpr(gpr::RCX, 2);
    assert_eq!(machine.run(REP_OUTSD, 1), Err(Stop::Exit));
    let exit = &machine.cpu.exit;
    assert_eq!((exit.reason, exit.qualification), (0x7b, 0x3f8 << 16 | 3 << 10 | 1 << 9 | 1 << 6 | 1 << 3 | 1 << 2));
    assert_eq!(exit.info2, machine.cpu.rip() + 2);
}

#[test]
fn memory_is_checked_before_the_exit() {
    let mut machine = intercepted();
    machine.unmap(DATA);
    machine.cpu.set_gpr(gpr::RDI, DATA);
    machine.cpu.set_gpr(gpr::RCX, 1);
    assert_eq!(machine.run(REP_INSB, 1), Err(Stop::Fault));
    assert_eq!((machine.vector(), machine.cpu.fault.payload), (vector::PF, DATA));
}

#[test]
fn user_mode_asks_the_tss() {
    let mut machine = user();
    assert_eq!(machine.run(IN_AL_DX, 1), Ok(()));
    machine.poke(TSS + 104 + 0x3f8 / 8, &[1 << 3]);
    assert_eq!(machine.run(IN_AL_DX, 1), Ok(()));
    assert_eq!(machine.run(OUT_DX_EAX, 1), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::GP);
    machine.cpu.set_rflags(rflags::FIXED | rflags::IOPL);
    assert_eq!(machine.run(OUT_DX_EAX, 1), Ok(()));
}

#[test]
fn ports_behind_the_end_of_the_map_are_refused() {
    let mut machine = user();
    machine.cpu.set_gpr(gpr::RDX, 0x400);
    assert_eq!(machine.run(IN_AL_DX, 1), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::GP);
}

#[test]
fn real_mode_has_every_port() {
    let mut machine = Machine::with_size(CodeSize::Bits16);
    assert_eq!(machine.run(IN_AL_71, 1), Ok(()));
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0xff);
}
