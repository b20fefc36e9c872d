"""Physical CPUs and who is on them: cores, and the notifiers of `vcpu_load` and `vcpu_put`.

Answers to Linux `include/linux/preempt.h` (preempt notifiers) and to `vcpu_load()`/`vcpu_put()` of `virt/kvm/kvm_main.c`. The host has as
many cores as threads want to run guests at a time; the operating system below us shares the real processors among them. A guest stays on
its core when its thread leaves the kernel, as its VMCS does in Linux, so coming back costs nothing; it goes when another one needs a core.
"""

from __future__ import annotations

import threading
from typing import Protocol

from softkvm import silicon


class Cpu:
    """A core and whose state is loaded on it."""

    __slots__ = ("core", "index", "occupant")

    def __init__(self, model: silicon.Model, index: int) -> None:
        self.index = index
        self.core = silicon.Core(model, index)
        self.occupant: Guest | None = None


class Guest(Protocol):
    """Whoever occupies a core: the preempt notifiers. All are called with the scheduler's lock held."""

    def sched_in(self, cpu: Cpu) -> None:
        """It is on `cpu` from now on."""

    def yield_core(self) -> bool:
        """Leave the core for another guest; False if it is in use."""


class Scheduler:
    """The cores of one kind of silicon."""

    def __init__(self, model: silicon.Model) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._cpus: list[Cpu] = []

    def load(self, guest: Guest) -> None:
        """Put a guest that is on no core on one: a free one, else one whose occupant does not use it, else a new one."""
        with self._lock:
            cpu = self._find()
            cpu.occupant = guest
            guest.sched_in(cpu)

    def put(self, guest: Guest) -> None:
        """Take a guest off its core for good; nothing happens if it is on none."""
        with self._lock:
            for cpu in self._cpus:
                if cpu.occupant is guest and guest.yield_core():
                    cpu.occupant = None

    def _find(self) -> Cpu:
        for cpu in self._cpus:
            if cpu.occupant is None:
                return cpu
        for cpu in self._cpus:
            if cpu.occupant is not None and cpu.occupant.yield_core():
                return cpu
        self._cpus.append(Cpu(self._model, len(self._cpus)))
        return self._cpus[-1]
