"""Tasks: the threads that make system calls, with their pending work.

Answers to Linux 6.1 `struct thread_info` (`TIF_*`), `struct task_struct` and `kernel/task_work.c`. A task is a host thread; its flags may
be set by any thread and are read by their owner at the points that `host/entry.py` fixes.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakSet

if TYPE_CHECKING:
    from softkvm.host.call import Call
    from softkvm.host.rseq import Rseq

TIF_NOTIFY_RESUME = 1 << 1
TIF_SIGPENDING = 1 << 2
TIF_NEED_RESCHED = 1 << 3
TIF_USER_RETURN_NOTIFY = 1 << 11
TIF_UPROBE = 1 << 12
TIF_PATCH_PENDING = 1 << 13
TIF_NOTIFY_SIGNAL = 1 << 17

CONTEXT_KERNEL, CONTEXT_IDLE, CONTEXT_USER, CONTEXT_GUEST = range(4)
CONTEXT_NAMES = ("kernel", "idle", "user", "guest")

TaskWork = Callable[[], None]


class Guest(Protocol):
    """What a task runs in KVM_RUN."""

    def notice_flags(self) -> None:
        """The task's flags have changed: leave guest mode or a wait, so that they are seen; called by any thread."""

    def schedule(self) -> None:
        """Give the core to those who have waited longer, if there are any."""


class Task:
    """One thread: `flags` are TIF_* bits; `guest` is the vCPU whose KVM_RUN it is in."""

    __slots__ = (
        "__weakref__",
        "_lock",
        "_return_notifiers",
        "_works",
        "call",
        "comm",
        "context",
        "context_since",
        "context_times",
        "flags",
        "guest",
        "irqs_off",
        "lockdep_irqs_off",
        "preempt_count",
        "rcu_irq_nesting",
        "rseq",
        "run_delay",
        "tid",
    )

    def __init__(self) -> None:
        """The task of the thread that makes it, in user space."""
        self.flags = 0
        self.guest: Guest | None = None
        self.run_delay = 0
        """Nanoseconds that the task has waited for a core (`sched_info.run_delay`)."""
        self.comm = threading.current_thread().name
        self.tid = threading.get_native_id()
        self.call: Call | None = None
        """The system call in progress, if it does entry work."""
        self.rseq: Rseq | None = None
        self.context = CONTEXT_USER
        self.context_since = 0
        self.context_times = [0, 0, 0, 0]
        self.irqs_off = False
        self.lockdep_irqs_off = False
        self.preempt_count = 0
        self.rcu_irq_nesting = 0
        self._lock = threading.Lock()
        self._works: defaultdict[int, deque[TaskWork]] = defaultdict(deque)
        self._return_notifiers: list[Callable[[], None]] = []

    @property
    def rcu_watching(self) -> bool:
        """Whether what the task reads is kept for it: in the kernel, and in an interrupt whatever it interrupted."""
        return self.context == CONTEXT_KERNEL or self.rcu_irq_nesting > 0

    def set_flag(self, flag: int) -> None:
        """Set a TIF_* bit, from any thread, and make the task notice it soon."""
        with self._lock:
            self.flags |= flag
        guest = self.guest
        if guest is not None:
            guest.notice_flags()

    def clear_flag(self, flag: int) -> bool:
        """Clear a TIF_* bit; True if it was set."""
        with self._lock:
            was_set = bool(self.flags & flag)
            self.flags &= ~flag
        return was_set

    def add_work(self, work: TaskWork, flag: int = TIF_NOTIFY_RESUME) -> None:
        """Queue a function that the task itself runs at the point of `flag`; first in, first out.

        NOTIFY_RESUME: before it enters a guest or returns to user space. NOTIFY_SIGNAL: the same queue, and a KVM_RUN in progress ends with
        EINTR so that it runs on return to user space. UPROBE, PATCH_PENDING: on return to user space, never before a guest.
        """
        self._works[TIF_NOTIFY_RESUME if flag == TIF_NOTIFY_SIGNAL else flag].append(work)
        self.set_flag(flag)

    def run_works(self, flag: int = TIF_NOTIFY_RESUME) -> None:
        """Run the functions queued for `flag` (`task_work_run()`); the flag is cleared first, so that none is ever lost."""
        self.clear_flag(flag)
        works = self._works[TIF_NOTIFY_RESUME if flag == TIF_NOTIFY_SIGNAL else flag]
        while works:
            works.popleft()()

    def on_user_return(self, notifier: Callable[[], None]) -> None:
        """Call `notifier` once, as the last thing before the task is in user space again."""
        self._return_notifiers.append(notifier)
        self.set_flag(TIF_USER_RETURN_NOTIFY)

    def fire_user_return(self) -> None:
        """Run and forget the user-return notifiers."""
        self.clear_flag(TIF_USER_RETURN_NOTIFY)
        notifiers, self._return_notifiers = self._return_notifiers, []
        for notifier in notifiers:
            notifier()


class _Current(threading.local):
    def __init__(self) -> None:
        self.task = Task()
        with _lock:
            _tasks.add(self.task)


_tasks: WeakSet[Task] = WeakSet()
_lock = threading.Lock()


_current = _Current()


def current() -> Task:
    """The task of this thread."""
    return _current.task


def tasks() -> list[Task]:
    """The tasks of all threads that have met the kernel and are there still, the oldest first."""
    with _lock:
        return sorted(_tasks, key=lambda task: task.tid)
