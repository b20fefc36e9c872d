"""AMD's performance counters as perf drives them: six per core, any event on any of them, and no status register.

Answers to APM vol. 2, 13.2 (performance monitoring counters, PERFCTR_CORE) and Linux 6.1 `arch/x86/events/amd/core.c` (Zen).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from softkvm.host.perf.branches import Layout
from softkvm.host.perf.intel import EVENTSEL_CMASK, EVENTSEL_EDGE, EVENTSEL_ENABLE, EVENTSEL_INT, EVENTSEL_INV
from softkvm.silicon.pmu import COUNTER_BITS, LVTPC_NMI, MSR_LVTPC
from softkvm.uapi.perf import Hardware

if TYPE_CHECKING:
    from softkvm.host.perf.event import Attr
    from softkvm.silicon import Core, Model

PERF_CTL0, PERF_CTR0 = 0xC001_0200, 0xC001_0201
"""Each counter has two MSRs, so the next one is two further."""
_PERFCTR_CORE = 1 << 23
_CORE_COUNTERS, _LEGACY_COUNTERS = 6, 4
EVENT_MASK = 0xF_0000_FFFF
"""Event (12 bits in two places) and unit mask."""

_GUEST_ONLY, _HOST_ONLY = 1 << 40, 1 << 41

EVENTS: dict[int, int] = {
    Hardware.CPU_CYCLES: 0x0076,
    Hardware.INSTRUCTIONS: 0x00C0,
    Hardware.CACHE_REFERENCES: 0xFF60,
    Hardware.CACHE_MISSES: 0x0964,
    Hardware.BRANCH_INSTRUCTIONS: 0x00C2,
    Hardware.BRANCH_MISSES: 0x00C3,
}


class AmdPmu:
    """What all cores of an AMD model have alike."""

    fixed = 0
    version = 1
    width = COUNTER_BITS
    layout: Layout | None = None

    def __init__(self, model: Model) -> None:
        """From leaf 80000001h of the model."""
        self.generic = _CORE_COUNTERS if model.cpuid(0x8000_0001, 0)[2] & _PERFCTR_CORE else _LEGACY_COUNTERS
        self.events = EVENTS

    def setup(self, core: Core) -> None:
        """`init_hw_perf_events()`: overflows are NMIs."""
        core.pmu_write(MSR_LVTPC, LVTPC_NMI)

    def exclusion(self, attr: Attr) -> int:
        """Event select bits that keep host or guest out; both excluded is neither, as in Linux."""
        if attr.exclude_host == attr.exclude_guest:
            return 0
        return _GUEST_ONLY if attr.exclude_host else _HOST_ONLY

    def raw_config(self, config: int) -> int:
        """The part of an event's code that software may choose."""
        return config & (EVENT_MASK | EVENTSEL_EDGE | EVENTSEL_INV | EVENTSEL_CMASK)

    def candidates(self, _config: int) -> int:
        """A bitmap of the counters that can count the event."""
        return (1 << self.generic) - 1

    def counter(self, idx: int) -> int:
        """The counter's MSR."""
        return PERF_CTR0 + 2 * idx

    def enable(self, core: Core, idx: int, config: int) -> None:
        """Let the counter count `config` (event select bits)."""
        core.pmu_write(PERF_CTL0 + 2 * idx, config | EVENTSEL_INT | EVENTSEL_ENABLE)

    def disable(self, core: Core, idx: int) -> None:
        """Stop the counter."""
        core.pmu_write(PERF_CTL0 + 2 * idx, 0)

    def take_overflows(self, core: Core, active: Mapping[int, int], _kept: int) -> int:
        """A bitmap of the counters that have overflowed: those that read less than before."""
        return sum(1 << idx for idx, seen in active.items() if core.pmu_read(self.counter(idx)) < seen)
