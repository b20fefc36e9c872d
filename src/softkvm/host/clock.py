"""The host's clocks and high-resolution timers: what `ktime_get_*()` and `struct hrtimer` are to KVM.

Answers to Linux 6.1 `kernel/time/{timekeeping,hrtimer}.c`. All nanosecond clocks are computed from the TSC, as they are on a Linux host
whose clocksource is the TSC: a TSC value and a time then convert into each other without an error that could add up, which the KVM
master clock (`kvm/kvmclock.py`) and the TSC-deadline timer rely on.

Timers belong to a clock and run in nobody's own thread: vCPU threads call `Clock.run_expired()` when their core's timer fires and before
they block, and learn from `Clock.first_expiry` how long they may run or sleep.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000
NSEC_PER_MSEC = 1_000_000
KHZ_NSEC = 1_000_000
"""Nanoseconds times kilohertz per cycle: `cycles = ns * khz / KHZ_NSEC`."""
_SNAPSHOT_READS = 5


class Clock:
    """The real clocks of this host, and the queue of timers that wait for them."""

    def __init__(self, read_tsc: Callable[[], int] | None = None, tsc_khz: int | None = None) -> None:
        """Start from the engine's TSC, or from the given counter `read_tsc` that runs at `tsc_khz` kHz."""
        if read_tsc is None or tsc_khz is None:
            from softkvm import silicon  # here, so that a virtual clock needs no engine

            read_tsc, tsc_khz = silicon.tsc, silicon.tsc_khz()
        self.tsc: Callable[[], int] = read_tsc
        """The host's time stamp counter now."""
        self.tsc_khz: int = tsc_khz
        """Frequency of `tsc()` in kHz."""
        self.on_earlier: Callable[[], None] | None = None
        """Called, without locks, whenever `first_expiry` became earlier: cores must be re-armed."""
        raw = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        self._base_ns = raw - self._cycles_to_ns(self.tsc())
        self._boot_offset = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - raw
        self._lock = threading.Lock()
        self._armed: dict[HrTimer, None] = {}  # in the order of arming, so that equal expiries have an order too
        self.first_expiry: int | None = None
        """When the earliest armed timer expires, in `monotonic_ns()` time; None if no timer is armed."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC_RAW in ns."""
        return self.tsc_to_ns(self.tsc())

    def boottime_ns(self) -> int:
        """CLOCK_MONOTONIC_RAW plus the time the host slept: the base of kvmclock, in ns."""
        return self.monotonic_ns() + self._boot_offset

    def boottime_at(self, tsc: int) -> int:
        """`boottime_ns()` at the moment when the TSC was `tsc`."""
        return self.tsc_to_ns(tsc) + self._boot_offset

    def realtime_ns(self) -> int:
        """CLOCK_REALTIME in ns since 1970."""
        return time.time_ns()

    def realtime_and_tsc(self) -> tuple[int, int]:
        """CLOCK_REALTIME in ns since 1970 and the TSC at one instant (`ktime_get_snapshot()`), off by half the quickest of a few reads."""
        samples = []
        for _ in range(_SNAPSHOT_READS):
            before, realtime, after = self.tsc(), self.realtime_ns(), self.tsc()
            samples.append((after - before, realtime, before + (after - before) // 2))
        _, realtime, tsc = min(samples)
        return realtime, tsc

    def realtime_at(self, tsc: int) -> int:
        """CLOCK_REALTIME at the moment when the TSC was `tsc`, as if nobody had set the clock since."""
        realtime, now = self.realtime_and_tsc()
        return realtime + self._cycles_to_ns(tsc - now)

    def tsc_to_ns(self, tsc: int) -> int:
        """The `monotonic_ns()` at which the TSC reads `tsc`."""
        return self._base_ns + self._cycles_to_ns(tsc)

    def ns_reaching(self, tsc: int) -> int:
        """The first `monotonic_ns()` by which the TSC has surely reached `tsc`."""
        return self._base_ns - (-tsc * KHZ_NSEC // self.tsc_khz)

    def ns_to_tsc(self, ns: int) -> int:
        """The first TSC value at which `monotonic_ns()` is `ns` or later."""
        return -(-(ns - self._base_ns) * self.tsc_khz // KHZ_NSEC)

    def run_expired(self) -> None:
        """Call the callbacks of all timers that are due, earliest first; a timer that re-arms itself waits for the next call."""
        first = self.first_expiry
        if first is None or first > self.monotonic_ns():
            return
        now = self.monotonic_ns()
        with self._lock:
            due = sorted((timer for timer in self._armed if timer.expiry <= now), key=HrTimer.by_expiry)
            sequences = [timer.sequence for timer in due]
            for timer in due:
                del self._armed[timer]
            self._update_first()
        for timer, sequence in zip(due, sequences, strict=True):
            self._expire(timer, sequence, now)

    def _expire(self, timer: HrTimer, sequence: int, now: int) -> None:
        if timer.sequence != sequence:  # an earlier callback, or another thread, restarted or cancelled it
            return
        again = timer.callback(now)
        with self._lock:
            if again is None or timer.sequence != sequence:
                return
            earlier = self._insert(timer, again)
        self._announce(earlier)

    def _start(self, timer: HrTimer, expires_ns: int) -> None:
        with self._lock:
            timer.sequence += 1
            earlier = self._insert(timer, expires_ns)
        self._announce(earlier)

    def _cancel(self, timer: HrTimer) -> None:
        with self._lock:
            timer.sequence += 1
            if timer in self._armed:
                del self._armed[timer]
                self._update_first()

    def _insert(self, timer: HrTimer, expires_ns: int) -> bool:
        """Arm with the lock held; True if the first expiry came nearer."""
        before = self.first_expiry
        was_first = timer in self._armed and timer.expiry == before
        timer.expiry = expires_ns
        self._armed.pop(timer, None)
        self._armed[timer] = None
        if before is None or expires_ns <= before:
            self.first_expiry = expires_ns
        elif was_first:
            self._update_first()
        return before is None or expires_ns < before

    def _update_first(self) -> None:
        self.first_expiry = min((timer.expiry for timer in self._armed), default=None)

    def _announce(self, earlier: bool) -> None:
        if earlier and self.on_earlier is not None:
            self.on_earlier()

    def _is_armed(self, timer: HrTimer) -> bool:
        return timer in self._armed

    def _cycles_to_ns(self, cycles: int) -> int:
        return cycles * KHZ_NSEC // self.tsc_khz


class HrTimer:
    """A one-shot timer of a clock; its callback may re-arm it by returning the next expiry.

    The callback runs in whichever thread called `Clock.run_expired()`, without locks. `cancel()` and `start()` do not wait for a callback
    that runs at that moment, but the expiry that it returns is then ignored.
    """

    __slots__ = ("_clock", "callback", "expiry", "sequence")

    def __init__(self, clock: Clock, callback: Callable[[int], int | None]) -> None:
        """`callback(now_ns)` returns the next expiry in ns, or None to stay idle."""
        self._clock = clock
        self.callback = callback
        self.expiry = 0
        self.sequence = 0

    def start(self, expires_ns: int) -> None:
        """(Re-)arm for `expires_ns` in `Clock.monotonic_ns()` time; a time in the past is due at once."""
        self._clock._start(self, expires_ns)

    def cancel(self) -> None:
        """Disarm; nothing happens if the timer is idle."""
        self._clock._cancel(self)

    @property
    def expires_ns(self) -> int | None:
        """When it expires, or None while it is idle."""
        return self.expiry if self._clock._is_armed(self) else None

    def by_expiry(self) -> int:
        """Sort key of the timer queue."""
        return self.expiry


class VirtualClock(Clock):
    """A clock that stands still until it is told to go on: for tests, which `advance()` it, and repeatable runs, whose guests do."""

    def __init__(self, tsc_khz: int = 2_000_000, start_ns: int = NSEC_PER_SEC, realtime_ns: int = 1_700_000_000 * NSEC_PER_SEC) -> None:
        """Begin at `start_ns` after boot, where CLOCK_REALTIME is `realtime_ns`; the TSC runs at `tsc_khz` kHz since boot."""
        self._now = start_ns
        self._realtime_offset = realtime_ns - start_ns
        super().__init__(lambda: self._now * tsc_khz // KHZ_NSEC, tsc_khz)
        self._base_ns = 0
        self._boot_offset = 0

    def monotonic_ns(self) -> int:
        """Virtual time in ns."""
        return self._now

    def realtime_ns(self) -> int:
        """Virtual CLOCK_REALTIME in ns since 1970."""
        return self._now + self._realtime_offset

    def set_tsc(self, tsc: int) -> None:
        """The TSC has gone on to `tsc`; timers wait for `run_expired()`."""
        self._now = self.tsc_to_ns(tsc)

    def skip_to(self, ns: int) -> None:
        """Nothing happens until the time `ns`, if that is to come; timers wait for `run_expired()`."""
        self._now = max(self._now, ns)

    def advance(self, ns: int) -> None:
        """Let `ns` pass, stopping at every timer on the way."""
        target = self._now + ns
        while (first := self.first_expiry) is not None and first <= target:
            self._now = max(self._now, first)
            self.run_expired()
        self._now = target
