"""`_engine.Core`: entry, exits, kicks and the timer, on both vendors' silicon."""

from __future__ import annotations

from softkvm import _engine, silicon
from softkvm.silicon.control import Intercept, Register, SegmentRegister
from tests.helpers.one_core import CODE, HOST_INTERRUPT, Machine

OUT_10H_AL = b"\xe6\x10"
LOOP = b"\xeb\xfe"
CPUID = b"\x0f\xa2"
DEVICE = 0xD000_0000


def test_output_leaves_before_the_instruction(machine: Machine) -> None:
    machine.load(OUT_10H_AL)
    machine.view.control.intercepts = 1 << Intercept.IO
    reason = machine.run()
    assert reason in (30, 0x7B)
    assert reason == machine.view.exit.reason
    exit_ = machine.view.exit
    assert (exit_.io_port, exit_.io_size, exit_.io_flags, exit_.instruction_length) == (0x10, 1, 0, 2)
    assert bytes(exit_.instruction_bytes)[: exit_.instruction_bytes_length] == OUT_10H_AL
    assert (machine.view.state.rip, exit_.next_rip) == (CODE, CODE + 2 if reason == 0x7B else 0)


def test_ports_exit_by_bitmap(machine: Machine) -> None:
    machine.load(OUT_10H_AL + b"\xe6\x11")
    machine.view.control.intercepts = 1 << Intercept.IO_BITMAP
    machine.view.io_bitmap[0x11 // 8] = 1 << 0x11 % 8
    assert machine.run() in (30, 0x7B)
    assert (machine.view.exit.io_port, machine.view.state.rip) == (0x11, CODE + 2)


def test_cpuid_can_be_intercepted(machine: Machine) -> None:
    machine.load(CPUID)
    machine.view.control.intercepts = 1 << Intercept.CPUID
    assert machine.run() in (10, 0x72)


def test_a_kick_before_the_entry_is_remembered_once(machine: Machine) -> None:
    machine.load(OUT_10H_AL)
    machine.view.control.intercepts = 1 << Intercept.IO
    machine.core.kick()
    assert machine.enter() in HOST_INTERRUPT
    assert machine.view.exit.instructions == 0
    assert machine.run() in (30, 0x7B)


def test_the_timer_ends_an_endless_loop(machine: Machine) -> None:
    machine.load(LOOP)
    instructions = 0
    while not instructions:  # the host may have been with others for the whole time
        deadline = _engine.tsc() + _engine.tsc_khz()
        machine.core.set_timer(deadline)
        while _engine.tsc() < deadline:
            assert machine.enter() in HOST_INTERRUPT
            instructions += machine.view.exit.instructions
    assert machine.view.state.rip == CODE


def test_memory_that_is_not_mapped_is_a_nested_fault(machine: Machine) -> None:
    machine.view.state.segments[SegmentRegister.CS].base = 0xF000_0000
    assert machine.run() in (48, 0x400)
    assert machine.view.exit.gpa == 0xF000_0000 + CODE


def reads_a_device(machine: Machine, emulate: int) -> None:
    """mov al, [0]; cpuid, with DS where no memory is and one completed access for it."""
    machine.load(b"\xa0\0\0" + CPUID)
    machine.view.state.segments[SegmentRegister.DS].base = DEVICE
    machine.view.control.intercepts = 1 << Intercept.CPUID
    machine.view.control.emulate = emulate
    done = machine.view.access[0]
    done.gpa, done.size, done.data[0] = DEVICE, 1, 0x5A


def test_an_emulated_instruction_asks_for_its_access(machine: Machine) -> None:
    reads_a_device(machine, silicon.EMULATE_ONE)
    assert machine.run() == silicon.EXIT_ACCESS
    access = machine.view.exit.access
    assert (access.gpa, access.size, access.write) == (DEVICE, 1, 0)
    assert (machine.view.state.rip, machine.view.control.emulate) == (CODE, silicon.EMULATE_ONE)


def test_an_emulated_instruction_takes_its_access_and_stops(machine: Machine) -> None:
    reads_a_device(machine, silicon.EMULATE_ONE)
    machine.view.control.access_count = 1
    machine.core.kick()  # waits until the instruction is done
    assert machine.enter() == silicon.EXIT_EMULATED
    assert (machine.view.state.rip, machine.view.state.gpr[Register.RAX], machine.view.control.emulate) == (CODE + 3, 0x5A, 0)


def test_the_guest_runs_on_behind_the_emulated_instruction(machine: Machine) -> None:
    reads_a_device(machine, silicon.EMULATE_FIRST)
    machine.view.control.access_count = 1
    assert machine.run() in (10, 0x72)
    assert (machine.view.state.rip, machine.view.state.gpr[Register.RAX], machine.view.control.emulate) == (CODE + 3, 0x5A, 0)


def test_an_impossible_state_fails_the_entry(machine: Machine) -> None:
    machine.view.state.cr0 = 1 << 31  # paging without protection
    machine.view.state.gpr[Register.RAX] = 0x1234
    assert machine.run() in (0x8000_0021, 0xFFFF_FFFF)
    assert machine.view.state.gpr[Register.RAX] == 0x1234


def test_translation_without_paging_is_the_identity(machine: Machine) -> None:
    assert machine.core.translate(machine.block, machine.npt, 0x1234, 1) == 0x1234


def test_counters_count(machine: Machine) -> None:
    machine.load(OUT_10H_AL)
    before = machine.core.counters()["instructions"]
    machine.view.control.intercepts = 1 << Intercept.IO_BITMAP
    machine.view.control.instruction_budget = 1
    assert machine.run() == 0x10002
    assert machine.core.counters()["instructions"] == before + 1
