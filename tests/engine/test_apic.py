"""APIC virtualization of `_engine.Core`: interrupts are posted, delivered by priority, ended, and sent to others without an exit."""

from __future__ import annotations

import threading

import pytest

from softkvm import _engine
from softkvm.silicon.control import Intercept, Register, VirtualApic
from tests.helpers.one_core import CODE, HOST_INTERRUPT, Machine

EOI, ICR, SELF_IPI = 0x80B, 0x830, 0x83F
HLT_EXITS = (12, 0x78)
IO_EXITS, EOI_EXITS, ICR_EXITS, WRMSR_EXITS = (30, 0x7B), (45, 0x402), (56, 0x401), (32, 0x7C)
VECTOR, LOWER, HIGHER = 0x51, 0x31, 0x71
GP = 13
WRMSR, STI, NOP, LOOP, HLT = b"\x0f\x30", b"\xfb", b"\x90", b"\xeb\xfe", b"\xf4"
END = b"\xe6\x80"
"""OUT to port 80h."""
IF = 1 << 9


class Guest:
    """A core with a virtual APIC; the handler of vector n writes to port n."""

    def __init__(self, machine: Machine, code: bytes) -> None:
        self.machine, self.view = machine, machine.view
        self.wakeup = _engine.Wakeup()
        self.posted, self.table = _engine.PostedInterrupts(self.wakeup), _engine.IpiTable()
        machine.core.set_apic(self.posted, self.table)
        machine.load(code)
        for vector in (GP, LOWER, VECTOR, HIGHER):
            handler = CODE + 0x100 + 4 * vector
            machine.ram[4 * vector : 4 * vector + 4] = handler.to_bytes(4, "little")
            machine.ram[handler : handler + 2] = bytes((0xE6, vector))
        self.view.state.gpr[Register.RSP] = 0x8000
        self.view.state.rflags |= IF
        self.view.control.intercepts = 1 << Intercept.IO | 1 << Intercept.MSR_BITMAP
        self.apic: VirtualApic = self.view.apic
        self.apic.enable = 1

    def write(self, msr: int, value: int) -> None:
        """Let the WRMSR at RIP write this."""
        gpr = self.view.state.gpr
        gpr[Register.RCX], gpr[Register.RAX], gpr[Register.RDX] = msr, value & 0xFFFF_FFFF, value >> 32

    def port(self) -> int:
        """Run to the next OUT: its port."""
        assert self.machine.run() in IO_EXITS
        return int(self.view.exit.io_port)


@pytest.fixture
def guest(machine: Machine, request: pytest.FixtureRequest) -> Guest:
    return Guest(machine, getattr(request, "param", END))


def vectors(bitmap: object) -> list[int]:
    """The members of a set of vectors."""
    words = bytes(bitmap)  # type: ignore[call-overload]
    return [vector for vector in range(256) if words[vector // 8] >> vector % 8 & 1]


def code(*parts: bytes) -> pytest.MarkDecorator:
    """What the guest executes."""
    return pytest.mark.parametrize("guest", [b"".join(parts)], indirect=True)


def test_what_was_posted_before_the_entry_is_delivered_by_priority(guest: Guest) -> None:
    for vector in (LOWER, VECTOR):
        guest.posted.post(vector)
    assert guest.wakeup.is_set()
    assert guest.port() == VECTOR
    assert (vectors(guest.apic.isr), vectors(guest.apic.irr)) == ([VECTOR], [LOWER])
    assert guest.posted.take() is None
    guest.view.state.rflags |= IF
    guest.posted.post(VECTOR + 1)  # of the same class as what is in service
    guest.posted.post(HIGHER)
    assert guest.port() == HIGHER
    assert (vectors(guest.apic.isr), vectors(guest.apic.irr)) == ([VECTOR, HIGHER], [LOWER, VECTOR + 1])


@code(STI, NOP, NOP, END)
def test_interrupts_wait_for_the_window(guest: Guest) -> None:
    guest.view.state.rflags &= ~IF
    guest.posted.post(VECTOR)
    assert guest.port() == VECTOR
    frame = guest.view.state.gpr[Register.RSP]
    assert int.from_bytes(guest.machine.ram[frame : frame + 2], "little") == CODE + 2, "behind the shadow of STI"


@pytest.mark.parametrize(("priority", "port"), [(VECTOR, 0x80), (VECTOR & 0xF0, 0x80), (VECTOR - 0x10, VECTOR)])
def test_the_task_priority_holds_back_its_class_and_what_is_below(guest: Guest, priority: int, port: int) -> None:
    guest.apic.tpr = priority
    guest.posted.post(VECTOR)
    assert guest.port() == port


def test_an_interrupt_window_comes_first(guest: Guest) -> None:
    guest.view.control.intercepts |= 1 << Intercept.INTERRUPT_WINDOW
    guest.posted.post(VECTOR)
    assert guest.machine.run() in (7, 0x64)
    assert vectors(guest.apic.irr) == [VECTOR]


def test_an_apic_that_is_off_is_left_to_the_hypervisor(guest: Guest) -> None:
    guest.apic.enable = 0
    guest.posted.post(VECTOR)
    assert guest.port() == 0x80
    assert guest.posted.take() == (1 << VECTOR).to_bytes(32, "little")


@code(LOOP)
def test_a_running_guest_takes_what_is_posted_without_an_exit(guest: Guest) -> None:
    inside = threading.Event()

    def post() -> None:
        inside.wait()
        guest.posted.post(VECTOR)

    thread = threading.Thread(target=post)
    thread.start()
    guest.machine.core.set_timer(_engine.tsc() + 1)
    assert guest.machine.enter() in HOST_INTERRUPT
    inside.set()
    assert guest.port() == VECTOR
    thread.join()


@code(STI, HLT, END)
def test_an_interrupt_ends_a_halt_on_the_core(guest: Guest) -> None:
    thread = threading.Thread(target=guest.posted.post, args=(VECTOR,))
    guest.view.state.rflags &= ~IF
    thread.start()
    assert guest.port() == VECTOR
    thread.join()
    assert guest.view.state.activity == 0


@pytest.fixture
def window(guest: Guest) -> Guest:
    """HLT exits, but may wait for an interrupt without an end; RFLAGS.IF is clear."""
    guest.view.control.intercepts |= 1 << Intercept.HLT
    guest.view.control.halt_window = (1 << 64) - 1
    guest.view.state.rflags &= ~IF
    return guest


@code(STI, HLT, END)
def test_an_interrupt_within_the_window_ends_a_halt_without_an_exit(window: Guest) -> None:
    window.posted.post(VECTOR)  # STI holds it back until HLT waits
    assert window.port() == VECTOR
    frame = window.view.state.gpr[Register.RSP]
    assert int.from_bytes(window.machine.ram[frame : frame + 2], "little") == CODE + 2, "behind HLT"
    assert (window.apic.halts, window.apic.halt_waited) == (1, 0)
    assert window.apic.halt_cycles > 0


@code(STI, HLT, END)
def test_a_halt_exits_at_the_end_of_the_window(window: Guest) -> None:
    window.view.control.halt_window = 1
    assert window.machine.run() in HLT_EXITS
    assert (window.view.state.rip, window.view.exit.instruction_length) == (CODE + 1, 1)
    assert (window.apic.halts, window.apic.halt_cycles) == (0, 0)
    assert window.apic.halt_waited > 0


@code(STI, HLT, END)
def test_a_timer_of_the_host_ends_the_wait(window: Guest) -> None:
    core, machine = window.machine.core, window.machine
    core.set_timer(1)
    assert machine.enter() in HOST_INTERRUPT, "a core looks at its clocks first"
    core.set_timer(1)
    assert machine.enter() in HLT_EXITS
    assert window.apic.halt_waited > 0


@pytest.mark.parametrize("kind", ["interrupts off", "no virtual APIC", "no window"])
@code(HLT, END)
def test_a_halt_that_nothing_could_end_exits_at_once(window: Guest, kind: str) -> None:
    if kind != "interrupts off":
        window.view.state.rflags |= IF
    if kind == "no virtual APIC":
        window.apic.enable = 0
    if kind == "no window":
        window.view.control.halt_window = 0
    assert window.machine.run() in HLT_EXITS
    assert (window.view.state.rip, window.apic.halt_waited) == (CODE, 0)


@code(WRMSR, WRMSR, END)
def test_the_end_of_an_interrupt_lets_the_next_one_in(guest: Guest) -> None:
    guest.apic.isr[VECTOR // 64] = 1 << VECTOR % 64
    guest.posted.post(LOWER)
    guest.write(EOI, 0)
    assert guest.port() == LOWER
    assert vectors(guest.apic.isr) == [LOWER]
    assert guest.view.state.gpr[Register.RSP] == 0x8000 - 6
    guest.view.state.rip = CODE + 2
    assert guest.port() == 0x80
    assert vectors(guest.apic.isr) == []


@code(WRMSR, WRMSR, END)
def test_the_end_of_chosen_vectors_exits_behind_the_instruction(guest: Guest) -> None:
    guest.apic.isr[VECTOR // 64] = 1 << VECTOR % 64
    guest.apic.isr[0] = 1 << LOWER
    guest.apic.eoi_exit[VECTOR // 64] = 1 << VECTOR % 64
    guest.write(EOI, 0)
    reason = guest.machine.run()
    assert reason in EOI_EXITS
    exit_ = guest.view.exit
    assert (exit_.qualification if reason == EOI_EXITS[0] else exit_.info2) == VECTOR
    assert (guest.view.state.rip, exit_.instruction_length, vectors(guest.apic.isr)) == (CODE + 2, 0, [LOWER])
    assert guest.port() == 0x80
    assert vectors(guest.apic.isr) == []


@code(WRMSR, END)
def test_nothing_ends_where_nothing_is_in_service(guest: Guest) -> None:
    guest.apic.eoi_exit[0] = guest.apic.eoi_exit[1] = (1 << 64) - 1
    guest.write(EOI, 0)
    assert guest.port() == 0x80


@code(WRMSR, END)
def test_an_ipi_to_a_known_apic_goes_by_the_table(guest: Guest) -> None:
    other = _engine.PostedInterrupts(_engine.Wakeup())
    guest.table.set(3, other)
    guest.write(ICR, 3 << 32 | 1 << 14 | VECTOR)
    assert guest.port() == 0x80
    assert other.take() == (1 << VECTOR).to_bytes(32, "little")
    assert guest.apic.icr == 3 << 32 | 1 << 14 | VECTOR


@pytest.mark.parametrize(
    "command",
    [
        4 << 32 | VECTOR,  # no such APIC
        0xFFFF_FFFF << 32 | VECTOR,  # broadcast
        3 << 32 | 15,  # no vector for interrupts
        3 << 32 | 4 << 8 | VECTOR,  # NMI
        3 << 32 | 1 << 11 | VECTOR,  # logical destination
        3 << 32 | 1 << 15 | VECTOR,  # level-triggered
        3 << 18 | VECTOR,  # all but itself
    ],
)
@code(WRMSR, END)
def test_other_commands_exit_behind_the_instruction(guest: Guest, command: int) -> None:
    other = _engine.PostedInterrupts(_engine.Wakeup())
    guest.table.set(3, other)
    guest.write(ICR, command)
    reason = guest.machine.run()
    assert reason in ICR_EXITS
    assert guest.view.exit.qualification == (0x300 if reason == ICR_EXITS[0] else command)
    assert (guest.apic.icr, guest.view.state.rip) == (command, CODE + 2)
    assert other.take() is None


@code(WRMSR, NOP, END)
def test_a_core_interrupts_itself(guest: Guest) -> None:
    guest.write(SELF_IPI, VECTOR)
    assert guest.port() == VECTOR
    assert vectors(guest.apic.isr) == [VECTOR]


@pytest.mark.parametrize(("msr", "value"), [(EOI, 1), (EOI, 1 << 32), (SELF_IPI, 0x100)])
@code(WRMSR, END)
def test_reserved_bits_raise_gp(guest: Guest, msr: int, value: int) -> None:
    guest.write(msr, value)
    assert guest.port() == GP
    assert vectors(guest.apic.irr) == []


@pytest.mark.parametrize("msr", [EOI, ICR, SELF_IPI])
@code(WRMSR, END)
def test_the_bitmap_keeps_registers_for_the_hypervisor(guest: Guest, msr: int) -> None:
    guest.view.msr_bitmap[0][1][msr // 8] = 1 << msr % 8
    guest.write(msr, 0)
    assert guest.machine.run() in WRMSR_EXITS
    assert guest.view.state.rip == CODE


@code(LOOP)
def test_interrupts_follow_a_guest_from_core_to_core(guest: Guest) -> None:
    first = guest.machine.core
    first.set_apic(None, None)
    guest.posted.post(LOWER)
    guest.machine.core = _engine.Core(_engine.Model("cascadelake"), 1)
    guest.machine.core.set_apic(guest.posted, guest.table)
    assert guest.port() == LOWER
