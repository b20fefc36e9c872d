"""Alarms for devices, on the clock that the whole VM lives by (`host/clock.py`).

A device never reads a clock by itself: `Timers.now` is the time it knows. The threads that run vCPUs ring the alarms on the way, as they do
for KVM's own timers, so a machine that stands still has no alarms, and a virtual clock moves devices and guest alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from softkvm.host.clock import NSEC_PER_SEC, Clock, HrTimer

__all__ = ["NSEC_PER_SEC", "Timer", "Timers"]


class Timer:
    """A one-shot alarm; the callback runs under the board's lock and may arm it again.

    A callback that had to wait for the lock may come after `disarm()`: a device looks at the time and not at the fact that it was called.
    """

    __slots__ = ("_callback", "_hrtimer", "_lock")

    def __init__(self, clock: Clock, lock: threading.RLock, callback: Callable[[], None]) -> None:
        self._hrtimer = HrTimer(clock, self._ring)
        self._lock = lock
        self._callback = callback

    def arm(self, deadline: int) -> None:
        """Ring at `deadline` ns instead of any earlier wish; a time in the past rings at once."""
        self._hrtimer.start(deadline)

    def disarm(self) -> None:
        """Ring no more."""
        self._hrtimer.cancel()

    def _ring(self, now: int) -> None:
        with self._lock:
            self._callback()


class Timers:
    """Makes the timers of a board."""

    def __init__(self, clock: Clock, lock: threading.RLock) -> None:
        """Alarms by `clock`; `lock` is the board's lock, held while a callback runs."""
        self._clock = clock
        self._standing: int | None = None
        self._lock = lock

    def now(self) -> int:
        """The time in ns."""
        return self._clock.monotonic_ns() if self._standing is None else self._standing

    @contextmanager
    def standing_at(self, ns: int) -> Iterator[None]:
        """Let time stand at `ns` during the block, so that devices are saved, or restored, as of one instant; it may be a past one."""
        self._standing = ns
        try:
            yield
        finally:
            self._standing = None

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new timer, disarmed."""
        return Timer(self._clock, self._lock, callback)
