"""Restartable sequences: user space learns which core its thread is on, and that it was interrupted in the middle of something.

Answers to Linux 6.1 `kernel/rseq.c` and `include/uapi/linux/rseq.h`. A thread that registers an `Rseq` finds its core in `cpu_id`. While
`abort` is set it is in a critical section: if it is rescheduled or gets a signal there, `abort` is called on its way back, once.
"""

from __future__ import annotations

from collections.abc import Callable

from softkvm.host.task import TIF_NOTIFY_RESUME, Task


class RseqViolation(RuntimeError):
    """A system call inside of a critical section: the kernel sends SIGSEGV."""


class Rseq:
    """What a thread and the kernel share (`struct rseq`)."""

    __slots__ = ("abort", "cpu_id", "events")

    def __init__(self) -> None:
        self.cpu_id = -1
        self.abort: Callable[[], None] | None = None
        self.events = False
        """Rescheduled or signalled since the last return to user space."""


def note_event(task: Task, cpu_id: int | None = None) -> None:
    """The task was put on a core (`cpu_id`), or gets a signal: tell user space on the way back."""
    rseq = task.rseq
    if rseq is not None:
        rseq.events = True
        if cpu_id is not None:
            rseq.cpu_id = cpu_id
        task.set_flag(TIF_NOTIFY_RESUME)


def handle_notify_resume(task: Task) -> None:
    """Abort the critical section that an event has interrupted (`__rseq_handle_notify_resume()`)."""
    rseq = task.rseq
    if rseq is None or not rseq.events:
        return
    rseq.events = False
    abort, rseq.abort = rseq.abort, None
    if abort is not None:
        abort()


def check_syscall(task: Task) -> None:
    """`rseq_syscall()`: no system call belongs in a critical section; RseqViolation."""
    if task.rseq is not None and task.rseq.abort is not None:
        task.rseq.abort = None
        raise RseqViolation("a system call in a restartable sequence")
