"""`softkvm.kvm.irqchip.lapic_timer`: one-shot, periodic and TSC-deadline, by the registers, on virtual time."""

from __future__ import annotations

import pytest

from softkvm.kvm import msr
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.lapic_registers import LVT_MASKED, Reg
from tests.kvm.fakes import FakeVcpu, FakeVm
from tests.kvm.irqchip.test_lapic import enabled, read, write

VECTOR = 0xEF


def armed(mode: int, divide: int = 0b1011) -> FakeVcpu:
    vcpu = enabled(FakeVm())
    write(vcpu, Reg.TIMER_DIVIDE, divide)
    write(vcpu, Reg.LVT_TIMER, VECTOR | mode << 17)
    return vcpu


def taken(vcpu: FakeVcpu) -> int:
    """Take and end the pending interrupt."""
    vector = irq.get_interrupt(vcpu)
    write(vcpu, Reg.EOI, 0)
    return vector


def test_one_shot() -> None:
    vcpu = armed(0)
    write(vcpu, Reg.TIMER_INITIAL, 1_000)
    vcpu.vm.clock.advance(400)
    assert read(vcpu, Reg.TIMER_CURRENT) == 600
    vcpu.vm.clock.advance(599)
    assert not irq.has_interrupt(vcpu)
    vcpu.vm.clock.advance(1)
    assert taken(vcpu) == VECTOR
    assert read(vcpu, Reg.TIMER_CURRENT) == 0
    assert read(vcpu, Reg.TIMER_INITIAL) == 1_000
    vcpu.vm.clock.advance(10_000)
    assert not irq.has_interrupt(vcpu)


def test_periodic_with_divisor() -> None:
    vcpu = armed(1, divide=0b0011)  # by 16
    write(vcpu, Reg.TIMER_INITIAL, 100_000)
    for _ in range(3):
        vcpu.vm.clock.advance(1_600_000)
        assert taken(vcpu) == VECTOR
    vcpu.vm.clock.advance(800_000)
    assert read(vcpu, Reg.TIMER_CURRENT) == 50_000
    write(vcpu, Reg.TIMER_INITIAL, 0)
    vcpu.vm.clock.advance(10_000_000)
    assert not irq.has_interrupt(vcpu)


def test_a_short_period_is_stretched() -> None:
    vcpu = armed(1)
    write(vcpu, Reg.TIMER_INITIAL, 1)
    assert vcpu.apic.timer.expires_ns == vcpu.vm.clock.monotonic_ns() + 200_000


def test_divisor_change_keeps_the_count() -> None:
    vcpu = armed(0)
    write(vcpu, Reg.TIMER_INITIAL, 1_000)
    vcpu.vm.clock.advance(500)
    write(vcpu, Reg.TIMER_DIVIDE, 0b0000)  # by 2
    assert read(vcpu, Reg.TIMER_CURRENT) == 500
    vcpu.vm.clock.advance(999)
    assert not irq.has_interrupt(vcpu)
    vcpu.vm.clock.advance(1)
    assert taken(vcpu) == VECTOR


@pytest.mark.parametrize(("divide", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)])
def test_divisors(divide: int, divisor: int) -> None:
    vcpu = armed(0, divide)
    write(vcpu, Reg.TIMER_INITIAL, 1_000)
    assert vcpu.apic.timer.expires_ns == vcpu.vm.clock.monotonic_ns() + 1_000 * divisor


def test_tsc_deadline() -> None:
    vcpu = armed(2)
    deadline = vcpu.tsc.read() + 2_000  # 1 us at 2 GHz
    msr.set(vcpu, 0x6E0, deadline, False)
    assert msr.get(vcpu, 0x6E0, False) == deadline
    vcpu.vm.clock.advance(999)
    assert not irq.has_interrupt(vcpu)
    vcpu.vm.clock.advance(1)
    assert vcpu.tsc.read() >= deadline
    assert taken(vcpu) == VECTOR
    assert msr.get(vcpu, 0x6E0, False) == 0


def test_tsc_deadline_in_the_past_fires_at_once() -> None:
    vcpu = armed(2)
    vcpu.vm.clock.advance(1_000)
    msr.set(vcpu, 0x6E0, 1, False)
    assert taken(vcpu) == VECTOR
    assert msr.get(vcpu, 0x6E0, False) == 0


def test_tsc_deadline_zero_disarms() -> None:
    vcpu = armed(2)
    msr.set(vcpu, 0x6E0, vcpu.tsc.read() + 1_000, False)
    msr.set(vcpu, 0x6E0, 0, False)
    assert vcpu.vm.clock.first_expiry is None


def test_the_farthest_deadline_stays_within_64_bits_of_tsc() -> None:
    vcpu = armed(2)
    msr.set(vcpu, 0x6E0, (1 << 64) - 1, False)
    expiry = vcpu.vm.clock.first_expiry
    assert expiry is not None
    assert vcpu.vm.clock.ns_to_tsc(expiry) < 1 << 64


def test_mode_rules() -> None:
    vcpu = armed(0)
    msr.set(vcpu, 0x6E0, 5, False)  # not in deadline mode: dropped
    assert msr.get(vcpu, 0x6E0, False) == 0
    write(vcpu, Reg.TIMER_INITIAL, 1_000)
    write(vcpu, Reg.LVT_TIMER, VECTOR | 2 << 17)
    assert vcpu.vm.clock.first_expiry is None
    write(vcpu, Reg.TIMER_INITIAL, 1_000)
    assert read(vcpu, Reg.TIMER_INITIAL) == 0


def test_masked_timer_is_silent() -> None:
    vcpu = armed(0)
    write(vcpu, Reg.LVT_TIMER, VECTOR | LVT_MASKED)
    write(vcpu, Reg.TIMER_INITIAL, 10)
    vcpu.vm.clock.advance(100)
    assert not irq.has_interrupt(vcpu)
