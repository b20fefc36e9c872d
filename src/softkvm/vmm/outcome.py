"""How a run of a machine ends: whoever says so first wins, on whatever thread; and what the thread that runs the machine waits on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from softkvm.vmm.stop import Stop, StopReason


class Failure(Exception):
    """Carries an exception and its vCPU from the thread where it was raised to the one that called `run()`."""

    def __init__(self, vcpu: int, error: BaseException) -> None:
        super().__init__(vcpu, error)
        self.vcpu = vcpu
        self.error = error


class Outcome:
    """Of the run in progress; all methods may be called from any thread."""

    def __init__(self, halt: Callable[[], None]) -> None:
        """`halt()` tells every vCPU to park, without waiting for them."""
        self._halt = halt
        self._lock = threading.Lock()
        self._found: Stop | Failure | None = None
        self._stop_wanted = False
        self.changed = threading.Event()
        """Set when the run is over, or when something else happened that the waiting thread must look at."""

    def begin(self) -> None:
        """A run begins; it is over already if somebody wanted to stop it before."""
        with self._lock:
            self._found = Stop(StopReason.INTERRUPTED, 0, 0, "stopped before the run") if self._stop_wanted else None
            self.changed.clear()

    def want_stop(self) -> None:
        """The run in progress, or the next one, shall end."""
        self._stop_wanted = True

    def conclude(self, outcome: Stop | Failure) -> None:
        """The first outcome of a run wins, and every vCPU is told to park before another run can begin."""
        with self._lock:
            if self._found is None:
                self._found = outcome
                self.notify()

    def notify(self) -> None:
        """Park the vCPUs, and let the waiting thread look around."""
        self._halt()
        self.changed.set()

    def look(self) -> bool:
        """Whether the run is over; if it is not, `changed` waits for what comes from now on."""
        with self._lock:
            if self._found is None:
                self.changed.clear()
            return self._found is not None

    def take(self, timeout: float | None) -> Stop | Failure:
        """The outcome, at the end of the run; if there is none `timeout` seconds are over."""
        with self._lock:
            self._stop_wanted = False
            return self._found or Stop(StopReason.TIMEOUT, 0, 0, f"{timeout} seconds are over")
