"""A perf event: what it asks for, where it is in its life, and what it has counted.

Answers to Linux 6.1 `include/linux/perf_event.h` (`struct perf_event`, `struct hw_perf_event`, `enum perf_event_state`) and
`uapi/linux/perf_event.h` (`struct perf_event_attr`). Scheduling is in `core.py`, the counters in `counters.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Protocol

from softkvm.host.task import Task
from softkvm.uapi.perf import PERF_TYPE_RAW, BranchSample, SampleFormat

if TYPE_CHECKING:
    from softkvm.host.perf.context import EventContext

NO_SAMPLE, NO_BRANCHES = SampleFormat(0), BranchSample(0)
NO_INDEX: Final = -1
"""`X86_PMC_IDX_NA`: an event that has no counter, or not yet."""


class State(IntEnum):
    """`enum perf_event_state`; the order counts."""

    DEAD = -4
    ERROR = -2
    """Pinned, and it could not be on its CPU: never tried again, until somebody enables it anew."""
    OFF = -1
    INACTIVE = 0
    ACTIVE = 1


class _Tombstone:
    """The owner of events that the kernel has made for itself (`TASK_TOMBSTONE`)."""

    def __repr__(self) -> str:
        return "TASK_TOMBSTONE"


TASK_TOMBSTONE: Final = _Tombstone()
Owner = Task | _Tombstone


@dataclass(frozen=True, slots=True)
class Attr:
    """`struct perf_event_attr`, as far as this PMU has it; `sample_period` 0 counts without interrupts."""

    type: int = PERF_TYPE_RAW
    config: int = 0
    sample_period: int = 0
    sample_type: SampleFormat = NO_SAMPLE
    branch_sample_type: BranchSample = NO_BRANCHES
    pinned: bool = False
    disabled: bool = False
    exclude_user: bool = False
    exclude_kernel: bool = False
    exclude_host: bool = False
    exclude_guest: bool = False
    counter: int = NO_INDEX
    """The one counter that the event can be on, which is lent to a guest as it is: value and overflows are the guest's."""

    @property
    def is_lent(self) -> bool:
        """Whether the event's counter is a guest's: `Event.count` is then what it reads, and is loaded into it."""
        return self.counter != NO_INDEX

    @property
    def has_branch_stack(self) -> bool:
        """Whether samples hold the branch stack (`has_branch_stack()`)."""
        return bool(self.sample_type & SampleFormat.BRANCH_STACK)

    @property
    def is_sampling(self) -> bool:
        """Whether overflows interrupt."""
        return self.sample_period != 0


class Registers(Protocol):
    """`struct pt_regs` of what a PMI has interrupted: always a guest here, as nothing else runs on the silicon."""

    @property
    def ip(self) -> int:
        """Linear address of the next instruction."""

    @property
    def user_mode(self) -> bool:
        """Whether CPL is not 0."""

    @property
    def cr3(self) -> int:
        """The address space."""

    @property
    def stack_pointer(self) -> int:
        """RSP."""

    @property
    def frame_pointer(self) -> int:
        """RBP."""


OverflowHandler = Callable[["Event", Registers], None]


class Hardware:
    """`struct hw_perf_event`: the event on a counter. `idx` is the counter, which `assigned` says for the next start."""

    __slots__ = ("assigned", "branch_config", "config", "idx", "last_period", "period_left", "prev_count", "sample_period")

    def __init__(self, sample_period: int) -> None:
        self.config = 0
        """What goes into the event select register."""
        self.branch_config = 0
        """What goes into LBR_SELECT, and bits that only arbitration looks at."""
        self.idx = self.assigned = NO_INDEX
        self.sample_period = self.last_period = self.period_left = sample_period
        self.prev_count = 0


class Event:
    """`struct perf_event`. All of it belongs to the lock of the `Perf` that made it."""

    __slots__ = (
        "_since",
        "attr",
        "context",
        "count",
        "cpu",
        "enabled_ns",
        "handler",
        "has_run",
        "hw",
        "leader",
        "no_counter",
        "oncpu",
        "owner",
        "running_ns",
        "siblings",
        "state",
    )

    def __init__(self, attr: Attr, cpu: int, owner: Owner, handler: OverflowHandler | None, now: int) -> None:
        """An event that `Perf` has yet to put into a context, at host time `now`. `event_init()` asks for the owner."""
        self.attr = attr
        self.cpu = cpu
        """The only CPU that it counts on, -1 for all."""
        self.owner = owner
        self.handler = handler
        self.state = State.OFF if attr.disabled else State.INACTIVE
        self.oncpu = -1
        """The CPU that it counts on now."""
        self.count = 0
        self.has_run = False
        """Whether it was ever on a CPU."""
        self.no_counter = False
        """`PERF_EV_CAP_NO_COUNTER`: the event owns the branch stack and needs nothing else."""
        self.hw = Hardware(attr.sample_period)
        self.context: EventContext | None = None
        self.leader = self
        """The event that decides when the group is on a CPU: this one, unless it was put into another's group."""
        self.siblings: list[Event] = []
        """The others of its group, if it leads one: they are on a CPU with it, all of them or none."""
        self.enabled_ns = self.running_ns = 0
        """How long the event wanted to count, and how long it did."""
        self._since = now

    def enter(self, state: State, now: int) -> None:
        """`perf_event_set_state()`: into another state, at host time `now` in ns."""
        if self.state >= State.INACTIVE:
            self.enabled_ns += now - self._since
        if self.state is State.ACTIVE:
            self.running_ns += now - self._since
        self.state, self._since = state, now

    @property
    def group(self) -> list[Event]:
        """The events that this one leads, and itself."""
        return [self, *self.siblings]

    @property
    def is_kernel_event(self) -> bool:
        """`is_kernel_event()`."""
        return self.owner is TASK_TOMBSTONE
