//! Several cores on one nested page table: locked instructions, and code that one core writes and another runs
//! (SDM vol. 3, 9.1.1 to 9.1.3).

mod common;

use common::{Machine, CODE, DATA, STACK_TOP};
use softkvm_engine::cpu::clock::Clock;
use softkvm_engine::cpu::Cpu;
use softkvm_engine::state::gpr;
use softkvm_engine::virt::control::intercept;

const ROUNDS: u32 = 5_000;
const FLAG: u32 = DATA as u32;
const ACKNOWLEDGE: u32 = FLAG + 64;
const ERRORS: u32 = FLAG + 128;
/// Exit reason of HLT on the default model.
const HLT: u32 = 12;
/// Where the second core's program is, and the function that the first one rewrites.
const SECOND: u64 = CODE + 0x2000;
const FUNCTION: u32 = CODE as u32 + 0x4000;

/// A second CPU on the memory and with the registers of `machine`, at `rip`.
fn second(machine: &Machine, rip: u64) -> Box<Cpu> {
    let mut cpu = Cpu::new(machine.cpu.model.clone(), Clock::default());
    cpu.npt = machine.cpu.npt.clone();
    cpu.state = machine.cpu.state;
    cpu.refresh();
    cpu.set_gpr(gpr::RSP, STACK_TOP - 0x1000);
    cpu.set_rip(rip);
    cpu
}

/// Runs each CPU to its HLT, all at the same time.
fn run_all(cpus: &mut [&mut Cpu]) {
    for cpu in cpus.iter_mut() {
        cpu.control.intercepts = 1 << intercept::HLT;
        cpu.clock.tick = u64::MAX;
        cpu.npt.attach(&cpu.signal);
        cpu.signal.set_running(true);
    }
    std::thread::scope(|scope| {
        for cpu in cpus.iter_mut() {
            scope.spawn(|| {
                cpu.run();
                cpu.signal.set_running(false);
                assert_eq!(cpu.exit.reason, HLT, "RIP {:#x}", cpu.rip());
            });
        }
    });
}

fn absolute(opcode: &[u8], address: u32) -> Vec<u8> {
    [opcode, &[0x0c, 0x25], &address.to_le_bytes()].concat()
}

/// `mov ecx, ROUNDS`, then `body` until ECX is zero, then HLT.
fn count_down(body: &[u8]) -> Vec<u8> {
    let mut program = [&[0xb9][..], &ROUNDS.to_le_bytes(), body, &[0xff, 0xc9, 0x0f, 0x85]].concat();
    let back = -(body.len() as i32 + 8);
    program.extend(back.to_le_bytes());
    program.push(0xf4);
    program
}

#[test]
fn locked_instructions_lose_nothing_wherever_the_operand_lies() {
    // lock inc dword [address]: aligned, in one cache line, across lines, across pages, and in a page that holds code.
    for address in [DATA, DATA + 5, DATA + 62, DATA + 0xffe, CODE + 0x800] {
        let mut machine = Machine::new();
        let program = count_down(&[&[0xf0, 0xff, 0x04, 0x25][..], &(address as u32).to_le_bytes()].concat());
        machine.load(&program);
        let mut other = second(&machine, CODE);
        run_all(&mut [&mut machine.cpu, &mut other]);
        assert_eq!(u32::from_le_bytes(machine.bytes(address)), 2 * ROUNDS, "at {address:#x}");
    }
}

#[test]
fn cmpxchg16b_is_atomic_in_a_page_that_holds_code() {
    // again: mov rbx, rax; mov rcx', rdx; inc rbx; lock cmpxchg16b [address]; jnz again; RSI counts.
    let address = CODE as u32 + 0x800;
    let body = [
        &[0x48, 0x89, 0xc3, 0x48, 0x89, 0xd1, 0x48, 0xff, 0xc3, 0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25][..],
        &address.to_le_bytes(),
        &[0x75, 0xeb, 0xff, 0xce, 0x75, 0xe7, 0xf4],
    ]
    .concat();
    let program = [&[0xbe][..], &ROUNDS.to_le_bytes(), &body].concat();
    let mut machine = Machine::new();
    machine.load(&program);
    let mut other = second(&machine, CODE);
    run_all(&mut [&mut machine.cpu, &mut other]);
    assert_eq!(u64::from_le_bytes(machine.bytes(address.into())), 2 * u64::from(ROUNDS));
}

#[test]
fn code_that_one_core_writes_is_what_the_other_runs() {
    // Writer: the function's immediate becomes ECX, then the flag does; it waits for the acknowledgement.
    let wait = |address| [absolute(&[0x39], address), vec![0x75, 0xf7]].concat();
    let writer = count_down(&[absolute(&[0x89], FUNCTION + 1), absolute(&[0x89], FLAG), wait(ACKNOWLEDGE)].concat());
    // Runner: waits for the flag, calls `mov eax, imm32; ret`, and counts the times when it sees an old immediate.
    let call_at = SECOND + 5 + 9;
    let call = (i64::from(FUNCTION) - (call_at as i64 + 5)) as i32;
    let check = [&[0xe8][..], &call.to_le_bytes(), &[0x39, 0xc8, 0x74, 0x07, 0xff, 0x04, 0x25], &ERRORS.to_le_bytes()].concat();
    let runner = count_down(&[wait(FLAG), check, absolute(&[0x89], ACKNOWLEDGE)].concat());
    let mut machine = Machine::new();
    machine.poke(SECOND, &runner);
    machine.poke(FUNCTION.into(), &[0xb8, 0, 0, 0, 0, 0xc3]);
    machine.load(&writer);
    let mut other = second(&machine, SECOND);
    run_all(&mut [&mut machine.cpu, &mut other]);
    assert_eq!(u32::from_le_bytes(machine.bytes(ERRORS.into())), 0);
}
