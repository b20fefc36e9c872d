"""Context tracking: whether a task is in user space, in the kernel, in a guest or idle, and for how long it was.

Answers to Linux 6.1 `include/linux/context_tracking_state.h` and `kernel/context_tracking.c`. The state is kept on every crossing that does
entry work; the time per state is counted, and every crossing does entry work, after `enable()`. RCU watches in the kernel only.
"""

from __future__ import annotations

import time

from softkvm.host import static_call
from softkvm.host.noinstr import noinstr
from softkvm.host.task import CONTEXT_GUEST, CONTEXT_KERNEL, CONTEXT_NAMES, CONTEXT_USER, Task, tasks

_now = time.monotonic_ns
_users = 0


def enabled() -> bool:
    """Whether time per context is counted."""
    return _users > 0


def enable() -> None:
    """Count time per context from now on, until as many calls of `disable()`."""
    global _users
    _users += 1
    static_call.update()


def disable() -> None:
    """The opposite of one `enable()`."""
    global _users
    _users -= 1
    static_call.update()


@noinstr
def switch(task: Task, context: int) -> int:
    """The task is in `context` from now on; returns the context that it left."""
    left = task.context
    if _users:
        now = _now()
        if task.context_since:
            task.context_times[left] += now - task.context_since
        task.context_since = now
    else:
        task.context_since = 0
    task.context = context
    return left


@noinstr
def user_exit_irqoff(task: Task) -> None:
    """From user space into the kernel; RCU watches from here."""
    assert task.context == CONTEXT_USER
    switch(task, CONTEXT_KERNEL)


@noinstr
def user_enter_irqoff(task: Task) -> None:
    """From the kernel to user space; RCU may stop watching."""
    switch(task, CONTEXT_USER)


@noinstr
def guest_enter_irqoff(task: Task) -> int:
    """Into the guest; returns the context to come back to."""
    return switch(task, CONTEXT_GUEST)


def times(task: Task) -> dict[str, int]:
    """Nanoseconds in `user`, `kernel`, `guest` and `idle` while context tracking was on, up to the last crossing."""
    return dict(zip(CONTEXT_NAMES, task.context_times, strict=True))


def threads() -> list[tuple[str, dict[str, int]]]:
    """Name and `times()` of each thread of which time was counted."""
    return [(task.comm, times(task)) for task in tasks() if any(task.context_times)]
