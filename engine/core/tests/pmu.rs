//! Performance monitoring: registers, exact counts, overflow at the right instruction, freezing, both vendors (SDM vol. 3, ch. 20).

mod common;

use common::system::HANDLERS;
use common::watched::*;
use common::{Machine, CODE};
use softkvm_engine::fault::vector;
use softkvm_engine::jit::Tier;
use softkvm_engine::pmu::branch::Kind;
use softkvm_engine::pmu::registers::{index, status};
use softkvm_engine::pmu::{debugctl, lvt};
use softkvm_engine::state::{cr4, gpr, interruptibility};
use softkvm_engine::uop::Stop;
use softkvm_engine::virt::control::intercept;

const USR: u64 = 1 << 16;
const OS: u64 = 1 << 17;
const EDGE: u64 = 1 << 18;
const INT: u64 = 1 << 20;
const EN: u64 = 1 << 22;
const INV: u64 = 1 << 23;
const INSTRUCTIONS: u64 = 0xc0;
const CYCLES: u64 = 0x3c;
const BRANCHES: u64 = 0xc4;
const PERF_CTL: u32 = 0xc001_0200;

fn intel() -> Machine {
    machine("cascadelake")
}

/// Sets general counter `n` up and clears it.
fn count(machine: &mut Machine, n: u32, select: u64) {
    set(machine, index::EVTSEL + n, 0);
    set(machine, index::PMC + n, 0);
    set(machine, index::EVTSEL + n, select | EN);
}

/// The general counters after a run of `code` to its HLT, with these events on: the same with host code and without.
fn counts<const N: usize>(code: &[u8], events: [u64; N]) -> [u64; N] {
    let run = |tier: Tier| {
        let mut machine = intel();
        machine.cpu.set_translator(tier.threshold());
        machine.load(code);
        for (n, event) in events.into_iter().enumerate() {
            count(&mut machine, n as u32, event | OS | USR);
        }
        assert_eq!(enter(&mut machine), EXIT_HLT);
        std::array::from_fn(|n| get(&machine, index::PMC + n as u32))
    };
    let translated = run(Tier::Translator);
    assert_eq!(run(Tier::Interpreter), translated);
    translated
}

// ---- registers ------------------------------------------------------------------------------------------------------------------------

#[test]
fn registers_take_what_the_manual_lets_them() {
    const COUNTERS: u64 = 0xf | 7 << 32;
    const WIDTH: u64 = (1 << 48) - 1;
    let mut machine = intel();
    for (first, rows, bits) in [
        (index::EVTSEL, 4, 0xffff_ffff),
        (index::A_PMC, 4, WIDTH),
        (index::FIXED_CTR, 3, WIDTH),
        (index::FIXED_CTR_CTRL, 1, 0xfff),
        (index::GLOBAL_CTRL, 1, COUNTERS),
        (index::GLOBAL_STATUS_SET, 1, COUNTERS | status::LBR_FROZEN | status::COUNTERS_FROZEN),
        (index::LBR_SELECT, 1, 0x3ff),
        (index::LBR_INFO, 32, u64::MAX),
    ] {
        for row in first..first + rows {
            for bit in 0..64 {
                let taken = machine.cpu.pmu.write(row, 1 << bit).is_ok();
                assert_eq!(taken, bits >> bit & 1 != 0, "{row:#x} bit {bit}");
            }
            assert!(machine.cpu.pmu.write(row, bits).is_ok());
            let written = row != index::GLOBAL_STATUS_SET;
            assert_eq!(get(&machine, row), if written { bits } else { 0 });
        }
    }
    let all = COUNTERS | status::LBR_FROZEN | status::COUNTERS_FROZEN;
    assert_eq!(get(&machine, index::GLOBAL_STATUS), all);
    set(&mut machine, index::GLOBAL_STATUS_RESET, 1 | status::LBR_FROZEN | 1 << 62 | 1 << 63);
    assert_eq!(get(&machine, index::GLOBAL_STATUS), all & !(1 | status::LBR_FROZEN));
}

#[test]
fn registers_that_are_read_only_or_absent_refuse() {
    let mut machine = intel();
    for index in [index::GLOBAL_STATUS, index::GLOBAL_INUSE, index::PERF_CAPABILITIES] {
        assert!(machine.cpu.pmu.read(index).is_ok() && machine.cpu.pmu.write(index, 0).is_err(), "{index:#x}");
    }
    let absent =
        [0x40, 0x60, 0xc5, 0x18a, 0x30c, 0x329, 0x393, 0x3f1, 0x4c5, 0x4c0, 0x600, 0x6a0, 0x6e0, 0xde0, 0x1a6, 0xc001_0200, 0xc001_0000];
    for index in absent {
        assert!(machine.cpu.pmu.read(index).is_err() && machine.cpu.pmu.write(index, 0).is_err(), "{index:#x}");
    }
    assert_eq!(get(&machine, index::PERF_CAPABILITIES), 0x3005);
    assert_eq!(machine.cpu.model.cpuid(0xa, 0), [0x0730_0404, 0, 0, 0x603]);
}

#[test]
fn the_old_counter_addresses_sign_extend_32_bits() {
    let mut machine = intel();
    set(&mut machine, index::PMC, 0xff01_2345_6789);
    assert_eq!(get(&machine, index::A_PMC), 0x2345_6789);
    set(&mut machine, index::PMC + 3, 0x8000_0000);
    assert_eq!(get(&machine, index::PMC + 3), 0xffff_8000_0000);
    set(&mut machine, index::A_PMC + 1, 0xff01_2345_6789);
    assert_eq!(get(&machine, index::PMC + 1), 0xff01_2345_6789);
}

#[test]
fn branch_records_keep_canonical_addresses_only() {
    let mut machine = intel();
    for index in [index::LBR_FROM, index::LBR_FROM + 31, index::LBR_TO, index::LBR_TO + 31] {
        set(&mut machine, index, 0xffff_8000_0000_0001);
        assert_eq!(get(&machine, index), 0xffff_8000_0000_0001);
        assert!(machine.cpu.pmu.write(index, 1 << 47).is_err() && machine.cpu.pmu.write(index, 1 << 63).is_err());
    }
    set(&mut machine, index::LBR_TOS, 39);
    assert_eq!(get(&machine, index::LBR_TOS), 7);
}

#[test]
fn the_switches_of_the_model_take_registers_away() {
    use softkvm_engine::model::Model;
    use softkvm_engine::pmu::Pmu;
    let without = |name: &str| Model::new("cascadelake", &[(name.to_owned(), false)]).unwrap();
    let readable = |name, index| Pmu::new(&without(name)).read(index).is_ok();
    assert!(!readable("pmu", index::PMC) && !readable("pmu", index::LBR_TOS) && readable("pmu", index::PERF_CAPABILITIES));
    assert!(readable("lbr", index::PMC) && !readable("lbr", index::LBR_TOS));
    assert!(!readable("pdcm", index::PERF_CAPABILITIES) && readable("pdcm", index::PMC));
    assert_eq!(without("pmu").cpuid(0xa, 0), [0; 4]);
    assert_eq!(without("lbr").msrs()[&index::PERF_CAPABILITIES], 0x3000);
}

// ---- counts ---------------------------------------------------------------------------------------------------------------------------

#[test]
fn counts_are_those_of_single_instructions() {
    let kinds = |truth: &Truth, wanted: &[Kind]| truth.branches.iter().filter(|((kind, ..), _)| wanted.contains(kind)).count() as u64;
    for seed in 0..12 {
        let code = program(seed);
        let mut slow = intel();
        slow.load(&code);
        let truth = truth(&mut slow);
        assert!(truth.branches.len() > 50, "seed {seed}: a poor program");
        let conditional = kinds(&truth, &[Kind::Conditional, Kind::Loop]);
        let not_taken = truth.branches.iter().filter(|(_, taken)| !taken).count() as u64;
        let far = kinds(&truth, &[Kind::SoftwareInterrupt, Kind::Iret]);
        let all = truth.branches.len() as u64;
        assert_eq!(
            counts(&code, [INSTRUCTIONS, BRANCHES, 0x01c4, 0x10c4]),
            [truth.instructions, all, conditional, not_taken],
            "seed {seed}"
        );
        let calls = kinds(&truth, &[Kind::Call, Kind::ZeroCall, Kind::IndirectCall]);
        let returns = kinds(&truth, &[Kind::Return]);
        assert_eq!(counts(&code, [0x02c4, 0x08c4, 0x20c4, 0x40c4]), [calls, returns, all - not_taken - far, far], "seed {seed}");
    }
}

#[test]
fn cycles_are_instructions_and_stalls() {
    let code = program(7);
    let [instructions, cycles, reference, stalls] = counts(&code, [INSTRUCTIONS, CYCLES, 0x013c, INSTRUCTIONS | EDGE | 1 << 24]);
    let [mispredicted, idle, nothing, loops] = counts(&code, [0xc5, INSTRUCTIONS | INV | 1 << 24, INSTRUCTIONS | 2 << 24, 0x01c4]);
    let turns = {
        let mut slow = intel();
        slow.load(&code);
        truth(&mut slow).branches.iter().filter(|((kind, ..), _)| *kind == Kind::Loop).count() as u64
    };
    assert!(mispredicted > 0 && turns > 0 && turns < loops);
    assert_eq!(cycles, instructions + 16 * mispredicted + 4 * turns);
    assert_eq!((reference, idle, nothing), (cycles, cycles - instructions, 0));
    assert!(stalls > turns && stalls <= turns + mispredicted);
}

#[test]
fn a_branch_to_the_next_instruction_is_taken_by_its_condition() {
    // xor eax, eax; jz +0; jnz +0; mov ecx, 2; loop +0; loop +0; jrcxz +0; hlt
    let code = [0x31, 0xc0, 0x74, 0, 0x75, 0, 0xb9, 2, 0, 0, 0, 0xe2, 0, 0xe2, 0, 0xe3, 0, 0xf4];
    assert_eq!(counts(&code, [0x01c4, 0x10c4, 0x20c4]), [5, 2, 3]);
}

#[test]
fn privilege_chooses_what_counts() {
    // In user mode: int SERVICE; int SERVICE; then HLT, which faults there; the handler of #GP halts.
    for (rings, expected) in [(USR, 2), (OS, 2), (USR | OS, 4), (0, 0)] {
        let mut machine = intel();
        machine.gate(SERVICE, 0xee, 0);
        machine.poke(HANDLERS + 16 * u64::from(vector::GP), &[0xf4]);
        machine.load(&[0xcd, SERVICE, 0xcd, SERVICE, 0xf4]);
        machine.enter_user();
        count(&mut machine, 0, INSTRUCTIONS | rings);
        count(&mut machine, 1, BRANCHES | rings);
        assert_eq!(enter(&mut machine), EXIT_HLT);
        assert_eq!((get(&machine, index::PMC), get(&machine, index::PMC + 1)), (expected, expected), "{rings:#x}");
    }
}

#[test]
fn what_faults_or_exits_has_not_retired() {
    let mut machine = intel();
    machine.poke(HANDLERS + 16 * u64::from(vector::UD), &[0x90, 0xf4]);
    machine.load(&[0x90, 0x0f, 0x0b]);
    count(&mut machine, 0, INSTRUCTIONS | OS);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(get(&machine, index::PMC), 2);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(get(&machine, index::PMC), 2);
}

#[test]
fn fixed_counters_and_global_control_choose() {
    let code = program(3);
    let [instructions, cycles] = counts(&code, [INSTRUCTIONS, CYCLES]);
    let mut machine = intel();
    machine.load(&code);
    count(&mut machine, 0, INSTRUCTIONS | OS);
    set(&mut machine, index::FIXED_CTR_CTRL, 0x131);
    set(&mut machine, index::GLOBAL_CTRL, 7 << 32);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!([0, 1, 2].map(|n| get(&machine, index::FIXED_CTR + n)), [instructions, cycles, cycles]);
    assert_eq!(get(&machine, index::PMC), 0);
}

#[test]
fn counters_read_themselves_exactly_inside_a_block() {
    // nop; nop; mov ecx, 1 << 30; rdpmc; mov ebx, eax; nop; rdpmc; hlt
    let rdpmc = [0x0f, 0x33];
    let code = [&[0x90, 0x90, 0xb9, 0, 0, 0, 0x40][..], &rdpmc, &[0x89, 0xc3, 0x90], &rdpmc, &[0xf4]].concat();
    let mut machine = intel();
    machine.load(&code);
    set(&mut machine, index::FIXED_CTR_CTRL, 1);
    set(&mut machine, index::GLOBAL_CTRL, 1 << 32);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!((machine.cpu.gpr(gpr::RBX), machine.cpu.gpr(gpr::RAX)), (3, 6));
}

#[test]
fn rdpmc_checks_its_index_and_cr4() {
    let mut machine = intel();
    let read = |machine: &mut Machine, index: u64| {
        machine.cpu.set_gpr(gpr::RCX, index);
        machine.run(&[0x0f, 0x33], 1).map(|()| machine.cpu.gpr(gpr::RDX) << 32 | machine.cpu.gpr(gpr::RAX))
    };
    set(&mut machine, index::A_PMC + 2, 0x1234_5678_9abc);
    assert_eq!(read(&mut machine, 2), Ok(0x1234_5678_9abc));
    assert_eq!(read(&mut machine, 1 << 31 | 2), Ok(0x5678_9abc));
    for index in [4, 64, 1 << 30 | 3, 1 << 29] {
        assert_eq!((read(&mut machine, index), machine.vector()), (Err(Stop::Fault), vector::GP), "{index:#x}");
    }
    machine.enter_user();
    assert_eq!(read(&mut machine, 2), Err(Stop::Fault));
    machine.cpu.state.cr4 |= cr4::PCE;
    assert_eq!(read(&mut machine, 2), Ok(0x1234_5678_9abc));
    machine.cpu.control.intercepts |= 1 << intercept::RDPMC;
    assert_eq!(read(&mut machine, 2), Err(Stop::Exit));
}

// ---- overflow -------------------------------------------------------------------------------------------------------------------------

/// A machine that runs `code` with counter 0 on `event` preset to overflow after `after` events, as an NMI.
fn overflowing(code: &[u8], event: u64, after: u64) -> Machine {
    let mut machine = intel();
    machine.load(code);
    count(&mut machine, 0, event | OS | INT);
    set(&mut machine, index::A_PMC, (1 << 48) - after);
    machine.cpu.pmu.lvtpc = lvt::NMI;
    machine
}

#[test]
fn an_overflow_stops_at_the_instruction_behind_its_event() {
    let code = program(11);
    let mut slow = intel();
    slow.load(&code);
    let total = truth(&mut slow).instructions;
    for after in (1..80).chain((80..total).step_by(397)) {
        let mut machine = overflowing(&code, INSTRUCTIONS, after);
        assert_eq!(enter(&mut machine), EXIT_NMI, "after {after}");
        assert_eq!(machine.cpu.exit.interruption, 0x8000_0202);
        let mut slow = intel();
        slow.load(&code);
        let mut retired = 0;
        while retired < after {
            retired += u64::from(slow.step() != Err(Stop::Again));
        }
        assert_eq!((machine.cpu.rip(), machine.cpu.regs[..16].to_vec()), (slow.cpu.rip(), slow.cpu.regs[..16].to_vec()), "after {after}");
        assert_eq!((get(&machine, index::PMC), get(&machine, index::GLOBAL_STATUS)), (0, 1));
        assert_eq!(machine.cpu.pmu.lvtpc, lvt::NMI | lvt::MASKED);
    }
}

#[test]
fn a_branch_event_overflows_at_its_branch() {
    let code = program(5);
    let mut slow = intel();
    slow.load(&code);
    let truth = truth(&mut slow);
    for (n, ((_, _, to), _)) in truth.branches.iter().enumerate().step_by(7).take(60) {
        let mut machine = overflowing(&code, BRANCHES, n as u64 + 1);
        assert_eq!(enter(&mut machine), EXIT_NMI);
        assert_eq!((machine.cpu.rip(), get(&machine, index::PMC)), (*to, 0), "branch {n}");
    }
}

#[test]
fn cycles_overflow_in_host_code_where_they_do_without() {
    let code = program(6);
    let [cycles] = counts(&code, [CYCLES]);
    for after in (1..200).step_by(7).chain((200..cycles).step_by(211)) {
        let run = |tier: Tier| {
            let mut machine = overflowing(&code, CYCLES, after);
            machine.cpu.set_translator(tier.threshold());
            assert_eq!(enter(&mut machine), EXIT_NMI, "after {after}");
            (machine.cpu.rip(), get(&machine, index::PMC), machine.cpu.regs[..16].to_vec())
        };
        assert_eq!(run(Tier::Translator), run(Tier::Interpreter), "after {after}");
    }
}

#[test]
fn every_counter_has_its_status_bit_and_interrupts_only_if_told() {
    let code = program(2);
    for n in 0..7 {
        for (interrupts, unmasked) in [(false, true), (true, false), (true, true)] {
            let mut machine = intel();
            machine.load(&code);
            if n < 4 {
                count(&mut machine, n, INSTRUCTIONS | OS | if interrupts { INT } else { 0 });
                set(&mut machine, index::A_PMC + n, (1 << 48) - 10);
            } else {
                set(&mut machine, index::FIXED_CTR_CTRL, (if interrupts { 9 } else { 1 }) << (4 * (n - 4)));
                set(&mut machine, index::FIXED_CTR + n - 4, (1 << 48) - 10);
            }
            set(&mut machine, index::GLOBAL_CTRL, 0xf | 7 << 32);
            machine.cpu.pmu.lvtpc = lvt::NMI | if unmasked { 0 } else { lvt::MASKED };
            let reason = enter(&mut machine);
            assert_eq!(reason, if interrupts && unmasked { EXIT_NMI } else { EXIT_HLT });
            assert_eq!(get(&machine, index::GLOBAL_STATUS), if n < 4 { 1 << n } else { 1 << (28 + n) });
        }
    }
}

#[test]
fn a_fixed_delivery_is_a_host_interrupt() {
    let mut machine = overflowing(&program(1), INSTRUCTIONS, 10);
    machine.cpu.pmu.lvtpc = 0x20;
    assert_eq!(enter(&mut machine), 1);
    assert_eq!(machine.cpu.pmu.lvtpc, 0x20 | lvt::MASKED);
}

#[test]
fn an_interrupt_freezes_what_debugctl_says() {
    let code = program(9);
    let mut machine = overflowing(&code, INSTRUCTIONS, 100);
    count(&mut machine, 1, INSTRUCTIONS | OS);
    machine.cpu.state.debugctl = debugctl::LBR | debugctl::FREEZE_LBRS_ON_PMI | debugctl::FREEZE_PERFMON_ON_PMI;
    assert_eq!(enter(&mut machine), EXIT_NMI);
    assert_eq!(get(&machine, index::GLOBAL_STATUS), 1 | status::LBR_FROZEN | status::COUNTERS_FROZEN);
    let tos = get(&machine, index::LBR_TOS);
    assert_eq!((enter(&mut machine), get(&machine, index::LBR_TOS), get(&machine, index::PMC + 1)), (EXIT_HLT, tos, 100));
    assert_ne!(machine.cpu.state.debugctl & debugctl::LBR, 0, "version 4 leaves DEBUGCTL alone");

    let mut machine = overflowing(&code, INSTRUCTIONS, 100);
    machine.cpu.state.debugctl = debugctl::LBR;
    assert_eq!(enter(&mut machine), EXIT_NMI);
    let first = machine.cpu.pmu.lbr.from;
    assert_eq!((get(&machine, index::GLOBAL_STATUS), enter(&mut machine)), (1, EXIT_HLT));
    assert_ne!(machine.cpu.pmu.lbr.from, first);
}

#[test]
fn a_frozen_unit_goes_on_when_its_bits_are_reset() {
    let mut machine = overflowing(&program(9), INSTRUCTIONS, 100);
    machine.cpu.state.debugctl = debugctl::LBR | debugctl::FREEZE_LBRS_ON_PMI | debugctl::FREEZE_PERFMON_ON_PMI;
    assert_eq!(enter(&mut machine), EXIT_NMI);
    let status = get(&machine, index::GLOBAL_STATUS);
    set(&mut machine, index::GLOBAL_STATUS_RESET, status);
    let frozen = machine.cpu.pmu.lbr.from;
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert!(get(&machine, index::PMC) > 0 && machine.cpu.pmu.lbr.from != frozen);
}

#[test]
fn the_guest_that_turns_its_counter_off_meets_the_overflow_first() {
    // nop x 5; wrmsr to GLOBAL_CTRL: the overflow is at the fifth nop.
    let code = [0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x30, 0xf4];
    let mut machine = overflowing(&code, INSTRUCTIONS, 5);
    assert_eq!((enter(&mut machine), machine.cpu.rip()), (EXIT_NMI, CODE + 5));
}

/// A guest whose overflow interrupts are its own, with counter 0 as [`overflowing`] sets it up and an NMI handler that halts.
fn overflowing_inside(code: &[u8], after: u64, entry: u64) -> Machine {
    let mut machine = overflowing(code, INSTRUCTIONS, after);
    machine.cpu.pmu.load_virtual_interrupt(entry);
    machine.poke(HANDLERS + 16 * u64::from(vector::NMI), &[0xf4]);
    machine
}

#[test]
fn a_guest_takes_an_nmi_of_its_own_at_the_instruction_of_the_overflow() {
    for after in 1..6 {
        let mut machine = overflowing_inside(&[0x90; 8], after, lvt::NMI);
        machine.cpu.state.debugctl = debugctl::LBR | debugctl::FREEZE_LBRS_ON_PMI;
        assert_eq!((enter(&mut machine), machine.cpu.rip()), (EXIT_HLT, HANDLERS + 16 * u64::from(vector::NMI)));
        assert_eq!(machine.stacked(0), CODE + after, "the frame's RIP");
        assert_eq!(machine.cpu.state.interruptibility, interruptibility::NMI);
        assert_eq!((get(&machine, index::GLOBAL_STATUS), machine.cpu.state.debugctl), (1, debugctl::FREEZE_LBRS_ON_PMI));
        assert_eq!((machine.cpu.pmu.save_virtual_interrupt(), machine.cpu.pmu.lvtpc), (Some(lvt::NMI | lvt::MASKED), lvt::NMI));
    }
}

#[test]
fn what_a_guest_cannot_take_at_once_is_the_hosts_and_what_it_masks_is_lost() {
    let code = [0x90, 0x90, 0x90, 0x90, 0xf4];
    let mut blocked = overflowing_inside(&code, 2, lvt::NMI);
    blocked.cpu.state.interruptibility = interruptibility::NMI;
    let mut fixed = overflowing_inside(&code, 2, 0x20);
    for machine in [&mut blocked, &mut fixed] {
        assert_eq!((enter(machine), machine.cpu.rip()), (EXIT_NMI, CODE + 2));
        assert_ne!(machine.cpu.pmu.lvtpc & lvt::MASKED, 0);
    }
    let mut masked = overflowing_inside(&code, 2, lvt::NMI | lvt::MASKED);
    assert_eq!((enter(&mut masked), masked.cpu.rip(), get(&masked, index::GLOBAL_STATUS)), (EXIT_HLT, CODE + 4, 1));
}

#[test]
fn an_interrupt_that_the_exit_overtakes_stays_with_the_guest() {
    // The overflow is at the last instruction before HLT, which exits.
    let mut machine = overflowing_inside(&[0x90, 0x90, 0xf4], 2, lvt::NMI);
    machine.cpu.begin_watch();
    machine.cpu.pmu.interrupt = true;
    let entry = machine.cpu.pmu.save_virtual_interrupt();
    assert_eq!((entry, machine.cpu.pmu.interrupt), (Some(lvt::NMI | lvt::PENDING), false));
    machine.cpu.pmu.load_virtual_interrupt(lvt::NMI | lvt::PENDING);
    assert_eq!((enter(&mut machine), machine.cpu.rip()), (EXIT_HLT, HANDLERS + 16 * u64::from(vector::NMI)));
}

// ---- AMD ------------------------------------------------------------------------------------------------------------------------------

#[test]
fn amd_counts_with_its_own_numbers() {
    let code = program(4);
    let mut slow = machine("epyc");
    slow.load(&code);
    let truth = truth(&mut slow);
    let taken = truth.branches.iter().filter(|(_, taken)| *taken).count() as u64;
    let far = truth.branches.iter().filter(|((kind, ..), _)| matches!(kind, Kind::SoftwareInterrupt | Kind::Iret)).count() as u64;
    let returns = truth.branches.iter().filter(|((kind, ..), _)| *kind == Kind::Return).count() as u64;
    let mut amd = machine("epyc");
    amd.load(&code);
    for (n, event) in [0xc0, 0xc2, 0xc4, 0xc6, 0xc8, 0x1_0000_00c0].into_iter().enumerate() {
        set(&mut amd, PERF_CTL + 2 * n as u32, event | OS | USR | EN);
    }
    assert_eq!(enter(&mut amd), 0x78);
    let counts = [0, 1, 2, 3, 4, 5].map(|n| get(&amd, PERF_CTL + 1 + 2 * n));
    assert_eq!(counts, [truth.instructions, truth.branches.len() as u64, taken, far, returns, 0]);
    assert_eq!([0, 1, 2, 3].map(|n| get(&amd, 0xc001_0004 + n)), counts[..4]);
}

#[test]
fn amd_registers_drop_reserved_bits_and_an_overflow_leaves_lvtpc_unmasked() {
    let mut amd = machine("epyc");
    set(&mut amd, PERF_CTL, u64::MAX);
    assert_eq!((get(&amd, PERF_CTL), get(&amd, 0xc001_0000)), (0x30f_ffd7_ffff, 0x30f_ffd7_ffff));
    set(&mut amd, 0xc001_0003, 0xc0 | OS | EN | INT);
    set(&mut amd, 0xc001_0007, u64::MAX - 2);
    set(&mut amd, PERF_CTL, 0);
    amd.cpu.pmu.lvtpc = lvt::NMI;
    amd.load(&[0x90, 0x90, 0x90, 0x90, 0xf4]);
    assert_eq!((enter(&mut amd), amd.cpu.rip(), amd.cpu.pmu.lvtpc), (0x61, CODE + 3, lvt::NMI));
    assert!(amd.cpu.pmu.read(index::GLOBAL_STATUS).is_err());
}

#[test]
fn amd_counts_for_the_guest_or_the_host() {
    for (bits, expected) in [(0, 3), (1 << 40, 3), (1 << 41, 0), (3 << 40, 3)] {
        let mut amd = machine("epyc");
        set(&mut amd, PERF_CTL, 0xc0 | OS | EN | bits);
        amd.load(&[0x90, 0x90, 0x90, 0xf4]);
        assert_eq!((enter(&mut amd), get(&amd, PERF_CTL + 1)), (0x78, expected), "{bits:#x}");
    }
}

#[test]
fn a_loop_to_itself_counts_every_turn() {
    // mov ecx, 1000; loop .; hlt
    let code = [0xb9, 0xe8, 3, 0, 0, 0xe2, 0xfe, 0xf4];
    assert_eq!(counts(&code, [INSTRUCTIONS, 0x01c4, 0x20c4, CYCLES]), [1001, 1000, 999, 1001 + 4000 + 2 * 16]);
    for (after, event) in [(2, INSTRUCTIONS), (65, INSTRUCTIONS), (500, INSTRUCTIONS), (500, BRANCHES)] {
        let mut machine = overflowing(&code, event, after);
        assert_eq!(enter(&mut machine), EXIT_NMI);
        let turns = if event == INSTRUCTIONS { after - 1 } else { after };
        assert_eq!(machine.cpu.gpr(gpr::RCX), 1000 - turns, "{event:#x} {after}");
    }
}

#[test]
fn page_walks_count_by_access() {
    // Loads from two pages, a store to a third, and again: the second round finds everything in the TLB.
    let once = [0x8b, 0x04, 0x25, 0, 0, 0x11, 0, 0x8b, 0x04, 0x25, 0, 0x10, 0x11, 0, 0x89, 0x04, 0x25, 0, 0x20, 0x11, 0];
    let code = [&once[..], &once, &[0xf4]].concat();
    assert_eq!(counts(&code, [0x0e08, 0x0108, 0x0e49, 0x0e85]), [2, 2, 1, 1]);
    let mut machine = intel();
    machine.unmap(0x11_1000);
    machine.poke(HANDLERS + 16 * u64::from(vector::PF), &[0xf4]);
    machine.load(&code);
    count(&mut machine, 0, 0x0108 | OS);
    count(&mut machine, 1, 0x0e08 | OS);
    assert_eq!(enter(&mut machine), EXIT_HLT);
    assert_eq!(get(&machine, index::PMC), get(&machine, index::PMC + 1) + 1);
}
