//! 5-level paging: the walk from the fifth level, and how wide addresses are.

mod common;

use common::{Machine, DATA};
use softkvm_engine::state::{cr4, gpr};

/// Room for the table of the fifth level.
const ROOT: u64 = 0x3f_f000;
const PRESENT_WRITABLE_USER: u64 = 7;
/// MOV EAX, [RSI].
const LOAD: [u8; 2] = [0x8b, 0x06];

/// 64-bit mode in which both the lowest 256 TB and those above them are the 4-level machine's.
fn machine() -> Machine {
    let mut machine = Machine::new();
    let entry = (machine.cpu.state.cr3 | PRESENT_WRITABLE_USER).to_le_bytes();
    machine.poke(ROOT, &entry);
    machine.poke(ROOT + 8, &entry);
    machine.cpu.state.cr3 = ROOT;
    machine.cpu.state.cr4 |= cr4::LA57;
    machine.cpu.refresh();
    machine.poke(DATA, &0x1234_5678u32.to_le_bytes());
    machine
}

fn load(machine: &mut Machine, la: u64) -> Result<u64, (u8, Option<u32>)> {
    machine.cpu.set_gpr(gpr::RSI, la);
    let outcome = machine.run(&LOAD, 1);
    outcome.map(|()| machine.cpu.gpr(gpr::RAX)).map_err(|_| (machine.cpu.fault.vector, machine.cpu.fault.error))
}

#[test]
fn addresses_have_57_bits() {
    let mut machine = machine();
    assert_eq!(load(&mut machine, DATA), Ok(0x1234_5678));
    assert_eq!(load(&mut machine, 1 << 48 | DATA), Ok(0x1234_5678));
    assert_eq!(load(&mut machine, 2 << 48 | DATA), Err((14, Some(0))));
    assert_eq!(load(&mut machine, 1 << 56 | DATA), Err((13, Some(0))));
}

#[test]
fn the_fifth_level_has_no_large_pages() {
    let mut machine = machine();
    machine.poke(ROOT + 8, &(PRESENT_WRITABLE_USER | 1 << 7).to_le_bytes());
    assert_eq!(load(&mut machine, 1 << 48 | DATA), Err((14, Some(9))));
}

#[test]
fn four_levels_have_48_bits() {
    let mut machine = Machine::new();
    assert_eq!(load(&mut machine, 1 << 48 | DATA), Err((13, Some(0))));
}
