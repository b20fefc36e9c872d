"""KVM_SET_PMU_EVENT_FILTER: which events user space lets a VM count.

Answers to Linux 6.1 `kvm_vm_ioctl_set_pmu_event_filter()` and `check_pmu_event_filter()` in `arch/x86/kvm/pmu.c`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass

from softkvm.host.perf.intel import FIXED
from softkvm.kvm.ioctl import MAX_PMU_EVENTS
from softkvm.uapi import kvm as uapi

_EVENT_AND_UMASK = 0xF_0000_FFFF


@dataclass(frozen=True, slots=True)
class EventFilter:
    """A list of events that are allowed, or of those that are denied; fixed counters by a bitmap."""

    allow: bool
    events: frozenset[int]
    fixed: int

    @classmethod
    def make(cls, header: uapi.PmuEventFilter, events: Sequence[int]) -> EventFilter:
        """The filter of the ioctl's argument; OSError EINVAL for an action or flags that there are not, E2BIG."""
        if header.action > uapi.KVM_PMU_EVENT_DENY or header.flags:
            raise OSError(errno.EINVAL, "bad action or flags")
        if len(events) > MAX_PMU_EVENTS:
            raise OSError(errno.E2BIG, "too many events")
        return cls(header.action == uapi.KVM_PMU_EVENT_ALLOW, frozenset(events), header.fixed_counter_bitmap)

    def allows(self, idx: int, eventsel: int) -> bool:
        """Whether a counter may count what its register selects."""
        listed = bool(self.fixed >> idx - FIXED & 1) if idx >= FIXED else eventsel & _EVENT_AND_UMASK in self.events
        return listed == self.allow
