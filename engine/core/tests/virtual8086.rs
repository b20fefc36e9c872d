//! Virtual-8086 mode with CR4.VME: where INT n goes, and the interrupt flag that the program has of its own.

mod common;

use common::system::*;
use common::Machine;
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::state::{cr4, rflags, rights, seg, Segment};
use softkvm_engine::uop::Stop;

const CS: u64 = 0x2000;
const SS: u64 = 0x1000;
const SP: u64 = 0xfff0;
const VECTOR: u64 = 0x21;
const INT: [u8; 2] = [0xcd, VECTOR as u8];
const IRET: [u8; 1] = [0xcf];
/// Offset of the I/O map in the TSS, right behind the redirection bitmap.
const MAP: u64 = 0x90;
const REDIRECTION: u64 = TSS + MAP - 32;
const IOPL_3: u64 = rflags::IOPL;

/// A virtual-8086 program with `flags` whose every INT n is redirected to 3000:0040.
fn machine(flags: u64) -> Machine {
    let mut m = Machine::system(CodeSize::Bits32);
    m.cpu.state.cr4 |= cr4::VME;
    m.cpu.state.segments[seg::TR] = Segment::new(TASK, rights::PRESENT | 0xb, 0x200, TSS);
    m.poke(TSS + 102, &(MAP as u16).to_le_bytes());
    m.poke(4 * VECTOR, &[0x40, 0, 0, 0x30]);
    m.cpu.load_rflags(flags | rflags::VM | 2);
    for (number, selector) in [(seg::CS, CS), (seg::SS, SS), (seg::DS, 0), (seg::ES, 0), (seg::FS, 0), (seg::GS, 0)] {
        m.cpu.state.segments[number] = m.cpu.real_segment(number, selector as u16);
    }
    m.cpu.refresh();
    m.cpu.set_gpr(4, SP);
    m
}

fn run(m: &mut Machine, code: &[u8]) -> Result<(), (u8, Option<u32>)> {
    m.poke(CS << 4, code);
    m.set_rip(0);
    m.step().map_err(|stop| {
        assert_eq!(stop, Stop::Fault);
        (m.cpu.fault.vector, m.cpu.fault.error)
    })
}

/// IP, CS and FLAGS on the program's stack.
fn frame(m: &Machine) -> [u64; 3] {
    [0, 2, 4].map(|n| u16::from_le_bytes(m.bytes((SS << 4) + m.cpu.gpr(4) + n)).into())
}

#[test]
fn a_clear_bit_sends_int_n_to_the_program() {
    let mut m = machine(IOPL_3 | rflags::IF);
    run(&mut m, &INT).unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.state.segments[seg::CS].base, m.cpu.cpl()), (0x40, 0x3_0000, 3));
    assert_eq!(frame(&m), [2, CS, IOPL_3 | rflags::IF | 2]);
    assert_eq!(m.cpu.rflags() & rflags::IF, 0);
}

#[test]
fn below_iopl_3_the_program_has_vif_for_if() {
    let mut m = machine(rflags::IF | rflags::VIF);
    run(&mut m, &INT).unwrap();
    assert_eq!(frame(&m), [2, CS, IOPL_3 | rflags::IF | 2]);
    assert_eq!(m.cpu.rflags() & (rflags::IF | rflags::VIF), rflags::IF);
    m.poke(0x3_0040, &IRET);
    m.step().unwrap();
    assert_eq!((m.cpu.rip(), m.cpu.gpr(4)), (2, SP));
    assert_eq!(m.cpu.rflags() & (rflags::IF | rflags::VIF | rflags::IOPL | rflags::VM), rflags::IF | rflags::VIF | rflags::VM);
}

#[test]
fn iret_that_would_let_a_pending_interrupt_in_is_for_the_monitor() {
    for (flags, image) in [(rflags::VIP, rflags::IF), (0, rflags::TF)] {
        let mut m = machine(flags);
        m.poke((SS << 4) + SP, &[0, 0, 0, 0x20]);
        m.poke((SS << 4) + SP + 4, &(image as u16).to_le_bytes());
        assert_eq!(run(&mut m, &IRET), Err((vector::GP, Some(0))));
        assert_eq!(m.cpu.gpr(4), SP);
    }
    let mut m = machine(0);
    assert_eq!(run(&mut m, &[0x66, 0xcf]), Err((vector::GP, Some(0))), "IRETD");
}

#[test]
fn a_set_bit_sends_int_n_to_the_idt_at_iopl_3_and_to_the_monitor_below() {
    for (flags, redirected) in [(IOPL_3, false), (0, false), (0, true)] {
        let mut m = machine(flags);
        m.gate(VECTOR as u8, USER_TRAP_GATE, 0);
        m.poke(REDIRECTION + VECTOR / 8, &[u8::from(!redirected) << (VECTOR % 8)]);
        let outcome = run(&mut m, &INT);
        match (flags, redirected) {
            (IOPL_3, _) => assert_eq!((outcome, m.handler(), m.cpu.cpl()), (Ok(()), VECTOR, 0)),
            (_, false) => assert_eq!(outcome, Err((vector::GP, Some(0)))),
            (_, true) => assert_eq!((outcome, m.cpu.rip()), (Ok(()), 0x40)),
        }
    }
}

#[test]
fn a_bitmap_beyond_the_limit_of_the_tss_is_a_general_protection_fault() {
    for (limit, map) in [(0x66, MAP), (0x200, 8), (0x200, 0x300)] {
        let mut m = machine(IOPL_3);
        m.cpu.state.segments[seg::TR].limit = limit;
        m.poke(TSS + 102, &(map as u16).to_le_bytes());
        assert_eq!(run(&mut m, &INT), Err((vector::GP, Some(0))), "limit {limit:#x}, map {map:#x}");
    }
}
