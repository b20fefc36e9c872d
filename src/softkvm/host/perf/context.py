"""Contexts: the events of a CPU, and those of a task, which come and go with it.

Answers to Linux 6.1 `struct perf_event_context` and `struct x86_perf_task_context`. The scheduler's unit here is the guest, not the thread
(a guest keeps its core while its thread is elsewhere, and one thread may run several), so a task's context is its guest's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.event import Event

if TYPE_CHECKING:
    from softkvm.host.perf.core import CpuPerf


class BranchState:
    """`struct x86_perf_task_context`: the branch stack of a task that is on no CPU."""

    __slots__ = ("entries", "log_id", "select", "tos", "users", "valid")

    def __init__(self) -> None:
        self.users = 0
        """Events of the task on whose behalf the stack is kept across switches (`lbr_callstack_users`)."""
        self.valid = False
        self.entries: list[tuple[int, int, int]] = []
        """FROM, TO and INFO, the newest first."""
        self.tos = 0
        self.select = 0
        self.log_id = 0


class EventContext:
    """Events that are scheduled together: those that must be on at any time they can, and those that take turns."""

    __slots__ = ("branches", "cpu", "flexible", "pinned")

    def __init__(self) -> None:
        self.pinned: list[Event] = []
        self.flexible: list[Event] = []
        """The leaders of groups; an event without a group leads one of itself."""
        self.cpu: CpuPerf | None = None
        """Where the context is scheduled; for a task's, the CPU that the task is on."""
        self.branches = BranchState()

    def events(self, pinned: bool) -> list[Event]:
        """The events of one kind."""
        return self.pinned if pinned else self.flexible
