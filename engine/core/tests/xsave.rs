//! FXSAVE and the XSAVE family: images, header rules, XCR0.

mod common;

use common::{Machine, DATA};
use softkvm_engine::state::{gpr, seg};

/// `0F AE /digit` or `0F C7 /digit` with REX.W at `[rdi]`.
fn code(opcode: u8, digit: u8) -> [u8; 4] {
    [0x48, 0x0f, opcode, 0x07 | digit << 3]
}
const XSAVE: (u8, u8) = (0xae, 4);
const XRSTOR: (u8, u8) = (0xae, 5);
const XSAVEOPT: (u8, u8) = (0xae, 6);
const XSAVEC: (u8, u8) = (0xc7, 4);
const XSAVES: (u8, u8) = (0xc7, 5);
const XRSTORS: (u8, u8) = (0xc7, 3);
const FXSAVE: (u8, u8) = (0xae, 0);
const FXRSTOR: (u8, u8) = (0xae, 1);

const HEADER: u64 = DATA + 512;
const GENERAL_PROTECTION: u8 = 13;

/// A machine with x87 and SSE enabled in XCR0, RDI at the area, all components requested.
fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.cpu.state.xcr0 = 3;
    machine.cpu.set_gpr(gpr::RDI, DATA);
    machine.cpu.set_gpr(gpr::RAX, u64::MAX);
    machine.cpu.set_gpr(gpr::RDX, u64::MAX);
    machine.poke(DATA, &[0xcc; 512]);
    machine.poke(HEADER, &[0; 64]);
    machine
}

fn run(machine: &mut Machine, (opcode, digit): (u8, u8)) -> Result<(), u8> {
    machine.run(&code(opcode, digit), 1).map_err(|_| machine.vector())
}

fn bitmap(machine: &Machine) -> u64 {
    u64::from_le_bytes(machine.bytes(HEADER))
}

#[test]
fn fxsave_round_trip_keeps_software_bytes() {
    let mut machine = machine();
    machine.cpu.state.fpu.vector[15][..16].fill(0x5a);
    machine.cpu.state.fpu.mxcsr = 0x3f80;
    assert_eq!(run(&mut machine, FXSAVE), Ok(()));
    assert_eq!(machine.bytes::<4>(DATA + 24), 0x3f80u32.to_le_bytes());
    assert_eq!(machine.bytes::<16>(DATA + 400), [0x5a; 16]);
    assert_eq!(machine.bytes::<16>(DATA + 416), [0xcc; 16]);
    machine.cpu.state.fpu = Default::default();
    assert_eq!(run(&mut machine, FXRSTOR), Ok(()));
    assert_eq!((machine.cpu.state.fpu.mxcsr, machine.cpu.state.fpu.vector[15][0]), (0x3f80, 0x5a));
}

#[test]
fn reserved_mxcsr_bits_and_misalignment() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, FXRSTOR), Err(GENERAL_PROTECTION));
    machine.cpu.set_gpr(gpr::RDI, DATA + 16);
    assert_eq!(run(&mut machine, FXSAVE), Ok(()));
    assert_eq!(run(&mut machine, XSAVE), Err(GENERAL_PROTECTION));
    machine.cpu.set_gpr(gpr::RDI, DATA + 8);
    assert_eq!(run(&mut machine, FXSAVE), Err(GENERAL_PROTECTION));
}

#[test]
fn xsave_tells_which_components_are_in_use() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    assert_eq!(bitmap(&machine), 0);
    machine.cpu.state.fpu.vector[3][0] = 1;
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    assert_eq!(bitmap(&machine), 2);
    // A component that is not requested keeps its bit.
    machine.cpu.state.fpu.fcw = 0x27f;
    machine.cpu.set_gpr(gpr::RAX, 1);
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    assert_eq!(bitmap(&machine), 3);
}

#[test]
fn xsaveopt_leaves_out_initial_components() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, XSAVEOPT), Ok(()));
    assert_eq!(machine.bytes::<16>(DATA + 160), [0xcc; 16]);
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    assert_eq!(machine.bytes::<16>(DATA + 160), [0; 16]);
}

#[test]
fn xsavec_writes_a_compacted_header_and_xrstor_takes_it() {
    let mut machine = machine();
    machine.cpu.state.fpu.mxcsr = 0x1fa0;
    assert_eq!(run(&mut machine, XSAVEC), Ok(()));
    assert_eq!(bitmap(&machine), 2);
    assert_eq!(u64::from_le_bytes(machine.bytes(HEADER + 8)), 1 << 63 | 3);
    machine.cpu.state.fpu.mxcsr = 0x1f80;
    machine.cpu.state.fpu.fcw = 0x27f;
    assert_eq!(run(&mut machine, XRSTOR), Ok(()));
    assert_eq!((machine.cpu.state.fpu.mxcsr, machine.cpu.state.fpu.fcw), (0x1fa0, 0x37f));
}

#[test]
fn xrstor_resets_what_the_area_lacks() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    machine.cpu.state.fpu.vector[3].fill(7);
    machine.cpu.state.fpu.fcw = 0x27f;
    assert_eq!(run(&mut machine, XRSTOR), Ok(()));
    assert_eq!(machine.cpu.state.fpu.fcw, 0x37f);
    assert_eq!(machine.cpu.state.fpu.vector[3][..16], [0; 16]);
    assert_eq!(machine.cpu.state.fpu.vector[3][16], 7);
}

#[test]
fn xrstor_refuses_headers() {
    for (at, value) in [(0u64, 4u64), (8, 1), (16, 1), (8, 1 << 63 | 4), (8, 1 << 63 | 1 << 62)] {
        let mut machine = machine();
        assert_eq!(run(&mut machine, XSAVE), Ok(()));
        machine.poke(HEADER + at, &value.to_le_bytes());
        assert_eq!(run(&mut machine, XRSTOR), Err(GENERAL_PROTECTION), "{value:#x} at {at}");
    }
    let mut machine = machine();
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    machine.poke(HEADER + 8, &(1u64 << 63 | 1).to_le_bytes());
    machine.poke(HEADER, &2u64.to_le_bytes());
    assert_eq!(run(&mut machine, XRSTOR), Err(GENERAL_PROTECTION), "a component without room");
}

#[test]
fn xgetbv_and_xsetbv() {
    let mut machine = machine();
    machine.cpu.set_gpr(gpr::RCX, 0);
    assert!(machine.run(&[0x0f, 0x01, 0xd0], 1).is_ok());
    assert_eq!((machine.cpu.gpr(gpr::RAX), machine.cpu.gpr(gpr::RDX)), (3, 0));
    machine.cpu.set_gpr(gpr::RCX, 2);
    assert!(machine.run(&[0x0f, 0x01, 0xd0], 1).is_err());
    assert_eq!(machine.vector(), GENERAL_PROTECTION);
    // XSETBV leaves an Intel guest whatever the hypervisor asked for.
    assert!(machine.run(&[0x0f, 0x01, 0xd1], 1).is_err());
    assert_eq!(machine.cpu.exit.reason, 55);
    machine.cpu.state.cr4 &= !(1 << 18);
    assert!(machine.run(&[0x0f, 0x01, 0xd1], 1).is_err());
    assert_eq!(machine.vector(), 6);
}

#[test]
fn the_avx_component_lies_behind_the_header() {
    let mut machine = machine();
    machine.cpu.state.xcr0 = 7;
    machine.cpu.state.fpu.vector[2][16..32].fill(0x77);
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    assert_eq!((bitmap(&machine), machine.bytes::<16>(DATA + 576 + 32)), (4, [0x77; 16]));
    machine.cpu.state.fpu.vector[2].fill(0);
    machine.cpu.state.fpu.vector[3][16..].fill(0x11);
    assert_eq!(run(&mut machine, XRSTOR), Ok(()));
    assert_eq!(machine.cpu.state.fpu.vector[2][16..32], [0x77; 16]);
    assert_eq!(machine.cpu.state.fpu.vector[3][16..], [[0; 16], [0x11; 16], [0x11; 16]].concat());
    assert_eq!((machine.cpu.model.xsave_size(7), machine.cpu.model.xcr0_supported() & 7), (832, 7));
}

#[test]
fn xsaves_and_xrstors_are_the_kernels() {
    let mut machine = machine();
    machine.cpu.state.xcr0 = 7;
    machine.cpu.state.fpu.vector[1][16..32].fill(0x33);
    assert_eq!(run(&mut machine, XSAVES), Ok(()));
    assert_eq!((bitmap(&machine), u64::from_le_bytes(machine.bytes(HEADER + 8))), (4, 1 << 63 | 7));
    machine.cpu.state.fpu.vector[1].fill(0);
    assert_eq!(run(&mut machine, XRSTORS), Ok(()));
    assert_eq!(machine.cpu.state.fpu.vector[1][16..32], [0x33; 16]);
    assert_eq!(run(&mut machine, XSAVE), Ok(()));
    machine.poke(HEADER + 8, &0u64.to_le_bytes());
    assert_eq!(run(&mut machine, XRSTORS), Err(GENERAL_PROTECTION), "the standard format");
    machine.cpu.state.segments[seg::SS].access_rights |= 3 << 5;
    machine.cpu.refresh();
    assert_eq!(run(&mut machine, XSAVES), Err(GENERAL_PROTECTION), "CPL 3");
}
