//! System calls and their returns: whoever runs them, the interpreter or host code, leaves the same.

mod common;

use common::system::{KERNEL_CODE, USER_CODE_32};
use common::Machine;
#[cfg(target_arch = "x86_64")]
use common::CODE;
#[cfg(target_arch = "x86_64")]
use iced_x86::Mnemonic;
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::state::{cr4, efer, gpr, rflags, seg};
use softkvm_engine::virt::control::intercept;

const KERNEL: u64 = 0x2_0000;
const EXIT_HLT: u32 = 12;
const CALLS: u64 = 200;
/// FMASK of Linux, and some that leave what host code does not expect.
const MASKS: [u64; 5] = [0x25_7fd5, rflags::IF, 0, rflags::ARITHMETIC, rflags::AC | rflags::DF];

/// RBX is mixed, flags follow from it and go into RSI by way of the stack; R11 and RCX, as the call left them, are summed up.
const USER: &[u8] = &[
    0x48, 0x6b, 0xdb, 0x6d, // imul rbx, rbx, 109
    0x48, 0x81, 0xc3, 0x39, 0x30, 0x00, 0x00, // add rbx, 12345
    0xf6, 0xc3, 0x10, // test bl, 16
    0x74, 0x01, // jz $+3
    0xfd, // std
    0x00, 0xd8, // add al, bl
    0x0f, 0x05, // syscall
    0x9c, // pushfq
    0x5a, // pop rdx
    0x4c, 0x01, 0xda, // add rdx, r11
    0x48, 0x01, 0xca, // add rdx, rcx
    0x48, 0x01, 0xd6, // add rsi, rdx
    0xfc, // cld
    0x9c, // pushfq
    0x48, 0x81, 0x34, 0x24, 0x00, 0x00, 0x04, 0x00, // xor qword [rsp], AC
    0x9d, // popfq
    0xeb, 0xd3, // jmp to the start
];

/// Registers that host code reads by itself go into RSI; the last call ends in HLT.
const HANDLER: &[u8] = &[
    0x0f, 0x01, 0xf8, // swapgs
    0x48, 0xff, 0xcd, // dec rbp
    0x74, 0x32, // jz to the end
    0xfb, // sti
    0x90, // nop
    0x9c, // pushfq
    0x5a, // pop rdx
    0x48, 0x01, 0xd6, // add rsi, rdx
    0x0f, 0x20, 0xd2, // mov rdx, cr2
    0x48, 0x01, 0xd6, // add rsi, rdx
    0x0f, 0x20, 0xda, // mov rdx, cr3
    0x48, 0x01, 0xd6, // add rsi, rdx
    0x8c, 0xd2, // mov edx, ss
    0x48, 0x01, 0xd6, // add rsi, rdx
    0x8c, 0xca, // mov edx, cs
    0x48, 0x01, 0xd6, // add rsi, rdx
    0x49, 0x89, 0xc8, // mov r8, rcx
    0x31, 0xc9, // xor ecx, ecx
    0x0f, 0x01, 0xee, // rdpkru
    0x4c, 0x89, 0xc1, // mov rcx, r8
    0x48, 0x01, 0xc6, // add rsi, rax
    0xfa, // cli
    0x0f, 0x01, 0xf8, // swapgs
    0x48, 0x0f, 0x07, // sysretq
    0xf4, // hlt
];

/// A user program that makes calls, and their handler, on a machine that translates blocks after `threshold` runs.
fn machine(threshold: Option<u32>, mask: u64) -> Machine {
    let mut machine = Machine::system(CodeSize::Bits64);
    machine.load(USER);
    machine.poke(KERNEL, HANDLER);
    let state = &mut machine.cpu.state;
    state.star = u64::from(KERNEL_CODE) << 32 | u64::from(USER_CODE_32) << 48;
    (state.lstar, state.fmask, state.kernel_gs_base, state.cr2) = (KERNEL, mask, 0x1234_5000, 0x5678);
    state.efer |= efer::SCE;
    state.cr4 |= cr4::PKE;
    state.fpu.pkru = 0x5555_5550;
    machine.enter_user();
    machine.cpu.set_gpr(gpr::RBP, CALLS);
    machine.cpu.control.intercepts |= 1 << intercept::HLT;
    machine.cpu.clock.tick = u64::MAX;
    machine.cpu.set_translator(threshold);
    machine
}

/// Everything that the program can have changed.
fn outcome(machine: &Machine) -> impl PartialEq + std::fmt::Debug {
    let cpu = &machine.cpu;
    let segments = [seg::CS, seg::SS, seg::GS].map(|number| cpu.state.segments[number]);
    (cpu.regs, cpu.rflags(), cpu.instructions(), segments, cpu.state.kernel_gs_base, cpu.cpl())
}

#[test]
fn calls_leave_the_same_with_every_tier() {
    for mask in MASKS {
        let mut expected = None;
        for threshold in [None, Some(1), Some(8)] {
            let mut machine = machine(threshold, mask);
            machine.cpu.run();
            assert_eq!(machine.cpu.exit.reason, EXIT_HLT);
            assert_eq!(machine.cpu.gpr(gpr::RBP), 0);
            let expected = expected.get_or_insert(outcome(&machine));
            assert_eq!(*expected, outcome(&machine), "FMASK {mask:#x}, translated after {threshold:?}");
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn calls_stay_in_host_code() {
    let mut machine = machine(Some(1), MASKS[0]);
    // Without the change of AC, which makes host code leave loading the flags to the interpreter.
    machine.poke(CODE + USER.len() as u64 - 5, &[0]);
    machine.cpu.run();
    let interpreted = machine.cpu.native.counts.interpreted();
    assert!(interpreted.iter().all(|(mnemonic, count)| *mnemonic == Mnemonic::Popfq || *count < CALLS / 2), "{interpreted:?}");
    assert!(machine.cpu.native.counts.misses < CALLS / 2 && machine.cpu.blocks_run < CALLS / 2);
}

#[test]
fn a_time_stamp_is_read_between_two_others() {
    // rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; rdtscp; hlt
    let code = [0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09, 0xd0, 0x48, 0x89, 0xc3, 0x0f, 0x01, 0xf9, 0xf4];
    for multiplier in [0, 1 << 48, 3 << 47] {
        let mut machine = Machine::system(CodeSize::Bits64);
        machine.load(&code);
        machine.cpu.control.intercepts |= 1 << intercept::HLT;
        machine.cpu.set_translator(Some(1));
        (machine.cpu.clock.tick, machine.cpu.clock.multiplier, machine.cpu.clock.offset) = (u64::MAX, multiplier, 1 << 60);
        machine.cpu.state.tsc_aux = 77;
        let before = machine.cpu.guest_tsc();
        machine.cpu.run();
        let after = machine.cpu.guest_tsc();
        let [rax, rbx, rcx, rdx] = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|register| machine.cpu.gpr(register));
        assert!(rax >> 32 == 0 && rdx >> 32 == 0 && rcx == 77);
        let times = [before, rbx, rdx << 32 | rax, after];
        assert!(times.is_sorted(), "{times:?} with multiplier {multiplier:#x}");
        assert!(machine.cpu.native.counts.misses == 0 && machine.cpu.native.counts.interpreted().iter().all(|(_, count)| *count == 1));
    }
}
