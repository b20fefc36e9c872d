"""MC146818: the time of day, its interrupts, and the PC's CMOS bytes."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.vmm.devices import rtc
from softkvm.vmm.devices.rtc import Rtc, memory_sizes
from softkvm.vmm.layout import GIB, MIB
from tests.vmm.doubles import Time, Wire

SECOND = 1_000_000_000
START = datetime.datetime(2026, 11, 21, 23, 59, 58, tzinfo=datetime.UTC)


class Bench:
    def __init__(self) -> None:
        self.time = Time()
        self.wire = Wire()
        self.rings = 0
        self.rtc = Rtc(self.wire, self.time.timers, int(START.timestamp()) * SECOND, memory_sizes(3 * GIB, 2 * GIB), self.ring)

    def ring(self) -> None:
        self.rings += 1

    def get(self, address: int) -> int:
        self.rtc.write(0, 1, address)
        return self.rtc.read(1, 1)

    def put(self, address: int, value: int) -> None:
        self.rtc.write(0, 1, address)
        self.rtc.write(1, 1, value)

    def clock(self) -> list[int]:
        return [self.get(register) for register in (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.HOURS, rtc.MINUTES, rtc.SECONDS)]

    def set_clock(self, *values: int) -> None:
        """As Linux does: SET, the registers, SET off."""
        control = self.get(rtc.REGISTER_B)
        self.put(rtc.REGISTER_B, control | rtc.B_SET)
        registers = (rtc.CENTURY, rtc.YEAR, rtc.MONTH, rtc.DAY, rtc.HOURS, rtc.MINUTES, rtc.SECONDS)
        for register, value in zip(registers, values, strict=True):
            self.put(register, value)
        self.put(rtc.REGISTER_B, control)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_time_is_bcd_24_hours_with_century(bench: Bench) -> None:
    assert bench.clock() == [0x20, 0x26, 0x11, 0x21, 0x23, 0x59, 0x58]
    assert bench.get(rtc.WEEKDAY) == 7  # a Saturday
    assert bench.get(rtc.REGISTER_D) == rtc.D_VALID


def test_time_passes_over_midnight(bench: Bench) -> None:
    bench.time.now += 2 * SECOND
    assert bench.clock() == [0x20, 0x26, 0x11, 0x22, 0x00, 0x00, 0x00]


def test_update_in_progress_is_up_at_the_end_of_every_second(bench: Bench) -> None:
    assert not bench.get(rtc.REGISTER_A) & rtc.A_UIP
    bench.time.now += SECOND - rtc.UPDATE_NS
    assert bench.get(rtc.REGISTER_A) & rtc.A_UIP
    bench.time.now += rtc.UPDATE_NS
    assert not bench.get(rtc.REGISTER_A) & rtc.A_UIP
    assert bench.get(rtc.SECONDS) == 0x59


def test_clock_can_be_set(bench: Bench) -> None:
    bench.set_clock(0x20, 0x30, 0x01, 0x02, 0x03, 0x04, 0x05)
    assert bench.clock() == [0x20, 0x30, 0x01, 0x02, 0x03, 0x04, 0x05]
    bench.time.now += 10 * SECOND
    assert bench.get(rtc.SECONDS) == 0x15


def test_clock_stands_while_set(bench: Bench) -> None:
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_SET)
    bench.time.now += 100 * SECOND
    assert bench.get(rtc.SECONDS) == 0x58
    assert not bench.get(rtc.REGISTER_A) & rtc.A_UIP


def test_binary_and_12_hour_modes(bench: Bench) -> None:
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_BINARY)
    assert bench.clock() == [20, 26, 11, 21, 23, 59, 58]
    bench.put(rtc.REGISTER_B, 0)
    assert bench.get(rtc.HOURS) == 0x11 | rtc.PM
    bench.set_clock(0x20, 0x26, 0x11, 0x21, 0x12, 0x00, 0x00)  # 12 AM is midnight
    bench.put(rtc.REGISTER_B, rtc.B_24H)
    assert bench.get(rtc.HOURS) == 0x00


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=40), st.integers(0, 10**12))
def test_no_sequence_of_writes_raises(writes: list[tuple[int, int]], step: int) -> None:
    bench = Bench()
    for address, value in writes:
        bench.put(address, value)
        bench.time.now += step
        bench.time.run_expired()
        assert 0 <= bench.get(address & 0x7F) <= 0xFF
    assert bench.rtc.save()


def test_update_interrupt_comes_every_second_until_masked(bench: Bench) -> None:
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_UIE)
    bench.time.advance(SECOND - 1)
    assert not bench.wire.level
    bench.time.advance(1)
    assert bench.wire.level
    assert bench.get(rtc.REGISTER_C) & ~rtc.C_PF == rtc.C_IRQF | rtc.C_UF
    assert not bench.wire.level
    bench.time.advance(SECOND)
    assert bench.wire.level


def test_alarm_rings_at_its_time_of_day(bench: Bench) -> None:
    bench.put(rtc.HOURS_ALARM, 0x00)
    bench.put(rtc.MINUTES_ALARM, 0x00)
    bench.put(rtc.SECONDS_ALARM, 0x30)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_AIE)
    bench.time.advance(32 * SECOND - 1)
    assert not bench.wire.level
    bench.time.advance(1)
    assert bench.wire.level
    assert bench.get(rtc.REGISTER_C) & rtc.C_AF
    bench.time.advance(86_400 * SECOND - 1)
    assert not bench.wire.level
    bench.time.advance(1)
    assert bench.wire.level


def test_alarm_wildcards_match_every_value(bench: Bench) -> None:
    for register in (rtc.HOURS_ALARM, rtc.MINUTES_ALARM):
        bench.put(register, rtc.ANY)
    bench.put(rtc.SECONDS_ALARM, 0x10)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_AIE)
    bench.time.advance(12 * SECOND)
    assert bench.get(rtc.REGISTER_C) & rtc.C_AF
    bench.time.advance(60 * SECOND)
    assert bench.get(rtc.REGISTER_C) & rtc.C_AF


def test_impossible_alarm_never_rings(bench: Bench) -> None:
    bench.put(rtc.HOURS_ALARM, 0x33)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_AIE)
    bench.time.advance(3 * 86_400 * SECOND)
    assert not bench.wire.level


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupt_runs_at_the_rate_of_register_a(bench: Bench, rate: int, hertz: int) -> None:
    bench.put(rtc.REGISTER_A, rtc.A_DIVIDER_RUNNING | rate)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_PIE)
    count = 0
    end = bench.time.now + SECOND
    while bench.time.now < end:
        bench.time.advance(SECOND // hertz // 2)
        count += bool(bench.get(rtc.REGISTER_C) & rtc.C_PF)
    assert abs(count - hertz) <= 1


def test_flags_are_set_without_interrupts_too(bench: Bench) -> None:
    bench.get(rtc.REGISTER_C)
    bench.time.now += SECOND
    assert bench.get(rtc.REGISTER_C) == rtc.C_UF | rtc.C_PF
    assert not bench.wire.changes


def test_memory_sizes_are_in_cmos(bench: Bench) -> None:
    assert bench.get(rtc.BASE_MEMORY_LOW) | bench.get(rtc.BASE_MEMORY_HIGH) << 8 == 640
    assert bench.get(rtc.EXTENDED_LOW) | bench.get(rtc.EXTENDED_HIGH) << 8 == 0xFFFF
    assert bench.get(rtc.ABOVE_16M_LOW) | bench.get(rtc.ABOVE_16M_HIGH) << 8 == (3 * GIB - 16 * MIB) // 65536
    assert bench.get(rtc.ABOVE_4G) | bench.get(rtc.ABOVE_4G + 1) << 8 == 2 * GIB // 65536


def test_plain_cmos_bytes_keep_their_value_and_the_nmi_bit_is_ignored(bench: Bench) -> None:
    bench.put(0x50 | 0x80, 0xA5)
    assert bench.get(0x50) == 0xA5
    assert bench.rtc.read(0, 1) == 0xFF


def test_each_alarm_is_told_once_and_no_other_event(bench: Bench) -> None:
    for register in (rtc.SECONDS_ALARM, rtc.MINUTES_ALARM, rtc.HOURS_ALARM):
        bench.put(register, rtc.ANY)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_UIE)
    bench.time.advance(2 * SECOND)
    assert (bench.wire.level, bench.rings) == (True, 0)
    bench.put(rtc.REGISTER_B, rtc.B_24H | rtc.B_UIE | rtc.B_AIE)
    assert bench.rings == 1, "the alarm's flag was up already"
    bench.time.advance(3 * SECOND)
    assert bench.rings == 1
    bench.get(rtc.REGISTER_C)
    bench.time.advance(SECOND)
    assert bench.rings == 2
