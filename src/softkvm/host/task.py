"""Tasks: the threads that make system calls, with their pending work.

Answers to Linux 6.1 `struct thread_info` (`TIF_*`), `struct task_struct` and `kernel/task_work.c`. A task is a host thread; its flags may
be set by any thread and are read by their owner at the points that `host/entry.py` fixes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

TIF_NOTIFY_RESUME = 1 << 1
TIF_SIGPENDING = 1 << 2
TIF_NEED_RESCHED = 1 << 3
TIF_USER_RETURN_NOTIFY = 1 << 11

TaskWork = Callable[[], None]


class Task:
    """One thread: `flags` are TIF_* bits; `kick`, when set, makes its guest leave so that the flags are seen."""

    __slots__ = ("_lock", "_return_notifiers", "_works", "flags", "kick")

    def __init__(self) -> None:
        self.flags = 0
        self.kick: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._works: deque[TaskWork] = deque()
        self._return_notifiers: list[Callable[[], None]] = []

    def set_flag(self, flag: int) -> None:
        """Set a TIF_* bit, from any thread, and make the task notice it soon."""
        with self._lock:
            self.flags |= flag
        kick = self.kick
        if kick is not None:
            kick()

    def clear_flag(self, flag: int) -> bool:
        """Clear a TIF_* bit; True if it was set."""
        with self._lock:
            was_set = bool(self.flags & flag)
            self.flags &= ~flag
        return was_set

    def add_work(self, work: TaskWork) -> None:
        """Queue a function that the task itself runs before it enters a guest or returns to user space; first in, first out."""
        self._works.append(work)
        self.set_flag(TIF_NOTIFY_RESUME)

    def run_works(self) -> None:
        """Run the queued functions (`resume_user_mode_work()`); the flag is cleared first, so that none is ever lost."""
        self.clear_flag(TIF_NOTIFY_RESUME)
        while self._works:
            self._works.popleft()()

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


_current = _Current()


def current() -> Task:
    """The task of this thread."""
    return _current.task
