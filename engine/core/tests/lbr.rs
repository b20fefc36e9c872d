//! Last branch records and the branch log: every kind of transfer, every filter, and what both say of the same program (SDM vol. 3, ch. 18).

mod common;

use common::system::*;
use common::watched::*;
use common::{Machine, CODE};
use softkvm_engine::cpu::CodeSize;
use softkvm_engine::fault::vector;
use softkvm_engine::jit::Tier;
use softkvm_engine::pmu::branch::Kind;
use softkvm_engine::pmu::debugctl;
use softkvm_engine::pmu::lbr::{select, ENTRIES};
use softkvm_engine::state::{efer, gpr, rflags};

fn recording() -> Machine {
    let mut machine = machine("cascadelake");
    machine.cpu.state.debugctl = debugctl::LBR;
    machine
}

/// The records of the stack, oldest first.
fn records(machine: &Machine) -> Vec<(u64, u64)> {
    let lbr = &machine.cpu.pmu.lbr;
    (1..=ENTRIES).map(|n| (lbr.tos + n) % ENTRIES).filter(|n| lbr.from[*n] != 0).map(|n| (lbr.from[n], lbr.to[n])).collect()
}

/// Which bits of LBR_SELECT drop a kind.
fn class(kind: Kind) -> u64 {
    match kind {
        Kind::Conditional | Kind::Loop => select::CONDITIONAL,
        Kind::Call | Kind::ZeroCall => select::RELATIVE_CALL,
        Kind::IndirectCall => select::INDIRECT_CALL,
        Kind::Return => select::RETURN,
        Kind::IndirectJump => select::INDIRECT_JUMP,
        Kind::Jump => select::RELATIVE_JUMP,
        _ => select::FAR,
    }
}

#[test]
fn the_log_is_the_truth() {
    for seed in 0..40 {
        let code = program(seed);
        let mut slow = recording();
        slow.load(&code);
        let truth: Vec<Branch> = truth(&mut slow).branches.into_iter().filter(|(_, taken)| *taken).map(|(branch, _)| branch).collect();
        let mut fast = recording();
        fast.load(&code);
        log_branches(&mut fast);
        assert_eq!(enter(&mut fast), EXIT_HLT);
        assert_eq!(logged(&mut fast), truth, "seed {seed}");
    }
}

#[test]
fn the_stack_holds_the_end_of_the_log_that_its_filter_lets_through() {
    for mask in (0..1 << 9).step_by(3).chain((0..9).map(|bit| 1 << bit)) {
        let mut machine = recording();
        set(&mut machine, 0x1c8, mask);
        machine.load(&program(mask % 7));
        log_branches(&mut machine);
        assert_eq!(enter(&mut machine), EXIT_HLT);
        let passed: Vec<(u64, u64)> = logged(&mut machine)
            .into_iter()
            .filter(|(kind, ..)| mask & (select::CPL_0 | class(*kind)) == 0)
            .map(|(_, from, to)| (from, to))
            .collect();
        assert_eq!(records(&machine), passed[passed.len().saturating_sub(ENTRIES)..], "{mask:#x}");
    }
}

/// What anybody can know of branches after each of four runs of a program: records, and counters of seven events.
fn watched(tier: Tier, seed: u64, debugctl: u64, select: u64, events: [u64; 4]) -> Vec<(usize, Vec<u64>, Vec<u64>)> {
    let mut machine = recording();
    machine.cpu.set_translator(tier.threshold());
    machine.cpu.state.debugctl = debugctl;
    set(&mut machine, 0x1c8, select);
    for (n, event) in events.into_iter().enumerate() {
        set(&mut machine, 0x186 + n as u32, if event == 0 { 0 } else { event | 3 << 16 | 1 << 22 });
    }
    machine.load(&program(seed));
    let run = |_| {
        machine.set_rip(CODE);
        assert_eq!(enter(&mut machine), EXIT_HLT);
        let lbr = &machine.cpu.pmu.lbr;
        let records = [lbr.from, lbr.to, lbr.info].concat();
        (lbr.tos, records, (0..4).map(|n| get(&machine, 0xc1 + n)).collect())
    };
    (0..4).map(run).collect()
}

#[test]
fn host_code_watches_as_the_interpreter_does() {
    const CYCLES: u64 = 0x3c;
    const KINDS: [u64; 4] = [0x01c4, 0x20c4, 0xc5, 0x08c4];
    let mut cases: Vec<_> = (0..10).map(|bit| (debugctl::LBR, 1 << bit, [CYCLES, 0, 0, 0])).collect();
    cases.extend([
        (0, 0, KINDS),
        (0, 0, [CYCLES, 0, 0, 0]),
        (debugctl::LBR, 0, [0; 4]),
        (debugctl::LBR, 0, KINDS),
        (debugctl::LBR, 0x3c6, KINDS),
    ]);
    for (n, (debugctl, select, events)) in cases.into_iter().enumerate() {
        for seed in [3, 8, n as u64 + 20] {
            let [translated, interpreted] = [Tier::Translator, Tier::Interpreter].map(|tier| watched(tier, seed, debugctl, select, events));
            assert_eq!(translated, interpreted, "seed {seed}, debugctl {debugctl:#x}, select {select:#x}, events {events:x?}");
        }
    }
}

#[test]
fn call_stack_mode_holds_the_open_calls() {
    let mut open = Vec::new();
    let mut machine = recording();
    set(&mut machine, 0x1c8, 0x3c6);
    machine.load(&program(12));
    log_branches(&mut machine);
    // Stop in the middle of it, several calls deep.
    machine.cpu.pmu.write(0x186, 0xc0 | 1 << 17 | 1 << 20 | 1 << 22).unwrap();
    machine.cpu.pmu.write(0x4c1, (1 << 48) - 1500).unwrap();
    machine.cpu.pmu.lvtpc = 0x400;
    assert_eq!(enter(&mut machine), EXIT_NMI);
    for (kind, from, to) in logged(&mut machine) {
        match kind {
            Kind::Call | Kind::IndirectCall => open.push((from, to)),
            Kind::Return => drop(open.pop()),
            _ => {}
        }
    }
    assert!(!open.is_empty());
    assert_eq!(records(&machine), open);
}

#[test]
fn privilege_filters_look_at_the_target() {
    // In user mode: int SERVICE, whose handler returns; then UD2, whose handler halts.
    for (mask, expected) in [
        (0, vec![(CODE, HANDLERS + 0x210), (HANDLERS + 0x210, CODE + 2), (CODE + 2, HANDLERS + 0x60)]),
        (select::CPL_0, vec![(HANDLERS + 0x210, CODE + 2)]),
        (select::CPL_OTHER, vec![(CODE, HANDLERS + 0x210), (CODE + 2, HANDLERS + 0x60)]),
        (select::FAR, vec![]),
    ] {
        let mut machine = recording();
        machine.gate(SERVICE, 0xee, 0);
        machine.poke(HANDLERS + 16 * u64::from(vector::UD), &[0xf4]);
        machine.load(&[0xcd, SERVICE, 0x0f, 0x0b]);
        machine.enter_user();
        set(&mut machine, 0x1c8, mask);
        assert_eq!(enter(&mut machine), EXIT_HLT);
        assert_eq!(records(&machine), expected, "{mask:#x}");
    }
}

/// Runs `code` with the log on, and returns what it holds, which the stack holds too.
fn log_of(machine: &mut Machine, code: &[u8]) -> Vec<Branch> {
    machine.load(code);
    log_branches(machine);
    assert_eq!(enter(machine), EXIT_HLT);
    let log = logged(machine);
    assert_eq!(records(machine), log.iter().map(|(_, from, to)| (*from, *to)).collect::<Vec<_>>());
    log
}

#[test]
fn far_transfers_have_their_kinds() {
    // push 8; push next; retfq; nop; hlt
    let mut machine = recording();
    let code = [0x6a, 0x08, 0x68, 0x0a, 0x80, 0, 0, 0x48, 0xcb, 0x90, 0xf4];
    assert_eq!(log_of(&mut machine, &code), [(Kind::FarReturn, CODE + 7, CODE + 10)]);

    // A far jump and a far call through memory at DATA.
    for (modrm, kind) in [(0x2c, Kind::FarJump), (0x1c, Kind::FarCall)] {
        let mut machine = recording();
        machine.poke(0x10_0000, &[8, 0x80, 0, 0, 8, 0]);
        assert_eq!(log_of(&mut machine, &[0xff, modrm, 0x25, 0, 0, 0x10, 0, 0x90, 0xf4]), [(kind, CODE, CODE + 8)]);
    }
}

#[test]
fn system_calls_and_their_returns() {
    let mut machine = recording();
    machine.cpu.state.efer |= efer::SCE;
    machine.cpu.state.star = u64::from(KERNEL_CODE) << 32 | 0x1b << 48;
    machine.cpu.state.lstar = HANDLERS;
    machine.poke(HANDLERS, &[0x48, 0x0f, 0x07]);
    machine.poke(HANDLERS + 16 * u64::from(vector::UD), &[0xf4]);
    machine.cpu.set_gpr(11, 2);
    machine.enter_user();
    let log = log_of(&mut machine, &[0x0f, 0x05, 0x0f, 0x0b]);
    assert_eq!(log, [(Kind::Syscall, CODE, HANDLERS), (Kind::Sysret, HANDLERS, CODE + 2), (Kind::Exception, CODE + 2, HANDLERS + 0x60)]);
}

#[test]
fn injected_interrupts_come_from_what_would_have_run() {
    let mut machine = recording();
    machine.cpu.state.rflags |= rflags::IF;
    machine.load(&[0x90, 0xf4]);
    log_branches(&mut machine);
    machine.cpu.begin_watch();
    machine.cpu.deliver_event(1 << 31 | u32::from(SERVICE), 0, 0).unwrap();
    machine.cpu.run();
    let handler = HANDLERS + 16 * u64::from(SERVICE);
    assert_eq!(logged(&mut machine), [(Kind::Interrupt, CODE, handler), (Kind::Iret, handler, CODE)]);
}

#[test]
fn a_debug_exception_is_not_recorded_and_turns_recording_off() {
    // jmp +0 (recorded); int1 is an INT; icebp's handler halts. With TF, the trap behind the first jump ends it all.
    let mut machine = recording();
    machine.poke(HANDLERS + 16 * u64::from(vector::DB), &[0xeb, 0, 0xf4]);
    machine.load(&[0xeb, 0, 0x90]);
    machine.set_flags(rflags::TF);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(records(&machine), [(CODE, CODE + 2)]);
    assert_eq!(machine.cpu.state.debugctl & debugctl::LBR, 0);
}

#[test]
fn btf_steps_from_branch_to_branch() {
    // nop; jnz (not taken); jmp; nop; the handler of #DB halts.
    let mut machine = machine("cascadelake");
    machine.cpu.state.debugctl = debugctl::BTF;
    machine.poke(HANDLERS + 16 * u64::from(vector::DB), &[0xf4]);
    machine.load(&[0x31, 0xc0, 0x75, 5, 0x90, 0xeb, 2, 0x90, 0x90, 0x90, 0x90]);
    machine.set_flags(rflags::TF);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!((machine.handler(), machine.stacked(0)), (1, CODE + 9));
    assert_eq!(machine.cpu.state.debugctl & debugctl::BTF, 0);
}

#[test]
fn info_tells_cycles_and_mispredictions() {
    // nop; jmp; jmp; nop; nop; jnz (taken, predicted not taken); jmp; hlt
    let mut machine = recording();
    machine.set_flags(0);
    machine.load(&[0x90, 0xeb, 0, 0xeb, 0, 0x90, 0x90, 0x75, 0, 0xeb, 0, 0xf4]);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    let info = &machine.cpu.pmu.lbr.info;
    assert_eq!(info[2..5], [1, 19 | 1 << 63, 1]);
}

#[test]
fn a_loop_to_itself_is_recorded_turn_by_turn() {
    // mov ecx, 100; loop .; hlt
    let mut machine = recording();
    machine.load(&[0xb9, 100, 0, 0, 0, 0xe2, 0xfe, 0xf4]);
    log_branches(&mut machine);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(logged(&mut machine), [(Kind::Loop, CODE + 5, CODE + 5); 99]);
    assert_eq!(machine.cpu.pmu.lbr.info, [5; ENTRIES]);
}

#[test]
fn branches_of_code_that_is_overwritten_before_it_leaves_are_recorded() {
    // again: jmp 1f; 1: dec ecx; jnz again; jmp store; ...; store: mov byte [rbx], 0xeb, which is there already; hlt
    let mut code = vec![0xf4; 0x90];
    code[..8].copy_from_slice(&[0xeb, 0, 0xff, 0xc9, 0x75, 0xfa, 0xeb, 0x78]);
    code[0x80..0x84].copy_from_slice(&[0xc6, 0x03, 0xeb, 0xf4]);
    let mut machine = recording();
    machine.load(&code);
    for _ in 0..5 {
        [(gpr::RBX, CODE), (gpr::RCX, 50)].into_iter().for_each(|(register, value)| machine.cpu.set_gpr(register, value));
        machine.set_rip(CODE);
        assert_eq!(enter(&mut machine), EXIT_HLT);
        let turn = [(CODE, CODE + 2), (CODE + 4, CODE)];
        let wanted: Vec<_> = turn.into_iter().cycle().take(ENTRIES - 2).chain([(CODE, CODE + 2), (CODE + 6, CODE + 0x80)]).collect();
        assert_eq!(records(&machine), wanted);
    }
}

#[test]
fn legacy_code_has_short_addresses() {
    let mut machine = Machine::with_size(CodeSize::Bits16);
    machine.cpu.clock.tick = u64::MAX;
    machine.cpu.control.intercepts = 1 << softkvm_engine::virt::control::intercept::HLT;
    machine.cpu.state.debugctl = debugctl::LBR;
    // At FFFC: jmp +1 to 10000, which is beyond the limit, is #GP; here: jmp back over the segment's start to FFF0.
    machine.poke(0xfff0, &[0xf4]);
    machine.poke(0x10, &[0xeb, 0xde]);
    machine.set_rip(0x10);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(records(&machine), [(0x10, 0xfff0)]);
}

#[test]
fn records_survive_exits_and_stop_with_debugctl() {
    let mut machine = recording();
    machine.load(&[0xeb, 0, 0xf4]);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    machine.cpu.state.debugctl = 0;
    machine.load(&[0xeb, 0, 0xf4]);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(records(&machine).len(), 1);
    assert_eq!(machine.cpu.gpr(gpr::RAX), 0);
}
