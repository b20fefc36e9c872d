//! Virtual time: a TSC that counts retired instructions, timers that end by it, and random numbers that repeat.

mod common;

use common::guest::Guest;
use softkvm_engine::virt::control::intercept;

const RATE: u64 = 4;
const EXIT_EXTERNAL_INTERRUPT: u32 = 1;
const EXIT_HLT: u32 = 12;
const EXIT_PAUSE: u32 = 40;
const EXIT_PREEMPTION_TIMER: u32 = 52;
const EXIT_BUDGET: u32 = 0x10002;
/// Longest block of the engine: how late a timer may be.
const BLOCK: u64 = 64;

/// A guest in virtual time that begins at `now`; HLT exits.
fn guest(code: &[u8], now: u64) -> Guest {
    let mut guest = Guest::new(code);
    let control = &mut guest.block().control;
    control.intercepts = 1 << intercept::HLT;
    (control.tsc_rate, control.virtual_tsc, control.random) = (RATE as u32, now, 42);
    guest
}

fn gpr(guest: &mut Guest, number: usize) -> u64 {
    guest.block().state.gpr[number]
}

#[test]
fn rdtsc_counts_the_instructions_before_it_and_itself() {
    // 3 x INC ECX; RDTSC; MOV ESI, EAX; INC ECX; RDTSC; HLT
    let mut guest = guest(&[0x41, 0x41, 0x41, 0x0f, 0x31, 0x89, 0xc6, 0x41, 0x0f, 0x31, 0xf4], 1000);
    guest.block().control.tsc_offset = 5;
    assert_eq!(guest.enter(), EXIT_HLT);
    assert_eq!((gpr(&mut guest, 6), gpr(&mut guest, 0)), (1005 + 4 * RATE, 1005 + 7 * RATE));
    let exit = guest.block().exit;
    assert_eq!((exit.instructions, exit.tsc), (7, 1000 + 7 * RATE), "HLT exits before it retires");
}

/// A program of loops, stores, RDTSC and RDRAND; run with `budget` instructions at a time, zero for all at once. Registers and time.
fn sliced(budget: u64) -> ([u64; 16], u64, u64) {
    let code: &[u8] = &[
        0xb9, 0x00, 0x10, 0x00, 0x00, // MOV ECX, 1000h
        0x0f, 0x31, // again: RDTSC
        0x01, 0xc3, // ADD EBX, EAX
        0x0f, 0xc7, 0xf0, // RDRAND EAX
        0x31, 0xc5, // XOR EBP, EAX
        0x89, 0x2c, 0x8d, 0x00, 0x00, 0x10, 0x00, // MOV [100000h + 4 * ECX], EBP
        0xf3, 0x90, // PAUSE
        0xe2, 0xec, // LOOP again
        0xf4, // HLT
    ];
    let mut guest = guest(code, 77);
    let mut instructions = 0;
    loop {
        guest.block().control.instruction_budget = budget;
        let reason = guest.enter();
        let exit = guest.block().exit;
        instructions += exit.instructions;
        guest.block().control.virtual_tsc = exit.tsc;
        if reason == EXIT_HLT {
            return (guest.block().state.gpr, instructions, exit.tsc);
        }
        assert_eq!((reason, exit.instructions), (EXIT_BUDGET, budget));
    }
}

#[test]
fn how_a_run_is_cut_into_pieces_changes_nothing() {
    let whole = sliced(0);
    assert_eq!((whole.1, whole.2), (1 + 7 * 0x1000, 77 + RATE * (1 + 7 * 0x1000)));
    for budget in [1, 7, 63, 64, 65, 1000, 20_000] {
        assert_eq!(sliced(budget), whole, "{budget} at a time");
    }
}

#[test]
fn timers_end_a_run_by_virtual_time() {
    let endless: &[u8] = &[0xeb, 0xfe];
    let mut by_preemption = guest(endless, 0);
    by_preemption.block().control.intercepts |= 1 << intercept::PREEMPTION_TIMER;
    by_preemption.block().control.preemption_deadline = 1_000_000;
    assert_eq!(by_preemption.enter(), EXIT_PREEMPTION_TIMER);
    let mut by_core = guest(endless, 0);
    by_core.core().set_timer(1_000_000);
    assert_eq!(by_core.enter(), EXIT_EXTERNAL_INTERRUPT);
    for guest in [&mut by_preemption, &mut by_core] {
        let late = guest.block().exit.tsc - 1_000_000;
        assert!(late < BLOCK * RATE, "{late} cycles late");
    }
}

#[test]
fn a_timer_that_is_due_lets_nothing_run() {
    let mut guest = guest(&[0xeb, 0xfe], 1000);
    guest.core().set_timer(999);
    assert_eq!(guest.enter(), EXIT_EXTERNAL_INTERRUPT);
    assert_eq!((guest.block().exit.instructions, guest.block().exit.tsc), (0, 1000));
}

#[test]
fn a_halted_core_skips_to_its_timer() {
    let mut guest = guest(&[0xf4], 0);
    guest.block().control.intercepts = 0;
    guest.core().set_timer(1 << 40);
    assert_eq!(guest.enter(), EXIT_EXTERNAL_INTERRUPT);
    assert_eq!((guest.block().exit.tsc, guest.block().state.activity), (1 << 40, 1));
    guest.block().control.virtual_tsc = 1 << 40;
    assert_eq!(guest.enter(), EXIT_EXTERNAL_INTERRUPT, "without a timer it is up to the hypervisor");
    assert_eq!(guest.block().exit.tsc, 1 << 40);
}

#[test]
fn pause_loops_are_as_old_as_virtual_time_says() {
    let mut guest = guest(&[0xf3, 0x90, 0xeb, 0xfc], 0);
    (guest.block().control.pause_gap, guest.block().control.pause_window) = (128, 4000);
    assert_eq!(guest.enter(), EXIT_PAUSE);
    let age = guest.block().exit.tsc;
    assert!((4000..4100).contains(&age), "{age}");
}

#[test]
fn the_same_seed_gives_the_same_random_numbers() {
    // RDRAND EAX; RDSEED EBX; HLT
    let code: &[u8] = &[0x0f, 0xc7, 0xf0, 0x0f, 0xc7, 0xfb, 0xf4];
    let numbers = |seed: u64| {
        let mut guest = guest(code, 0);
        guest.block().control.random = seed;
        assert_eq!(guest.enter(), EXIT_HLT);
        assert_eq!(guest.block().state.rflags & 1, 1);
        assert_ne!(guest.block().control.random, seed, "the generator moves on");
        (gpr(&mut guest, 0), gpr(&mut guest, 3))
    };
    assert_eq!(numbers(1), numbers(1));
    assert_ne!(numbers(1), numbers(2));
    let (first, second) = numbers(1);
    assert_ne!(first, second);
}
