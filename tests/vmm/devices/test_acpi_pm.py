"""ACPI fixed hardware."""

from __future__ import annotations

import pytest

from softkvm.vmm.devices.acpi_pm import (
    CONTROL_SCI_EN,
    CONTROL_SLP_EN,
    CONTROL_SLP_TYP_SHIFT,
    PM1_ENABLE,
    PM1_POWER_BUTTON,
    PM1_RTC,
    PM1_STATUS,
    PM1_TIMER,
    PM1_WAKE,
    PM_TIMER_HZ,
    SLP_TYP_S3,
    SLP_TYP_S5,
    AcpiPm,
)
from tests.vmm.doubles import Time, Wire

SECOND = 1_000_000_000


class Bench:
    def __init__(self) -> None:
        self.time = Time()
        self.wire = Wire()
        self.offs = self.sleeps = self.wakes = 0
        self.pm = AcpiPm(self.wire, self.time.timers, self.off, self.sleep, self.wake)

    def off(self) -> None:
        self.offs += 1

    def sleep(self) -> None:
        self.sleeps += 1

    def wake(self) -> None:
        self.wakes += 1


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_timer_runs_at_3_579545_mhz_with_32_bits(bench: Bench) -> None:
    assert bench.pm.timer.read(0, 4) == 0
    bench.time.now += SECOND
    assert bench.pm.timer.read(0, 4) == PM_TIMER_HZ
    bench.time.now += 1300 * SECOND
    assert bench.pm.timer.read(0, 4) == 1301 * PM_TIMER_HZ % (1 << 32)


def test_timer_carry_sets_status_and_raises_sci_when_enabled(bench: Bench) -> None:
    carry = (1 << 31) * SECOND // PM_TIMER_HZ + 1
    bench.pm.event.write(PM1_ENABLE, 2, PM1_TIMER)
    bench.time.advance(carry - 1000)
    assert not bench.wire.level
    bench.time.advance(1000)
    assert bench.wire.level
    assert bench.pm.event.read(PM1_STATUS, 2) == PM1_TIMER
    bench.pm.event.write(PM1_STATUS, 2, PM1_TIMER)
    assert not bench.wire.level
    bench.time.advance(carry)
    assert bench.wire.level


def test_power_button_raises_sci_once_enabled(bench: Bench) -> None:
    bench.pm.press_power_button()
    assert not bench.wire.level
    bench.pm.event.write(PM1_ENABLE, 2, PM1_POWER_BUTTON)
    assert bench.wire.level
    bench.pm.event.write(PM1_STATUS + 1, 1, PM1_POWER_BUTTON >> 8)  # byte access
    assert not bench.wire.level


def test_control_says_acpi_mode_and_keeps_the_sleep_type(bench: Bench) -> None:
    assert bench.pm.control.read(0, 2) == CONTROL_SCI_EN
    bench.pm.control.write(0, 2, 3 << CONTROL_SLP_TYP_SHIFT)
    assert bench.pm.control.read(0, 2) == CONTROL_SCI_EN | 3 << CONTROL_SLP_TYP_SHIFT


def test_soft_off_needs_both_the_type_and_the_enable_bit(bench: Bench) -> None:
    bench.pm.control.write(0, 2, SLP_TYP_S5 << CONTROL_SLP_TYP_SHIFT)
    bench.pm.control.write(0, 2, CONTROL_SLP_EN | 2 << CONTROL_SLP_TYP_SHIFT)
    assert bench.offs == 0
    bench.pm.control.write(0, 2, CONTROL_SLP_EN | SLP_TYP_S5 << CONTROL_SLP_TYP_SHIFT)
    assert bench.offs == 1


def test_soft_off_works_by_bytes(bench: Bench) -> None:
    bench.pm.control.write(1, 1, (CONTROL_SLP_EN | SLP_TYP_S5 << CONTROL_SLP_TYP_SHIFT) >> 8)
    assert bench.offs == 1


def test_every_fixed_event_can_be_enabled_as_linux_checks(bench: Bench) -> None:
    for bit in (0, 5, 8, 9, 10):
        bench.pm.event.write(PM1_ENABLE, 2, 1 << bit)
        assert bench.pm.event.read(PM1_ENABLE, 2) == 1 << bit


def test_enable_register_keeps_the_other_byte(bench: Bench) -> None:
    bench.pm.event.write(PM1_ENABLE, 2, PM1_POWER_BUTTON | PM1_TIMER)
    bench.pm.event.write(PM1_ENABLE, 1, 0)
    assert bench.pm.event.read(PM1_ENABLE, 2) == PM1_POWER_BUTTON
    assert bench.pm.event.read(PM1_ENABLE + 1, 1) == PM1_POWER_BUTTON >> 8


@pytest.mark.parametrize("early", [False, True])
def test_an_enabled_alarm_ends_a_sleep_whether_it_rings_before_or_after(bench: Bench, early: bool) -> None:
    bench.pm.event.write(PM1_ENABLE, 2, PM1_RTC)
    if early:
        bench.pm.rtc_alarm()
    before = bench.wakes
    bench.pm.control.write(0, 2, CONTROL_SLP_EN | SLP_TYP_S3 << CONTROL_SLP_TYP_SHIFT)
    assert (bench.sleeps, bench.wakes > before) == (1, early)
    bench.pm.rtc_alarm()
    assert bench.wakes > before


def test_what_is_not_enabled_wakes_nobody(bench: Bench) -> None:
    bench.pm.event.write(PM1_ENABLE, 2, PM1_TIMER)
    bench.pm.control.write(0, 2, CONTROL_SLP_EN | SLP_TYP_S3 << CONTROL_SLP_TYP_SHIFT)
    bench.pm.rtc_alarm()
    bench.pm.press_power_button()
    bench.time.advance(1300 * SECOND)
    assert bench.wakes == 0


def test_after_a_sleep_status_tells_why_and_nothing_is_enabled(bench: Bench) -> None:
    bench.pm.event.write(PM1_ENABLE, 2, PM1_RTC)
    bench.pm.rtc_alarm()
    assert bench.wire.level
    bench.pm.wake()
    assert bench.pm.event.read(PM1_STATUS, 2) == PM1_WAKE | PM1_RTC
    assert bench.pm.event.read(PM1_ENABLE, 2) == 0
    assert not bench.wire.level
    bench.pm.event.write(PM1_STATUS, 2, PM1_WAKE | PM1_RTC)
    assert bench.pm.event.read(PM1_STATUS, 2) == 0
