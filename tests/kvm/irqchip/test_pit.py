"""`softkvm.kvm.irqchip.pit`: counting modes, latches, port 61h, IRQ0 with and without reinjection, state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.lapic_registers import LVT_MASKED, Reg
from softkvm.kvm.irqchip.pit import Pit
from softkvm.uapi.kvm import PitState2
from tests.kvm.fakes import FakeVcpu, FakeVm

TICK_NS = 1_000_000_000 / 1_193_182
VECTOR = 0x30


def setup() -> FakeVm:
    """A PIT whose IRQ0 goes to vector 30h of CPU 0 by the IOAPIC."""
    vm = FakeVm(pit=True)
    vcpu = FakeVcpu(vm)
    vcpu.apic.mmio_write(Reg.SPIV << 4, 4, 0x1FF)
    vcpu.apic.mmio_write(Reg.LVT_LINT0 << 4, 4, LVT_MASKED)
    vm.chips.ioapic.write(0x00, 4, 0x10)
    vm.chips.ioapic.write(0x10, 4, VECTOR)
    return vm


def pit(vm: FakeVm) -> Pit:
    assert vm.pit is not None
    return vm.pit


def out(vm: FakeVm, port: int, value: int) -> None:
    assert vm.pio_bus.write(port, 1, value)


def inb(vm: FakeVm, port: int) -> int:
    value = vm.pio_bus.read(port, 1)
    assert value is not None
    return value


def load(vm: FakeVm, channel: int, mode: int, count: int) -> None:
    out(vm, 0x43, channel << 6 | 0x30 | mode << 1)
    out(vm, 0x40 + channel, count & 0xFF)
    out(vm, 0x40 + channel, count >> 8)


def word(vm: FakeVm, channel: int) -> int:
    return inb(vm, 0x40 + channel) | inb(vm, 0x40 + channel) << 8


def pass_ticks(vm: FakeVm, ticks: int) -> None:
    vm.clock.advance(round((ticks + 0.5) * TICK_NS))


def take(vm: FakeVm) -> int:
    vcpu = vm.vcpus[0]
    vector = irq.get_interrupt(vcpu)
    vcpu.apic.mmio_write(Reg.EOI << 4, 4, 0)
    return vector


@pytest.mark.parametrize(
    ("mode", "ticks", "count", "output"),
    [
        (0, 0, 1000, False),
        (0, 999, 1, False),
        (0, 1000, 0, True),
        (0, 1001, 0xFFFF, True),
        (1, 10, 990, True),
        (1, 1000, 0, False),
        (2, 300, 700, False),
        (2, 1000, 1000, True),
        (2, 1300, 700, False),
        (3, 0, 1000, True),
        (3, 100, 800, True),
        (3, 600, 800, False),
        (4, 999, 1, False),
        (4, 1000, 0, True),
        (4, 1001, 0xFFFF, False),
        (5, 1000, 0, True),
    ],
)
def test_counting_modes(mode: int, ticks: int, count: int, output: bool) -> None:
    vm = setup()
    out(vm, 0x61, 1)
    load(vm, 2, mode, 1000)
    pass_ticks(vm, ticks)
    assert bool(inb(vm, 0x61) & 0x20) == output
    assert word(vm, 2) == count


def test_access_modes() -> None:
    vm = setup()
    load(vm, 2, 2, 0x1234)
    out(vm, 0x43, 0x94)  # low byte only
    assert inb(vm, 0x42) == 0x34
    out(vm, 0x43, 0xA4)  # high byte only
    assert inb(vm, 0x42) == 0x12
    out(vm, 0x42, 0x56)
    assert inb(vm, 0x42) == 0x56
    assert inb(vm, 0x42) == 0x56
    assert inb(vm, 0x43) == 0


def test_latched_count_stands_still_until_it_is_read() -> None:
    vm = setup()
    load(vm, 2, 2, 0x1000)
    pass_ticks(vm, 0x10)
    out(vm, 0x43, 0x80)
    pass_ticks(vm, 0x100)
    out(vm, 0x43, 0x80)  # ignored: the first latch is still unread
    assert word(vm, 2) == 0xFF0
    assert word(vm, 2) < 0xF00


def test_read_back_gives_status_then_count() -> None:
    vm = setup()
    load(vm, 2, 3, 1000)
    out(vm, 0x43, 0xC8)  # status and count of counter 2
    assert inb(vm, 0x42) == 0x80 | 0x30 | 3 << 1
    assert word(vm, 2) == 1000
    out(vm, 0x43, 0xE8)  # status only
    assert inb(vm, 0x42) == 0x80 | 0x30 | 3 << 1
    assert word(vm, 2) == 1000


def test_speaker_port() -> None:
    vm = setup()
    out(vm, 0x61, 3)
    assert inb(vm, 0x61) & 3 == 3
    out(vm, 0x61, 2)
    assert inb(vm, 0x61) & 3 == 2
    before = inb(vm, 0x61) & 0x10
    vm.clock.advance(1 << 14)
    assert inb(vm, 0x61) & 0x10 != before


def test_gate_restarts_counting() -> None:
    vm = setup()
    load(vm, 2, 2, 1000)
    out(vm, 0x61, 0)
    pass_ticks(vm, 400)
    out(vm, 0x61, 1)
    assert word(vm, 2) == 1000


class TestIrq0:
    """Counter 0."""

    def test_one_shot_fires_once(self) -> None:
        vm = setup()
        load(vm, 0, 0, 1000)
        pass_ticks(vm, 998)
        assert take(vm) == -1
        pass_ticks(vm, 2)
        assert take(vm) == VECTOR
        pass_ticks(vm, 100_000)
        assert take(vm) == -1

    def test_periodic(self) -> None:
        vm = setup()
        load(vm, 0, 2, 11932)
        for _ in range(5):
            vm.clock.advance(10_000_200)
            assert take(vm) == VECTOR

    def test_ticks_wait_for_acknowledgement_with_reinjection(self) -> None:
        vm = setup()
        load(vm, 0, 2, 11932)
        vm.clock.advance(50_001_000)
        assert [take(vm) for _ in range(6)] == [VECTOR] * 5 + [-1]

    def test_missed_ticks_are_lost_without(self) -> None:
        vm = setup()
        pit(vm).set_reinject(False)
        load(vm, 0, 2, 11932)
        vm.clock.advance(50_001_000)
        assert [take(vm) for _ in range(2)] == [VECTOR, -1]

    def test_ticks_that_no_thread_came_to_run_are_counted(self) -> None:
        vm = setup()
        load(vm, 0, 2, 11932)
        vm.clock._now += 50_001_000  # time passed while nobody looked at the timers
        vm.clock.run_expired()
        assert [take(vm) for _ in range(6)] == [VECTOR] * 5 + [-1]

    def test_unmasking_forgets_old_ticks(self) -> None:
        vm = setup()
        load(vm, 0, 2, 11932)
        vm.clock.advance(50_001_000)
        vm.chips.ioapic.write(0x10, 4, VECTOR | 1 << 16)
        vm.chips.ioapic.write(0x10, 4, VECTOR)
        assert [take(vm) for _ in range(2)] == [VECTOR, -1]

    def test_a_short_period_is_stretched(self) -> None:
        vm = setup()
        load(vm, 0, 2, 2)
        assert vm.clock.first_expiry == vm.clock.monotonic_ns() + 200_000

    def test_mode_5_has_no_timer(self) -> None:
        vm = setup()
        load(vm, 0, 2, 1000)
        load(vm, 0, 5, 1000)
        assert vm.clock.first_expiry is None

    def test_lint0_in_nmi_mode_is_a_watchdog(self) -> None:
        vm = setup()
        vcpu = vm.vcpus[0]
        vcpu.apic.mmio_write(Reg.LVT_LINT0 << 4, 4, irq.DM_NMI)
        load(vm, 0, 2, 11932)
        vcpu.take_requests()
        vm.clock.advance(10_000_200)
        assert vcpu.take_requests() & 1 << 5


def test_save_restore_save_is_equal_and_ticks_go_on() -> None:
    vm, other = setup(), setup()
    out(vm, 0x61, 3)
    load(vm, 2, 3, 777)
    load(vm, 0, 2, 11932)
    out(vm, 0x43, 0x00)
    vm.clock.advance(4_000_000)
    other.clock.advance(4_000_000)
    saved = pit(vm).get_state()
    pit(other).set_state(saved)
    assert bytes(pit(other).get_state()) == bytes(saved)
    other.clock.advance(6_001_000)
    assert take(other) == VECTOR


@given(st.lists(st.tuples(st.sampled_from([0x40, 0x41, 0x42, 0x43, 0x61]), st.integers(0, 255), st.integers(0, 3_000_000)), max_size=40))
def test_any_sequence_of_port_writes_is_survived(steps: list[tuple[int, int, int]]) -> None:
    vm = setup()
    for port, value, ns in steps:
        out(vm, port, value)
        vm.clock.advance(ns)
        assert inb(vm, port) in range(256)
    saved = pit(vm).get_state()
    pit(vm).set_state(saved)
    assert bytes(pit(vm).get_state()) == bytes(saved)


@given(st.binary(min_size=112, max_size=112))
def test_any_state_can_be_set(data: bytes) -> None:
    vm = setup()
    pit(vm).set_state(PitState2.from_buffer_copy(data))
    saved = bytes(pit(vm).get_state())
    pit(vm).set_state(PitState2.from_buffer_copy(saved))
    assert bytes(pit(vm).get_state()) == saved
    for port in (0x40, 0x41, 0x42, 0x61):
        out(vm, 0x43, 0xDE)
        inb(vm, port)
    vm.clock.advance(10_000_000)
