"""Physical CPUs and who runs on them: cores, and the notifiers of `vcpu_load` and `vcpu_put`.

Answers to Linux `include/linux/preempt.h` (preempt notifiers) and to `vcpu_load()`/`vcpu_put()` of `virt/kvm/kvm_main.c`. The host has as
many cores as threads want to run guests at a time; the operating system below us shares the real processors among them.
"""

from __future__ import annotations

import threading
from typing import Protocol

from softkvm import silicon


class Cpu:
    """A core and whose state was last loaded on it."""

    __slots__ = ("core", "index", "last")

    def __init__(self, model: silicon.Model, index: int) -> None:
        self.index = index
        self.core = silicon.Core(model, index)
        self.last: object | None = None
        """Whoever ran here last: anybody else finds a stranger's translations in the TLB."""


class PreemptNotifier(Protocol):
    """What the scheduler tells whoever occupies a core."""

    def sched_in(self, cpu: Cpu) -> None:
        """The task runs on `cpu` from now on."""

    def sched_out(self, cpu: Cpu) -> None:
        """The task leaves `cpu`."""


class Scheduler:
    """The cores of one kind of silicon, each held by one thread at a time."""

    def __init__(self, model: silicon.Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._idle: list[Cpu] = []
        self._count = 0

    def load(self, task: PreemptNotifier, preferred: Cpu | None) -> Cpu:
        """Put the task on an idle core, on the `preferred` one if that is idle, and notify it."""
        with self._lock:
            if preferred is not None and preferred in self._idle:
                cpu = preferred
                self._idle.remove(cpu)
            elif self._idle:
                cpu = self._idle.pop()
            else:
                cpu = Cpu(self._model, self._count)
                self._count += 1
        task.sched_in(cpu)
        return cpu

    def put(self, task: PreemptNotifier, cpu: Cpu) -> None:
        """Take the task off its core, after notifying it."""
        task.sched_out(cpu)
        with self._lock:
            self._idle.append(cpu)
