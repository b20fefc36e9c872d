//! Protection keys: RDPKRU, WRPKRU, and what PKRU and IA32_PKRS forbid.

mod common;

use common::Machine;
use softkvm_engine::model::Model;
use softkvm_engine::state::{cr0, cr4, gpr};

const WRPKRU: [u8; 3] = [0x0f, 0x01, 0xef];
const RDPKRU: [u8; 3] = [0x0f, 0x01, 0xee];
/// MOV EAX, [0x50000] and MOV [0x50000], EAX.
const LOAD: [u8; 7] = [0x8b, 0x04, 0x25, 0, 0, 5, 0];
const STORE: [u8; 7] = [0x89, 0x04, 0x25, 0, 0, 5, 0];
const PAGE: u64 = 0x5_0000;
const KEY: u64 = 5;

fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.map_with_key(PAGE, KEY);
    machine.cpu.state.cr4 |= cr4::PKE;
    machine.cpu.refresh();
    machine.cpu.set_gpr(gpr::RCX, 0);
    machine.cpu.set_gpr(gpr::RDX, 0);
    machine
}

/// Executes WRPKRU with `rights` for the key.
fn allow(machine: &mut Machine, rights: u64) {
    machine.cpu.set_gpr(gpr::RAX, rights << (2 * KEY));
    machine.run(&WRPKRU, 1).expect("WRPKRU");
}

fn run(machine: &mut Machine, code: &[u8]) -> Result<(), (u8, Option<u32>)> {
    machine.run(code, 1).map_err(|_| (machine.cpu.fault.vector, machine.cpu.fault.error))
}

#[test]
fn keys_forbid_data_accesses() {
    let mut machine = machine();
    assert_eq!(run(&mut machine, &LOAD), Ok(()));
    allow(&mut machine, 1);
    assert_eq!(run(&mut machine, &LOAD), Err((14, Some(0x21))));
    assert_eq!(run(&mut machine, &STORE), Err((14, Some(0x23))));
    allow(&mut machine, 2);
    assert_eq!(run(&mut machine, &LOAD), Ok(()));
    assert_eq!(run(&mut machine, &STORE), Err((14, Some(0x23))));
    machine.cpu.state.cr0 &= !cr0::WP;
    machine.cpu.refresh();
    assert_eq!(run(&mut machine, &STORE), Ok(()), "supervisor writes need CR0.WP to be stopped");
    allow(&mut machine, 0);
    assert_eq!(run(&mut machine, &STORE), Ok(()));
}

#[test]
fn keys_of_supervisor_pages_have_rights_of_their_own() {
    let model = Model::new("cascadelake", &[("pks".to_owned(), true)]).unwrap();
    let mut machine = Machine::with_model(model);
    machine.map_supervisor_with_key(PAGE, KEY);
    machine.cpu.state.cr4 |= cr4::PKE | cr4::PKS;
    machine.cpu.state.fpu.pkru = u32::MAX;
    machine.cpu.refresh();
    for (rights, load, store) in [(0, Ok(()), Ok(())), (1, Err(0x21), Err(0x23)), (2, Ok(()), Err(0x23))] {
        machine.cpu.state.pkrs = rights << (2 * KEY);
        machine.cpu.tlb.flush();
        machine.cpu.refresh();
        assert_eq!(run(&mut machine, &LOAD), load.map_err(|code| (14, Some(code))));
        assert_eq!(run(&mut machine, &STORE), store.map_err(|code| (14, Some(code))));
    }
}

#[test]
fn keys_do_not_forbid_fetches() {
    let mut machine = machine();
    allow(&mut machine, 3);
    machine.poke(PAGE, &[0x90]);
    machine.cpu.set_rip(PAGE);
    assert_eq!(machine.step(), Ok(()));
}

#[test]
fn the_register() {
    let mut machine = machine();
    allow(&mut machine, 3);
    machine.cpu.set_gpr(gpr::RDX, 7);
    assert_eq!(run(&mut machine, &WRPKRU), Err((13, Some(0))));
    assert_eq!(run(&mut machine, &RDPKRU), Ok(()));
    assert_eq!((machine.cpu.gpr(gpr::RAX), machine.cpu.gpr(gpr::RDX)), (3 << (2 * KEY), 0));
    machine.cpu.set_gpr(gpr::RCX, 1);
    assert_eq!(run(&mut machine, &RDPKRU), Err((13, Some(0))));
    machine.cpu.state.cr4 &= !cr4::PKE;
    machine.cpu.refresh();
    assert_eq!(run(&mut machine, &RDPKRU), Err((6, None)));
}
