"""Tracepoints: named places in the code with typed fields, that cost one attribute test while nobody listens.

Answers to Linux `include/linux/tracepoint.h`; names and fields are those of the kernel's `trace/events/{syscalls,kvm}.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Probe = Callable[..., None]

registry: dict[str, Tracepoint] = {}
"""Every tracepoint by its name."""


class Tracepoint:
    """One tracepoint. The code around it says `if point.enabled: point(a, b)`, so that a quiet point evaluates no argument."""

    __slots__ = ("_probes", "enabled", "fields", "name")

    def __init__(self, name: str, *fields: str) -> None:
        """A point of that name whose probes are called with the `fields`, in order."""
        self.name = name
        self.fields = fields
        self.enabled = False
        self._probes: tuple[Probe, ...] = ()
        registry[name] = self

    def register(self, probe: Probe) -> None:
        """Call `probe(*fields)` at every hit, in the thread that hits; its exceptions come out of the traced call."""
        self._probes = (*self._probes, probe)
        self.enabled = True

    def unregister(self, probe: Probe) -> None:
        """Stop calling `probe`; ValueError if it was not registered."""
        probes = list(self._probes)
        probes.remove(probe)
        self._probes = tuple(probes)
        self.enabled = bool(probes)

    def __call__(self, *values: Any) -> None:
        """Hit: run the probes."""
        for probe in self._probes:
            probe(*values)


sys_enter = Tracepoint("sys_enter", "nr", "args")
sys_exit = Tracepoint("sys_exit", "nr", "ret")
kvm_entry = Tracepoint("kvm_entry", "vcpu_id", "rip")
kvm_exit = Tracepoint("kvm_exit", "vcpu_id", "exit_reason", "guest_rip", "info1", "info2", "intr_info", "error_code")
kvm_userspace_exit = Tracepoint("kvm_userspace_exit", "reason", "errno")
kvm_inj_virq = Tracepoint("kvm_inj_virq", "irq", "soft", "reinjected")
kvm_inj_exception = Tracepoint("kvm_inj_exception", "exception", "has_error", "error_code", "reinjected")
kvm_cpuid = Tracepoint("kvm_cpuid", "function", "index", "rax", "rbx", "rcx", "rdx")
kvm_msr = Tracepoint("kvm_msr", "write", "ecx", "data", "exception")
kvm_pio = Tracepoint("kvm_pio", "rw", "port", "size", "count", "val")
kvm_mmio = Tracepoint("kvm_mmio", "type", "len", "gpa", "val")
kvm_page_fault = Tracepoint("kvm_page_fault", "guest_rip", "fault_address", "error_code")
kvm_hypercall = Tracepoint("kvm_hypercall", "nr", "a0", "a1", "a2", "a3")
