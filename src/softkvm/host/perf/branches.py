"""The host's driver of the last branch records: who has them, what they select, and their contents across task switches.

Answers to Linux 6.1 `arch/x86/events/intel/lbr.c`, and to "Guest LBR Enabling" (v8) for events that pass the records to a guest: while one
of those is on a CPU, the host neither enables, disables nor reads the records there, and no other event shares them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from softkvm.host.perf.event import Event
from softkvm.uapi.perf import BranchSample

if TYPE_CHECKING:
    from softkvm.host.perf.context import BranchState, EventContext
    from softkvm.silicon import Core

LBR_SELECT = 0x1C8
DEBUGCTL_LBR, DEBUGCTL_FREEZE_LBRS = 1 << 0, 1 << 11

SELECT_MASK = 0x3FF
"""The bits of LBR_SELECT that exist."""
UNSHARED = 1 << 62
"""A bit that silicon does not have: the configuration of an event that shares the records with nobody."""
_SUPPRESS, _CALL_STACK = 0x1FF, 1 << 9
_JCC, _REL_CALL, _IND_CALL, _RET, _IND_JMP, _REL_JMP, _FAR = (1 << bit for bit in range(2, 9))
_ANY = _JCC | _REL_CALL | _IND_CALL | _RET | _IND_JMP | _REL_JMP | _FAR
_WANTED = {
    BranchSample.USER: 1 << 1,
    BranchSample.KERNEL: 1 << 0,
    BranchSample.ANY: _ANY,
    BranchSample.ANY_CALL: _REL_CALL | _IND_CALL | _FAR,
    BranchSample.ANY_RETURN: _RET | _FAR,
    BranchSample.IND_CALL: _IND_CALL,
    BranchSample.COND: _JCC,
    BranchSample.CALL_STACK: _REL_CALL | _IND_CALL | _RET | _CALL_STACK,
    BranchSample.IND_JUMP: _IND_JMP,
    BranchSample.CALL: _REL_CALL,
}
_INFO_MISPREDICTED, _INFO_CYCLES = 1 << 63, 0xFFFF
_KERNEL_ADDRESS = 1 << 63


class Layout(NamedTuple):
    """`struct x86_pmu_lbr`: how many records, and the MSRs of each; `info` 0 where there are none."""

    nr: int
    tos: int
    from_: int
    to: int
    info: int

    def __contains__(self, msr: object) -> bool:
        """Whether an MSR is one of the records', LBR_SELECT and TOS included."""
        if not isinstance(msr, int):
            return False
        bases = (self.from_, self.to, self.info) if self.info else (self.from_, self.to)
        return msr in (LBR_SELECT, self.tos) or any(base <= msr < base + self.nr for base in bases)

    def msrs(self) -> list[int]:
        """All of them."""
        bases = (self.from_, self.to, self.info) if self.info else (self.from_, self.to)
        return [LBR_SELECT, self.tos, *(base + index for base in bases for index in range(self.nr))]


class Branch(NamedTuple):
    """`struct perf_branch_entry`: one record of a sample."""

    from_: int
    to: int
    mispredicted: bool
    cycles: int


def select_config(branch_type: BranchSample) -> int:
    """LBR_SELECT for what a sample wants: its bits suppress, except the one of call-stack mode."""
    if not branch_type & (BranchSample.USER | BranchSample.KERNEL):
        branch_type |= BranchSample.USER | BranchSample.KERNEL
    wanted = 0
    for kind, bits in _WANTED.items():
        if branch_type & kind:
            wanted |= bits
    return wanted ^ _SUPPRESS


def setup_filter(event: Event) -> None:
    """`intel_pmu_setup_lbr_filter()`: the event's LBR_SELECT; the kernel's own for a guest needs no counter and shares nothing."""
    event.hw.branch_config = select_config(event.attr.branch_sample_type)
    if event.attr.exclude_host and event.is_kernel_event:
        event.no_counter = True
        event.hw.branch_config |= UNSHARED


def compatible(events: list[Event]) -> bool:
    """Whether the events can have the records together: one configuration, and an unshared one alone."""
    configs = [event.hw.branch_config for event in events if event.attr.has_branch_stack]
    return len(configs) < 2 or (len(set(configs)) == 1 and not configs[0] & UNSHARED)


class BranchRecords:
    """The last branch records of one core, and which events they are on for."""

    def __init__(self, core: Core, layout: Layout) -> None:
        self.layout = layout
        self._core = core
        self._users: list[Event] = []
        self.vcpu_lbr = False
        """A guest has them."""
        self._contents: Event | None = None
        """The event that they were last on for."""
        self._last: BranchState | None = None
        self._last_log_id = 0

    @property
    def guest_debugctl(self) -> int:
        """What the host wants of DEBUGCTL while a guest runs: to record it from outside, if an event of the host's does."""
        watching = any(not event.attr.exclude_guest for event in self._users)
        return DEBUGCTL_LBR | DEBUGCTL_FREEZE_LBRS if watching and not self.vcpu_lbr else 0

    def add(self, event: Event, first_time: bool) -> None:
        """`intel_pmu_lbr_add()`: one more user; whoever finds the records of somebody else, or none of its own, finds them empty."""
        state = self._state(event)
        if event.no_counter:
            self.vcpu_lbr = True
        if event.attr.branch_sample_type & BranchSample.CALL_STACK and state is not None:
            state.users += 1
        self._users.append(event)
        if len(self._users) == 1 and (first_time or self._contents is not event):
            self.reset()
        self._contents = event
        if not self.vcpu_lbr:
            self._core.pmu_write(LBR_SELECT, event.hw.branch_config & SELECT_MASK)

    def remove(self, event: Event) -> None:
        """`intel_pmu_lbr_del()`."""
        state = self._state(event)
        if event.attr.branch_sample_type & BranchSample.CALL_STACK and state is not None:
            state.users -= 1
        self._users.remove(event)
        if event.no_counter:
            self.vcpu_lbr = False

    @staticmethod
    def _state(event: Event) -> BranchState | None:
        return event.context.branches if event.context is not None and event.cpu < 0 else None

    def reset(self) -> None:
        """`intel_pmu_lbr_reset()`: all entries and LBR_SELECT are zero."""
        for msr in self.layout.msrs():
            if msr != self.layout.tos:
                self._core.pmu_write(msr, 0)
        self._last = None

    # --- Task switches --------------------------------------------------------------------------------------------------------------

    def task_out(self, context: EventContext) -> None:
        """The task leaves: keep its records, if it has an event that wants them kept. Call before its events are taken off."""
        state = context.branches
        if not state.users:
            return
        layout, read = self.layout, self._core.pmu_read
        state.tos = read(layout.tos) & layout.nr - 1
        state.entries = []
        for step in range(layout.nr):
            index = state.tos - step & layout.nr - 1
            if not (source := read(layout.from_ + index)):
                break
            state.entries.append((source, read(layout.to + index), read(layout.info + index) if layout.info else 0))
        state.select = read(LBR_SELECT)
        state.valid = True
        state.log_id += 1
        self._last, self._last_log_id = state, state.log_id

    def task_in(self, context: EventContext) -> None:
        """The task is back, its events are on: give it its records, and nobody else's."""
        if not self._users:
            return
        state = context.branches
        if not state.users or not state.valid:
            self.reset()
        elif not self._unchanged(state):
            self._restore(state)
        state.valid = False

    def _unchanged(self, state: BranchState) -> bool:
        """Whether nobody has used the records of this core since the task left it."""
        same = self._last is state and self._last_log_id == state.log_id
        return same and self._core.pmu_read(self.layout.from_ + state.tos) != 0

    def _restore(self, state: BranchState) -> None:
        layout, write = self.layout, self._core.pmu_write
        blank = (0, 0, 0)
        for step in range(layout.nr):
            index = state.tos - step & layout.nr - 1
            source, target, info = state.entries[step] if step < len(state.entries) else blank
            write(layout.from_ + index, source)
            write(layout.to + index, target)
            if layout.info:
                write(layout.info + index, info)
        write(layout.tos, state.tos)
        write(LBR_SELECT, state.select)

    # --- Samples --------------------------------------------------------------------------------------------------------------------

    def read(self, event: Event) -> list[Branch]:
        """`intel_pmu_lbr_read()` and the software filter: the newest first. Nothing while a guest has the records."""
        if self.vcpu_lbr:
            return []
        layout, read, wanted = self.layout, self._core.pmu_read, event.attr.branch_sample_type
        tos, branches = read(layout.tos) & layout.nr - 1, []
        for step in range(layout.nr):
            index = tos - step & layout.nr - 1
            source, target = read(layout.from_ + index), read(layout.to + index)
            if not source and not target:
                break
            info = read(layout.info + index) if layout.info else 0
            if self._wanted(source, target, wanted):
                branches.append(Branch(source, target, bool(info & _INFO_MISPREDICTED), info & _INFO_CYCLES))
        return branches

    @staticmethod
    def _wanted(source: int, target: int, wanted: BranchSample) -> bool:
        """Silicon filters by the level after the branch; a sample of user code alone has no branch from the kernel either."""
        if wanted & BranchSample.USER and not wanted & BranchSample.KERNEL:
            return not (source | target) & _KERNEL_ADDRESS
        return True
