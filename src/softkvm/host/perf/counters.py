"""The counters of one core and the events on them: which event gets which counter, starting, stopping, reading, and overflows.

Answers to Linux 6.1 `struct cpu_hw_events`, `x86_schedule_events()`, `x86_pmu_{add,del,enable,start,stop}()`,
`x86_perf_event_{update,set_period}()` and `intel_pmu_handle_irq()` in `arch/x86/events/`. Nothing but guests runs on the silicon, so
counters need no stopping while the host works on them, and an event that excludes guests never counts.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from softkvm.host.perf import amd, intel
from softkvm.host.perf.branches import BranchRecords, Layout, compatible, setup_filter
from softkvm.host.perf.event import NO_INDEX, Attr, Event, Registers
from softkvm.uapi.perf import PERF_TYPE_HARDWARE, PERF_TYPE_RAW

if TYPE_CHECKING:
    from softkvm.host.perf.context import EventContext
    from softkvm.silicon import Core, Model


class Pmu(Protocol):
    """What a vendor's counters have to tell and to do (`struct x86_pmu`)."""

    generic: int
    """Number of general counters."""
    fixed: int
    """Number of fixed counters."""
    width: int
    """Bits of a counter."""
    version: int
    """Version of architectural performance monitoring; 0 without counters."""
    layout: Layout | None
    """The last branch records, if there are any."""

    @property
    def events(self) -> Mapping[int, int]:
        """Codes of the generalised events."""

    def setup(self, core: Core) -> None:
        """Prepare a core for its first event."""

    def raw_config(self, config: int) -> int:
        """The part of an event's code that software may choose."""

    def exclusion(self, attr: Attr) -> int:
        """Event select bits for `exclude_host` and `exclude_guest`."""

    def candidates(self, config: int) -> int:
        """A bitmap of the counters that can count the event."""

    def counter(self, idx: int) -> int:
        """The MSR with the counter's full width."""

    def enable(self, core: Core, idx: int, config: int) -> None:
        """Let a counter count."""

    def disable(self, core: Core, idx: int) -> None:
        """Stop a counter."""

    def take_overflows(self, core: Core, active: Mapping[int, int], kept: int) -> int:
        """A bitmap of the counters that have overflowed, of which the silicon then knows no more but for those that are `kept`. `active`
        has what each counter that is on read last."""


def make_pmu(model: Model) -> Pmu:
    """The driver for a model's counters."""
    if model.vendor == "amd":
        return amd.AmdPmu(model)
    return intel.IntelPmu(model)


def event_init(pmu: Pmu, event: Event) -> None:
    """`x86_pmu_event_init()`: what the event asks of the silicon; OSError ENOENT, EOPNOTSUPP, EINVAL for what this one cannot do."""
    attr, hw = event.attr, event.hw
    if not pmu.generic:
        raise OSError(errno.ENOENT, "the CPU has no counters")
    if attr.has_branch_stack:
        if pmu.layout is None:
            raise OSError(errno.EOPNOTSUPP, "the CPU has no last branch records")
        setup_filter(event)
    if attr.type == PERF_TYPE_HARDWARE:
        if (code := pmu.events.get(attr.config)) is None:
            raise OSError(errno.ENOENT, "the CPU does not count this event")
        hw.config = code
    elif attr.type == PERF_TYPE_RAW:
        hw.config = pmu.raw_config(attr.config)
    else:
        raise OSError(errno.ENOENT, "no such type of event")
    hw.config |= pmu.exclusion(attr)
    if not attr.exclude_user:
        hw.config |= intel.EVENTSEL_USR
    if not attr.exclude_kernel:
        hw.config |= intel.EVENTSEL_OS
    if not event.no_counter and not pmu.candidates(pmu.raw_config(hw.config)):
        raise OSError(errno.EINVAL, "no counter of the CPU counts this event")
    if not attr.is_sampling:
        hw.sample_period = hw.last_period = hw.period_left = max_period(pmu)


def max_period(pmu: Pmu) -> int:
    """The most that a counter can count and yet be told from one that has run over."""
    return (1 << pmu.width - 1) - 1


def schedule_events(pmu: Pmu, events: list[Event]) -> dict[Event, int] | None:
    """`x86_schedule_events()`: a counter for each event, None if not all can be had together. Those that keep theirs go first."""
    if not compatible(events):
        return None
    assignment = {event: NO_INDEX for event in events if event.no_counter}
    wanted = [(_candidates(pmu, event), event) for event in events if not event.no_counter]
    wanted.sort(key=lambda item: (item[0].bit_count(), item[1].hw.assigned == NO_INDEX))
    free = -1
    for candidates, event in wanted:
        if not candidates & free:
            return None
        assignment[event] = idx = _choose(candidates & free, event.hw.assigned)
        free &= ~(1 << idx)
    return assignment


def _candidates(pmu: Pmu, event: Event) -> int:
    """A bitmap of the counters that the event can be on."""
    return 1 << event.attr.counter if event.attr.is_lent else pmu.candidates(pmu.raw_config(event.hw.config))


def _choose(free: int, old: int) -> int:
    """The counter that the event has had; else a fixed one, as it is of use to few; else the first."""
    if old != NO_INDEX and free >> old & 1:
        return old
    return free.bit_length() - 1 if free >> intel.FIXED else (free & -free).bit_length() - 1


class Counters:
    """`struct cpu_hw_events` of one core. Everything runs under the lock of its `Perf` and while the core is outside the guest."""

    def __init__(self, core: Core, pmu: Pmu) -> None:
        """All counters off."""
        self.core = core
        self.pmu = pmu
        self.events: list[Event] = []
        self._on: dict[int, Event] = {}
        self.branches = BranchRecords(core, pmu.layout) if pmu.layout is not None else None
        self.on_change: Callable[[], None] | None = None
        """Called when `guest_global_ctrl` or `guest_debugctl` may have changed: whoever enters guests here wants to know."""
        self.guest_status = 0
        """Counters whose bits of GLOBAL_STATUS the guest itself reads and clears."""
        self._wrapped = 0
        """Counters that were read behind an overflow of which the silicon keeps no status."""
        self._max_period = max_period(pmu)
        self._mask = (1 << pmu.width) - 1
        self._ready = False

    # --- What a guest is entered with -----------------------------------------------------------------------------------------------

    @property
    def guest_global_ctrl(self) -> int:
        """`intel_guest_get_msrs()`: the counters that run in guest mode; those that are lent run as the guest likes."""
        return sum(1 << idx for idx, event in self._on.items() if not (event.attr.is_lent or event.attr.exclude_guest))

    def belong_to(self, context: EventContext | None) -> bool:
        """Whether no event but those of `context` is here."""
        return all(event.context is context for event in self.events)

    @property
    def guest_debugctl(self) -> int:
        """What the host wants of DEBUGCTL in guest mode."""
        return self.branches.guest_debugctl if self.branches is not None else 0

    # --- Adding and removing --------------------------------------------------------------------------------------------------------

    def add(self, event: Event, first_time: bool) -> bool:
        """`x86_pmu_add()`: find room for the event; False, and nothing has changed, if there is none. `commit()` starts it."""
        if not self._ready:
            self.pmu.setup(self.core)
            self._ready = True
        if len(self.events) >= self.pmu.generic + self.pmu.fixed:
            return False
        assignment = schedule_events(self.pmu, [*self.events, event])
        if assignment is None:
            return False
        self.events.append(event)
        for each, idx in assignment.items():
            each.hw.assigned = idx
        if event.attr.has_branch_stack and self.branches is not None:
            self.branches.add(event, first_time)
        return True

    def remove(self, event: Event) -> None:
        """`x86_pmu_del()`: stop the event and give its counter back."""
        self.stop(event)
        self.events.remove(event)
        event.hw.assigned = NO_INDEX
        if event.attr.has_branch_stack and self.branches is not None:
            self.branches.remove(event)

    def commit(self) -> None:
        """`x86_pmu_enable()`: move events whose counter has changed, and start the new ones."""
        moved = [event for event in self.events if event.hw.idx != event.hw.assigned]
        for event in moved:
            self.stop(event)
        for event in moved:
            event.hw.idx = event.hw.assigned
            self.start(event)
        if self.on_change is not None:
            self.on_change()

    def start(self, event: Event) -> None:
        """`x86_pmu_start()`: load the counter and let it run; nothing for an event without one."""
        idx = event.hw.idx
        if idx == NO_INDEX:
            return
        self._on[idx] = event
        self.restart(event)
        self.pmu.enable(self.core, idx, event.hw.config)

    def stop(self, event: Event) -> None:
        """`x86_pmu_stop()`: what was counted is in `Event.count` afterwards."""
        idx = event.hw.idx
        if idx != NO_INDEX and self._on.get(idx) is event:
            self.pmu.disable(self.core, idx)
            self.update(event)
            del self._on[idx]
        event.hw.idx = NO_INDEX

    # --- Counting -------------------------------------------------------------------------------------------------------------------

    def set_period(self, event: Event) -> bool:
        """`x86_perf_event_set_period()`: load the counter so that it overflows when the period ends; True if one has just ended."""
        hw = event.hw
        left, period, ended = hw.period_left, hw.sample_period, False
        if left <= -period:
            left, ended = period, True
        elif left <= 0:
            left, ended = left + period, True
        if ended:
            hw.period_left, hw.last_period = left, period
        hw.prev_count = -min(left, self._max_period) & self._mask
        self.core.pmu_write(self.pmu.counter(hw.idx), hw.prev_count)
        return ended

    def update(self, event: Event) -> None:
        """`x86_perf_event_update()`: take over what the counter has counted since the last look."""
        hw = event.hw
        if hw.idx == NO_INDEX:
            return
        now = self.core.pmu_read(self.pmu.counter(hw.idx))
        delta = now - hw.prev_count & self._mask
        if now < hw.prev_count and self.pmu.version < 2:
            self._wrapped |= 1 << hw.idx
        hw.prev_count = now
        if event.attr.is_lent:
            event.count = now
            return
        event.count += delta
        hw.period_left -= delta

    def restart(self, event: Event) -> None:
        """Load the counter for a period that has changed, or with the value that its guest wants."""
        hw = event.hw
        if event.attr.is_lent and hw.idx != NO_INDEX:
            hw.prev_count = event.count
            self.core.pmu_write(self.pmu.counter(hw.idx), event.count)
        elif hw.idx != NO_INDEX:
            self.set_period(event)

    def handle_overflows(self, registers: Registers) -> bool:
        """`intel_pmu_handle_irq()`: tell the events whose period has ended; False if no counter of ours has overflowed."""
        seen = {idx: event.hw.prev_count for idx, event in self._on.items()}
        status = self.pmu.take_overflows(self.core, seen, self.guest_status) | self._wrapped
        for idx, event in sorted(self._on.items()):
            if status >> idx & 1:
                self.update(event)
                if (event.attr.is_lent or self.set_period(event)) and event.handler is not None:
                    event.handler(event, registers)
        self._wrapped = 0
        return status != 0
