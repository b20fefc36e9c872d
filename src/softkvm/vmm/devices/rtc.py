"""MC146818A real-time clock and CMOS memory.

Source of truth: Motorola MC146818A data sheet; CMOS addresses of the PC (IBM PC/AT technical reference; century at 0x32, which the FADT
names). The time of day is computed from a monotonic clock when somebody looks: the clock keeps an origin, not a ticking counter. Update in
progress is up for the last 244 us of every second, so a reader that waits for its fall gets a whole second.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.irq import SetLevel
from softkvm.vmm.layout import KIB, MIB
from softkvm.vmm.state import Record
from softkvm.vmm.timers import NSEC_PER_SEC, Timers

# CMOS addresses
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = range(10, 14)
BASE_MEMORY_LOW, BASE_MEMORY_HIGH = 0x15, 0x16  # KB below 640 KB
EXTENDED_LOW, EXTENDED_HIGH = 0x17, 0x18  # KB above 1 MB
EXTENDED_COPY_LOW, EXTENDED_COPY_HIGH = 0x30, 0x31
CENTURY = 0x32
ABOVE_16M_LOW, ABOVE_16M_HIGH = 0x34, 0x35  # 64 KB units
ABOVE_4G = 0x5B  # three bytes, 64 KB units
CMOS_SIZE = 128

A_UIP = 1 << 7
A_DIVIDER = 0x70
A_DIVIDER_RUNNING = 0x20  # 32768 Hz time base
A_RATE = 0x0F

B_SET = 1 << 7
B_PIE = 1 << 6
B_AIE = 1 << 5
B_UIE = 1 << 4
B_BINARY = 1 << 2
B_24H = 1 << 1

C_IRQF = 1 << 7
C_PF = 1 << 6
C_AF = 1 << 5
C_UF = 1 << 4

D_VALID = 1 << 7

PM = 1 << 7  # in the hours register of a 12-hour clock
ANY = 0xC0  # an alarm byte from 0xC0 on matches every value

UPDATE_NS = 244_000
PERIODIC_HZ = 32_768
INDEX_MASK = 0x7F  # bit 7 of the index port masks NMI, which nothing on this board raises

_CLOCK_REGISTERS = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})
_SECONDS_PER_DAY = 86_400
_EPOCH = datetime.datetime(1970, 1, 1)
_FIRST_SECOND = (datetime.datetime.min - _EPOCH) // datetime.timedelta(seconds=1)
_LAST_SECOND = (datetime.datetime.max - _EPOCH) // datetime.timedelta(seconds=1)
_Count = Annotated[int, Meta(ge=0)]


class RtcState(Record, frozen=True, kw_only=True):
    """CMOS memory, and the clock: UTC in ns since 1970 and the events already reported."""

    version: Literal[1] = 1
    index: Annotated[int, Meta(ge=0, le=INDEX_MASK)]
    cmos: Annotated[bytes, Meta(min_length=CMOS_SIZE, max_length=CMOS_SIZE)]
    time_ns: int
    seen_second: int
    seen_period: _Count
    periodic_ns: _Count


def memory_sizes(low: int, high: int) -> dict[int, int]:
    """The CMOS bytes that tell a BIOS of `low` bytes of RAM below and `high` bytes above 4 GB."""
    extended = min(max(low - MIB, 0) // KIB, 0xFFFF)
    above_16m = min(max(low - 16 * MIB, 0) // (64 * KIB), 0xFFFF)
    above_4g = min(high // (64 * KIB), 0xFFFFFF)
    return {
        BASE_MEMORY_LOW: 640 & 0xFF,
        BASE_MEMORY_HIGH: 640 >> 8,
        EXTENDED_LOW: extended & 0xFF,
        EXTENDED_HIGH: extended >> 8,
        EXTENDED_COPY_LOW: extended & 0xFF,
        EXTENDED_COPY_HIGH: extended >> 8,
        ABOVE_16M_LOW: above_16m & 0xFF,
        ABOVE_16M_HIGH: above_16m >> 8,
        **{ABOVE_4G + byte: above_4g >> 8 * byte & 0xFF for byte in range(3)},
    }


class Rtc:
    """Two ports: index at 0, data at 1."""

    def __init__(self, irq: SetLevel, timers: Timers, utc_ns: int, cmos: dict[int, int], on_alarm: Callable[[], None]) -> None:
        """`irq` drives IRQ 8; the clock starts at `utc_ns` (ns since 1970, UTC); `cmos` presets bytes of the memory; `on_alarm()` is called
        when an alarm interrupts."""
        self._irq = irq
        self._on_alarm = on_alarm
        self._now = timers.now
        self._alarm = timers.timer(self._catch_up)
        self._index = 0
        self._cmos = bytearray(CMOS_SIZE)
        for address, value in cmos.items():
            self._cmos[address] = value
        self._cmos[REGISTER_A] = A_DIVIDER_RUNNING | 6  # 1024 Hz, as a PC's BIOS leaves it
        self._cmos[REGISTER_B] = B_24H
        self._cmos[REGISTER_D] = D_VALID
        self._origin = utc_ns - self._now()
        self._period_origin = self._now()
        self._seen_second = self._second()
        self._seen_period = 0
        self._level = self._rings = False
        self._write_clock(self._second())

    def read(self, offset: int, size: int) -> int:
        """The data port; the index port cannot be read."""
        if offset == 0:
            return 0xFF
        if self._index == REGISTER_C:
            return self._read_c()
        if self._index == REGISTER_A:
            return self._cmos[REGISTER_A] | self._update_in_progress()
        if self._index in _CLOCK_REGISTERS and self._running():
            self._write_clock(self._second())
        return self._cmos[self._index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Choose a byte, or store one."""
        if offset == 0:
            self._index = value & INDEX_MASK
        elif self._index == REGISTER_A:
            self._write_a(value)
        elif self._index == REGISTER_B:
            self._write_b(value)
        elif self._index in (REGISTER_C, REGISTER_D):
            pass  # read-only
        elif self._index in _CLOCK_REGISTERS:
            self._set_clock(value)
        else:
            self._cmos[self._index] = value
            self._catch_up()  # an alarm byte may have changed the next event

    # The time of day

    def _utc(self) -> int:
        return self._origin + self._now()

    def _second(self) -> int:
        return self._utc() // NSEC_PER_SEC

    def _running(self) -> bool:
        return self._cmos[REGISTER_A] & A_DIVIDER == A_DIVIDER_RUNNING and not self._cmos[REGISTER_B] & B_SET

    def _update_in_progress(self) -> int:
        return A_UIP if self._running() and self._utc() % NSEC_PER_SEC >= NSEC_PER_SEC - UPDATE_NS else 0

    def _encode(self, value: int) -> int:
        return value if self._cmos[REGISTER_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self._cmos[REGISTER_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    def _decode_hours(self, value: int) -> int:
        if self._cmos[REGISTER_B] & B_24H:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _encode_hours(self, hours: int) -> int:
        if self._cmos[REGISTER_B] & B_24H:
            return self._encode(hours)
        return self._encode((hours - 1) % 12 + 1) | (PM if hours >= 12 else 0)

    def _write_clock(self, second: int) -> None:
        """Put a time of day (seconds since 1970) into the clock registers."""
        when = _EPOCH + datetime.timedelta(seconds=min(max(second, _FIRST_SECOND), _LAST_SECOND))
        self._cmos[SECONDS] = self._encode(when.second)
        self._cmos[MINUTES] = self._encode(when.minute)
        self._cmos[HOURS] = self._encode_hours(when.hour)
        self._cmos[WEEKDAY] = self._encode(when.isoweekday() % 7 + 1)
        self._cmos[DAY] = self._encode(when.day)
        self._cmos[MONTH] = self._encode(when.month)
        self._cmos[YEAR] = self._encode(when.year % 100)
        self._cmos[CENTURY] = self._encode(when.year // 100)

    def _read_clock(self) -> int:
        """The time of day in the clock registers as seconds since 1970; impossible dates roll over."""
        year = self._decode(self._cmos[CENTURY]) % 100 * 100 + self._decode(self._cmos[YEAR]) % 100
        carry, month = divmod((self._decode(self._cmos[MONTH]) or 1) - 1, 12)
        year = min(max(year + carry, datetime.MINYEAR), datetime.MAXYEAR - 1)
        days = (datetime.date(year, month + 1, 1) - _EPOCH.date()).days + self._decode(self._cmos[DAY]) - 1
        hours = days * 24 + self._decode_hours(self._cmos[HOURS])
        return (hours * 60 + self._decode(self._cmos[MINUTES])) * 60 + self._decode(self._cmos[SECONDS])

    def _set_clock(self, value: int) -> None:
        if self._running():  # the other registers hold the current time
            self._write_clock(self._second())
        self._cmos[self._index] = value
        if self._running():
            self._start_clock(self._utc() % NSEC_PER_SEC)

    def _start_clock(self, fraction: int) -> None:
        """Go on from the time in the registers, `fraction` ns into its second."""
        self._origin = self._read_clock() * NSEC_PER_SEC + fraction - self._now()
        self._seen_second = self._second()
        self._catch_up()

    # Control registers

    def _write_a(self, value: int) -> None:
        self._catch_up()
        was_running = self._running()
        if was_running:
            self._write_clock(self._second())
        self._cmos[REGISTER_A] = value & ~A_UIP
        self._period_origin = self._now()
        self._seen_period = 0
        if self._running() and not was_running:
            self._start_clock(NSEC_PER_SEC // 2)  # the first update comes half a second after the divider starts
        self._catch_up()

    def _write_b(self, value: int) -> None:
        self._catch_up()
        was_running = self._running()
        if was_running:
            self._write_clock(self._second())
        if value & B_SET:
            value &= ~B_UIE
        self._cmos[REGISTER_B] = value
        if self._running():
            if was_running:  # the data mode may have changed, the time has not
                self._write_clock(self._second())
            else:
                self._start_clock(self._utc() % NSEC_PER_SEC)
        self._catch_up()

    def _read_c(self) -> int:
        self._catch_up()
        value = self._cmos[REGISTER_C]
        self._cmos[REGISTER_C] = 0
        self._drive()
        self._arm()
        return value

    # Events

    def _catch_up(self) -> None:
        """Set the flags of all events since the last call, and wait for the next one."""
        if self._running():
            second = self._second()
            if second > self._seen_second:
                self._cmos[REGISTER_C] |= C_UF
                alarm = self._next_alarm(self._seen_second)
                if alarm is not None and alarm <= second:
                    self._cmos[REGISTER_C] |= C_AF
            self._seen_second = second
        period = self._period()
        if period:
            count = (self._now() - self._period_origin) // period
            if count > self._seen_period:
                self._cmos[REGISTER_C] |= C_PF
            self._seen_period = count
        self._drive()
        self._arm()

    def _period(self) -> int:
        """Length of the periodic interval in ns; 0 = none."""
        rate = self._cmos[REGISTER_A] & A_RATE
        if rate == 0 or self._cmos[REGISTER_A] & A_DIVIDER != A_DIVIDER_RUNNING:
            return 0
        shift = rate + 6 if rate <= 2 else rate - 1  # rates 1 and 2 are 256 and 128 Hz with this time base
        return (1 << shift) * NSEC_PER_SEC // PERIODIC_HZ

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than `after` whose time of day fits the alarm registers; None if they hold no time of day."""
        hour = self._alarm_values(HOURS_ALARM, 24)
        minute = self._alarm_values(MINUTES_ALARM, 60)
        second = self._alarm_values(SECONDS_ALARM, 60)
        if not (hour and minute and second):
            return None
        midnight, time = divmod(after + 1, _SECONDS_PER_DAY)
        best = None
        for candidate in hour:
            if candidate >= time // 3600:
                start = max(time, candidate * 3600)
                best = self._first_in_hour(start, candidate, minute, second)
                if best is not None:
                    break
        if best is None:
            best = _SECONDS_PER_DAY + hour[0] * 3600 + minute[0] * 60 + second[0]
        return midnight * _SECONDS_PER_DAY + best

    @staticmethod
    def _first_in_hour(start: int, hour: int, minutes: list[int], seconds: list[int]) -> int | None:
        for minute in minutes:
            base = hour * 3600 + minute * 60
            if base + seconds[-1] >= start:
                return next(base + second for second in seconds if base + second >= start)
        return None

    def _alarm_values(self, register: int, limit: int) -> list[int]:
        """The values, in order, that an alarm register accepts."""
        raw = self._cmos[register]
        if raw >= ANY:
            return list(range(limit))
        value = self._decode_hours(raw) if register == HOURS_ALARM else self._decode(raw)
        return [value] if value < limit else []

    def _drive(self) -> None:
        c, b = self._cmos[REGISTER_C], self._cmos[REGISTER_B]
        level = bool(c & b & (C_PF | C_AF | C_UF))
        self._cmos[REGISTER_C] = c | C_IRQF if level else c & ~C_IRQF
        if level != self._level:
            self._level = level
            self._irq(level)
        rings = bool(c & b & C_AF)
        if rings and not self._rings:
            self._on_alarm()
        self._rings = rings

    def _arm(self) -> None:
        """Ring at the first event that would raise an interrupt and has not yet."""
        wanted = self._cmos[REGISTER_B] & ~self._cmos[REGISTER_C]
        deadlines = []
        if self._running():
            if wanted & B_UIE:
                deadlines.append((self._seen_second + 1) * NSEC_PER_SEC - self._origin)
            if wanted & B_AIE and (second := self._next_alarm(self._seen_second)) is not None:
                deadlines.append(second * NSEC_PER_SEC - self._origin)
        if wanted & B_PIE and (period := self._period()):
            deadlines.append(self._period_origin + (self._seen_period + 1) * period)
        if deadlines:
            self._alarm.arm(min(deadlines))
        else:
            self._alarm.disarm()

    # State

    def save(self) -> RtcState:
        """The whole state; a running clock goes on from the time of day at this moment."""
        self._catch_up()
        return RtcState(
            index=self._index,
            cmos=bytes(self._cmos),
            time_ns=self._utc(),
            seen_second=self._seen_second,
            seen_period=self._seen_period,
            periodic_ns=self._now() - self._period_origin,
        )

    def restore(self, state: RtcState) -> None:
        """Take over a saved state."""
        self._index = state.index
        self._cmos[:] = state.cmos
        self._origin = state.time_ns - self._now()
        self._period_origin = self._now() - state.periodic_ns
        self._seen_second = state.seen_second
        self._seen_period = state.seen_period
        self._catch_up()
