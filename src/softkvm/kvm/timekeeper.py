"""Which of the vCPUs that wait runs the timers when they expire.

A VM's timers have no thread of their own (`host/clock.py`). If every waiting vCPU woke up for each of them, a VM of many vCPUs would do
nothing else, so one of those that wait keeps the time for all, as `tick_do_timer_cpu` does in Linux 6.1 `kernel/time/tick-sched.c`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Protocol


class Waiter(Protocol):
    """The part of a vCPU that the timekeeper needs."""

    @property
    def blocked(self) -> bool:
        """Whether it waits."""

    def wake(self) -> None:
        """Make it look around."""


class Timekeeper:
    """Who keeps the time; all methods may be called from any thread."""

    def __init__(self, waiters: Iterable[Waiter]) -> None:
        """`waiters` are the vCPUs, of which there may be more later."""
        self._waiters = waiters
        self._lock = threading.Lock()
        self._keeper: Waiter | None = None
        self._until = 0

    def claims(self, waiter: Waiter, expiry: int) -> bool:
        """Whether `waiter`, which is about to wait, must wake up at `expiry` (ns) because nobody else will."""
        with self._lock:
            if self._keeper in (None, waiter) or expiry < self._until:
                self._keeper, self._until = waiter, expiry
                return True
        return False

    def leave(self, waiter: Waiter) -> None:
        """`waiter` waits no more: another one that does takes over."""
        with self._lock:
            if self._keeper not in (None, waiter):
                return
            self._keeper = None
        heir = next((other for other in self._waiters if other.blocked and other is not waiter), None)
        if heir is not None:
            heir.wake()
