"""Tracepoints: named places in the code with typed fields, that cost one attribute test while nobody listens.

Answers to Linux 6.1 `include/linux/tracepoint.h` and `include/trace/trace_events.h`. `host/trace.py` defines them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from softkvm.host import static_call

Probe = Callable[..., None]

registry: dict[str, Tracepoint] = {}
"""Every tracepoint by its name."""


class Tracepoint:
    """One tracepoint. The code around it says `if point.enabled: point(a, b)`, so that a quiet point evaluates no argument."""

    __slots__ = ("_probes", "enabled", "fields", "name", "print", "system")

    def __init__(self, system: str, name: str, fields: str, print: Callable[..., str]) -> None:
        """A point of `system` whose probes are called with the `fields` (names, in order); `print` makes the kernel's text of them."""
        self.system = system
        self.name = name
        self.fields = tuple(fields.split())
        self.print = print
        self.enabled = False
        self._probes: tuple[Probe, ...] = ()
        registry[name] = self

    def register(self, probe: Probe) -> None:
        """Call `probe(*fields)` at every hit, in the thread that hits; its exceptions come out of the traced call."""
        self._set((*self._probes, probe))

    def unregister(self, probe: Probe) -> None:
        """Stop calling `probe`; ValueError if it was not registered."""
        probes = list(self._probes)
        probes.remove(probe)
        self._set(tuple(probes))

    def _set(self, probes: tuple[Probe, ...]) -> None:
        was, self._probes = self.enabled, probes
        self.enabled = bool(probes)
        if self.enabled != was:
            static_call.update()

    def __call__(self, *values: Any) -> None:
        """Hit: run the probes."""
        for probe in self._probes:
            probe(*values)
