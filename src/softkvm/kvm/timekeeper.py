"""Which of the vCPUs that wait runs the timers when they expire.

A VM's timers have no thread of their own (`host/clock.py`). If every waiting vCPU woke up for each of them, a VM of many vCPUs would do
nothing else, so one of those that wait keeps the time for all, as `tick_do_timer_cpu` does in Linux 6.1 `kernel/time/tick-sched.c`. None
has to while another vCPU runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
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

    def __init__(self, waiters: Callable[[], Iterable[Waiter]]) -> None:
        """`waiters()` are the vCPUs."""
        self._waiters = waiters
        self._lock = threading.Lock()
        self._keeper: Waiter | None = None
        self._until = 0
        self._trusted = False
        """Somebody may sleep who trusts that others run the timers."""
        self.vacant = False
        """Such a sleeper trusts in vCPUs that run: `hand_over()` when one of them stops doing so."""

    def claims(self, waiter: Waiter, expiry: int) -> bool:
        """Whether `waiter`, which is about to wait, must wake up at `expiry` (ns) because nobody else will."""
        with self._lock:
            if self._keeper in (None, waiter) or expiry < self._until:
                self._keeper, self._until = waiter, expiry
                self.vacant = False
                return True
            self._trusted = True
        return False

    def leave(self, waiter: Waiter) -> None:
        """`waiter` waits no more: it runs, and its core's timer keeps the time."""
        with self._lock:
            if self._keeper is waiter:
                self._keeper, self.vacant = None, self._trusted

    def hand_over(self) -> None:
        """A vCPU leaves the kernel, where it kept the time, while the place is vacant: one that waits takes over."""
        with self._lock:
            if not self.vacant:
                return
            heir = next((waiter for waiter in self._waiters() if waiter.blocked), None)
            self._trusted = self.vacant = heir is not None
        if heir is not None:
            heir.wake()
