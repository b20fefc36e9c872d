//! Integer arithmetic against the host's CPU, and decimal arithmetic, which 64-bit hosts lack, by its definition.
#![cfg(target_arch = "x86_64")]

mod common;

use common::host::{Comparison, Form, Immediate};
use common::{Machine, DATA};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::state::{gpr, rflags};
use softkvm_engine::uop::Stop;

const ROUNDS: usize = 60;
const LOGIC: u64 = !rflags::AF;

/// Every byte as a one-byte opcode.
const OPCODES: [[u8; 1]; 256] = {
    let mut all = [[0]; 256];
    let mut n = 0;
    while n < 256 {
        all[n][0] = n as u8;
        n += 1;
    }
    all
};

fn defined(operation: u8) -> u64 {
    if matches!(operation, 1 | 4 | 6) {
        LOGIC
    } else {
        u64::MAX
    }
}

#[test]
fn binary_operations() {
    let mut both = Comparison::new(10);
    for operation in 0..8u8 {
        let defined = defined(operation);
        for form in 0..4 {
            let opcode: &'static [u8] = &OPCODES[usize::from(operation * 8 + form)];
            both.check_modrm(&Form { defined, ..Form::new(opcode) }, ROUNDS);
            if form < 2 && operation != 7 {
                both.check_modrm(&Form { defined, lock: true, ..Form::new(opcode) }, ROUNDS);
            }
        }
        let group = |opcode, immediate, lock| Form { extension: Some(operation), immediate, defined, lock, ..Form::new(opcode) };
        for lock in [false, operation != 7] {
            both.check_modrm(&Form { sizes: 1, ..group(&[0x80], Immediate::Byte, lock) }, ROUNDS);
            both.check_modrm(&group(&[0x81], Immediate::Word, lock), ROUNDS);
            both.check_modrm(&group(&[0x83], Immediate::Byte, lock), ROUNDS);
        }
        for _ in 0..ROUNDS {
            let registers = both.registers();
            both.check(&[operation * 8 + 4, 0x95], registers, defined);
            both.check(&[0x48, operation * 8 + 5, 0x95, 0x12, 0x80, 0x80], registers, defined);
        }
    }
}

#[test]
fn test() {
    let mut both = Comparison::new(11);
    for form in [
        Form::new(&[0x84]),
        Form::new(&[0x85]),
        Form { extension: Some(0), immediate: Immediate::Byte, sizes: 1, ..Form::new(&[0xf6]) },
        Form { extension: Some(0), immediate: Immediate::Word, ..Form::new(&[0xf7]) },
    ] {
        both.check_modrm(&Form { defined: LOGIC, ..form }, ROUNDS);
    }
}

#[test]
fn unary_operations() {
    let mut both = Comparison::new(12);
    for (opcode, extension) in [([0xf6u8, 0xf7], 2), ([0xf6, 0xf7], 3), ([0xfe, 0xff], 0), ([0xfe, 0xff], 1)] {
        for opcode in opcode {
            for lock in [false, true] {
                let form = Form { extension: Some(extension), lock, ..Form::new(&OPCODES[usize::from(opcode)]) };
                both.check_modrm(&form, ROUNDS);
            }
        }
    }
}

#[test]
fn exchange_and_add() {
    let mut both = Comparison::new(13);
    for lock in [false, true] {
        both.check_modrm(&Form { lock, ..Form::new(&[0x0f, 0xc0]) }, ROUNDS);
        both.check_modrm(&Form { lock, ..Form::new(&[0x0f, 0xc1]) }, ROUNDS);
    }
    both.check_modrm(&Form { prefix: &[0x66], sizes: 5, ..Form::new(&[0x0f, 0x38, 0xf6]) }, ROUNDS);
    both.check_modrm(&Form { prefix: &[0xf3], sizes: 5, ..Form::new(&[0x0f, 0x38, 0xf6]) }, ROUNDS);
}

#[test]
fn compare_and_exchange() {
    let mut both = Comparison::new(14);
    for lock in [false, true] {
        both.check_modrm(&Form { lock, ..Form::new(&[0x0f, 0xb0]) }, ROUNDS);
        both.check_modrm(&Form { lock, ..Form::new(&[0x0f, 0xb1]) }, ROUNDS);
    }
    // The comparison succeeds where memory and accumulator come from few values.
    let image: Vec<u8> = vec![0; common::DATA_SIZE];
    for equal in [false, true] {
        for wide in [false, true] {
            let mut registers = both.registers();
            registers.gpr[gpr::RAX] = u64::from(!equal);
            registers.gpr[gpr::RDX] = 0;
            registers.gpr[gpr::RSI] = both.machine.data() + 64;
            let plain: &[u8] = if wide { &[0x48, 0x0f, 0xc7, 0x0e] } else { &[0x0f, 0xc7, 0x0e] };
            both.check_with_data(plain, registers, u64::MAX, &image);
            let locked: Vec<u8> = [&[0xf0], plain].concat();
            both.check_with_data(&locked, registers, u64::MAX, &image);
            both.check_with_data(&[0x48, 0x0f, 0xb1, 0x1e], registers, u64::MAX, &image);
            both.check_with_data(&[0x0f, 0xb1, 0xcb], registers, u64::MAX, &image);
        }
    }
}

#[test]
fn compare_and_exchange_of_16_bytes_is_aligned_and_needs_write_access() {
    let mut machine = Machine::new();
    machine.cpu.set_gpr(gpr::RSI, DATA + 8);
    assert_eq!(machine.run(&[0x48, 0x0f, 0xc7, 0x0e], 1), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::GP);
    machine.unmap(DATA);
    machine.cpu.set_gpr(gpr::RSI, DATA);
    assert_eq!(machine.run(&[0x48, 0x0f, 0xc7, 0x0e], 1), Err(Stop::Fault));
    assert_eq!((machine.vector(), machine.cpu.fault.error), (vector::PF, Some(2)));
}

#[test]
fn single_flags() {
    let mut both = Comparison::new(15);
    for opcode in [0xf5, 0xf8, 0xf9, 0xfc, 0xfd] {
        for _ in 0..8 {
            let registers = both.registers();
            both.check(&[opcode], registers, u64::MAX);
        }
    }
}

/// AX and flags after one decimal instruction in 32-bit code.
fn decimal(code: &[u8], ax: u16, flags: u64) -> (u16, u64) {
    let mut machine = Machine::with_size(CodeSize::Bits32);
    machine.cpu.set_gpr(gpr::RAX, ax.into());
    machine.set_flags(flags);
    machine.run(code, 1).unwrap();
    (machine.cpu.gpr(gpr::RAX) as u16, machine.cpu.rflags() & (rflags::CF | rflags::AF))
}

#[test]
fn decimal_adjustment() {
    const BOTH: u64 = rflags::CF | rflags::AF;
    assert_eq!(decimal(&[0x27], 0x9a, 0), (0x00, BOTH)); // daa: 0x99 + 1
    assert_eq!(decimal(&[0x27], 0x0b, 0), (0x11, rflags::AF));
    assert_eq!(decimal(&[0x27], 0x35, rflags::CF), (0x95, rflags::CF));
    assert_eq!(decimal(&[0x2f], 0x0f, rflags::AF), (0x09, rflags::AF)); // das
    assert_eq!(decimal(&[0x2f], 0xff, BOTH), (0x99, BOTH));
    assert_eq!(decimal(&[0x2f], 0x05, rflags::AF), (0xff, BOTH));
    assert_eq!(decimal(&[0x37], 0x010b, 0), (0x0201, BOTH)); // aaa
    assert_eq!(decimal(&[0x37], 0x0019, 0), (0x0009, 0));
    assert_eq!(decimal(&[0x3f], 0x02ff, rflags::AF), (0x0109, BOTH)); // aas
    assert_eq!(decimal(&[0xd4, 10], 0x003f, 0).0, 0x0603); // aam
    assert_eq!(decimal(&[0xd6], 0x1234, 1).0, 0x12ff); // salc
    assert_eq!(decimal(&[0xd6], 0x1234, 0).0, 0x1200);
    assert_eq!(decimal(&[0xd5, 10], 0x0603, 0).0, 0x003f); // aad
}

#[test]
fn decimal_division_by_zero() {
    let mut machine = Machine::with_size(CodeSize::Bits32);
    assert_eq!(machine.run(&[0xd4, 0], 1), Err(Stop::Fault));
    assert_eq!(machine.vector(), vector::DE);
}

#[test]
fn locked_operations_of_two_cpus_do_not_lose_updates() {
    let mut machine = Machine::new();
    let (host, _) = machine.cpu.chunk(3, DATA, 8, softkvm_engine::paging::AccessKind::Write).unwrap().unwrap();
    let address = host as usize;
    machine.cpu.set_gpr(gpr::RSI, DATA);
    let other = std::thread::spawn(move || {
        for _ in 0..20_000 {
            // SAFETY: the counter lies in the machine's RAM, which lives until this thread is joined.
            unsafe { std::sync::atomic::AtomicU64::from_ptr(address as *mut u64) }.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
    });
    for _ in 0..20_000 {
        machine.run(&[0xf0, 0x48, 0xff, 0x06], 1).unwrap(); // lock inc qword [rsi]
    }
    other.join().unwrap();
    assert_eq!(machine.bytes(DATA), 40_000u64.to_le_bytes());
}
