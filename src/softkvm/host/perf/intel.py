"""Intel's performance counters as perf drives them: registers, event codes, and which event may be on which counter.

Answers to SDM vol. 3, ch. 20 (architectural performance monitoring) and Linux 6.1 `arch/x86/events/intel/core.c` (Skylake). Indices are
Linux's: general counters from 0, fixed ones from 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from softkvm.host.perf.branches import Layout
from softkvm.silicon.pmu import COUNTER_BITS, LVTPC_NMI, MSR_LVTPC
from softkvm.uapi.perf import Hardware

if TYPE_CHECKING:
    from softkvm.host.perf.event import Attr
    from softkvm.silicon import Core, Model

FIXED = 32
"""Index of the first fixed counter."""

PMC0, EVENTSEL0, FULL_WIDTH_PMC0 = 0xC1, 0x186, 0x4C1
FIXED_CTR0, FIXED_CTR_CTRL = 0x309, 0x38D
GLOBAL_STATUS, GLOBAL_CTRL, GLOBAL_OVF_CTRL, GLOBAL_STATUS_SET = 0x38E, 0x38F, 0x390, 0x391
PERF_CAPABILITIES = 0x345

EVENTSEL_USR, EVENTSEL_OS, EVENTSEL_EDGE, EVENTSEL_PIN = 1 << 16, 1 << 17, 1 << 18, 1 << 19
EVENTSEL_INT, EVENTSEL_ANY, EVENTSEL_ENABLE, EVENTSEL_INV = 1 << 20, 1 << 21, 1 << 22, 1 << 23
EVENTSEL_CMASK = 0xFF << 24
EVENT_MASK = 0xFFFF
"""Event and unit mask."""
_COUNTED = EVENT_MASK | EVENTSEL_EDGE | EVENTSEL_INV | EVENTSEL_CMASK
_FIXED_OS, _FIXED_USR, _FIXED_PMI = 1, 2, 8

LBR_FORMAT, FULL_WIDTH_WRITE = 0x3F, 1 << 13
LBR_FORMAT_INFO = 5
_LEAF = 0xA

FIXED_EVENTS = (0x00C0, 0x003C, 0x0300)
"""What the fixed counters count: instructions, core cycles, reference cycles (a code that only they have)."""
EVENTS: dict[int, int] = {
    Hardware.CPU_CYCLES: 0x003C,
    Hardware.INSTRUCTIONS: 0x00C0,
    Hardware.CACHE_REFERENCES: 0x4F2E,
    Hardware.CACHE_MISSES: 0x412E,
    Hardware.BRANCH_INSTRUCTIONS: 0x00C4,
    Hardware.BRANCH_MISSES: 0x00C5,
    Hardware.BUS_CYCLES: 0x013C,
    Hardware.REF_CPU_CYCLES: 0x0300,
}


class IntelPmu:
    """What all cores of an Intel model have alike."""

    def __init__(self, model: Model) -> None:
        """From leaf 0Ah and PERF_CAPABILITIES of the model."""
        eax, _, _, edx = model.cpuid(_LEAF, 0)
        capabilities = model.msrs().get(PERF_CAPABILITIES, 0)
        self.version = eax & 0xFF
        self.generic = eax >> 8 & 0xFF if self.version else 0
        self.fixed = min(edx & 0x1F, len(FIXED_EVENTS)) if self.version > 1 else 0
        self.width = eax >> 16 & 0xFF or COUNTER_BITS
        self.events = EVENTS
        self.layout: Layout | None = None
        if capabilities & LBR_FORMAT == LBR_FORMAT_INFO:
            self.layout = Layout(nr=32, tos=0x1C9, from_=0x680, to=0x6C0, info=0xDC0)

    def setup(self, core: Core) -> None:
        """`init_hw_perf_events()`: overflows are NMIs."""
        if self.version:
            core.pmu_write(MSR_LVTPC, LVTPC_NMI)

    def exclusion(self, _attr: Attr) -> int:
        """Event select bits that keep host or guest out: here GLOBAL_CTRL does, at entry and exit."""
        return 0

    def raw_config(self, config: int) -> int:
        """The part of an event's code that software may choose."""
        return config & _COUNTED

    def candidates(self, config: int) -> int:
        """A bitmap of the counters that can count the event."""
        generic = (1 << self.generic) - 1
        code = config & _COUNTED
        if code not in FIXED_EVENTS:
            return generic
        number = FIXED_EVENTS.index(code)
        fixed = 1 << FIXED + number if number < self.fixed else 0
        return fixed if code & 0xFF == 0 else fixed | generic

    def counter(self, idx: int) -> int:
        """The MSR with the counter's full width."""
        return FIXED_CTR0 + idx - FIXED if idx >= FIXED else FULL_WIDTH_PMC0 + idx

    def enable(self, core: Core, idx: int, config: int) -> None:
        """Let the counter count `config` (event select bits); it does so while the guest's GLOBAL_CTRL has it."""
        if idx < FIXED:
            core.pmu_write(EVENTSEL0 + idx, config | EVENTSEL_INT | EVENTSEL_ENABLE)
            return
        rings = (_FIXED_OS if config & EVENTSEL_OS else 0) | (_FIXED_USR if config & EVENTSEL_USR else 0)
        self._set_fixed(core, idx, rings | _FIXED_PMI)

    def disable(self, core: Core, idx: int) -> None:
        """Stop the counter."""
        if idx < FIXED:
            core.pmu_write(EVENTSEL0 + idx, 0)
        else:
            self._set_fixed(core, idx, 0)

    def _set_fixed(self, core: Core, idx: int, field: int) -> None:
        shift = (idx - FIXED) * 4
        core.pmu_write(FIXED_CTR_CTRL, core.pmu_read(FIXED_CTR_CTRL) & ~(0xF << shift) | field << shift)

    def take_overflows(self, core: Core, _active: Mapping[int, int], kept: int) -> int:
        """A bitmap of the counters that have overflowed; the status is cleared, which also ends a freeze, and LVTPC unmasked."""
        status = core.pmu_read(GLOBAL_STATUS)
        if status & ~kept:
            core.pmu_write(GLOBAL_OVF_CTRL, status & ~kept)
        core.pmu_write(MSR_LVTPC, LVTPC_NMI)
        return status
