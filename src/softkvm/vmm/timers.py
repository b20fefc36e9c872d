"""Alarms for devices: a device that must act at a time asks for a timer; one thread serves them all.

A device never reads a clock by itself: `TimerQueue.now` is the time it knows, so a test can hold it still and move it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

NSEC_PER_SEC = 1_000_000_000


class Timer:
    """A one-shot alarm of a queue; the callback runs under the board's lock and may arm it again."""

    __slots__ = ("_callback", "_queue", "deadline")

    def __init__(self, queue: TimerQueue, callback: Callable[[], None]) -> None:
        self._queue = queue
        self._callback = callback
        self.deadline: int | None = None
        """When it rings, in ns of `TimerQueue.now()`; None while disarmed."""

    def arm(self, deadline: int) -> None:
        """Ring at `deadline` ns instead of any earlier wish; a time in the past rings at once."""
        self.deadline = deadline
        self._queue._changed(self)

    def disarm(self) -> None:
        """Ring no more."""
        self.deadline = None
        self._queue._changed(self)

    def ring(self) -> None:
        """Disarm and call the device."""
        self.deadline = None
        self._queue._changed(self)
        self._callback()


class TimerQueue:
    """The timers of a board and, once `start()`ed, the thread that rings them."""

    def __init__(self, now: Callable[[], int], lock: threading.RLock | None = None) -> None:
        """`now()` is a monotonic clock in ns; `lock` is the board's lock, held while a callback runs."""
        self.now = now
        self._condition = threading.Condition(lock or threading.RLock())
        self._armed: set[Timer] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new timer, disarmed."""
        return Timer(self, callback)

    def next_deadline(self) -> int | None:
        """The earliest deadline in ns, or None."""
        return min((timer.deadline for timer in self._armed if timer.deadline is not None), default=None)

    def run_expired(self) -> None:
        """Ring what is due, earliest first; a timer that a callback arms again waits for the next call."""
        with self._condition:
            now = self.now()
            due = [(timer.deadline, timer) for timer in self._armed if timer.deadline is not None and timer.deadline <= now]
            for deadline, timer in sorted(due, key=lambda item: item[0]):
                if timer.deadline == deadline:  # an earlier callback may have moved or disarmed it
                    timer.ring()

    def start(self, on_error: Callable[[Exception], None]) -> None:
        """Let a thread ring the timers from now on; what a callback raises goes to `on_error` and ends the thread."""
        with self._condition:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, args=(on_error,), name="softkvm-timers", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread; armed timers ring no more."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _changed(self, timer: Timer) -> None:
        with self._condition:
            if timer.deadline is None:
                self._armed.discard(timer)
            else:
                self._armed.add(timer)
                self._condition.notify()

    def _serve(self, on_error: Callable[[Exception], None]) -> None:
        try:
            with self._condition:
                while not self._closed:
                    self.run_expired()
                    deadline = self.next_deadline()
                    self._condition.wait(None if deadline is None else max(0, deadline - self.now()) / NSEC_PER_SEC)
        except Exception as error:
            on_error(error)
