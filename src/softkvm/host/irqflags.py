"""A task's interrupt flag, and lockdep's opinion of it.

Answers to Linux 6.1 `include/linux/irqflags.h` and `kernel/locking/lockdep.c` (`lockdep_hardirqs_{on,off}()`). With interrupts off a task
takes none of the host's (timers, kicks that run a handler). Lockdep keeps its own account, which the entry code switches at other moments
than the flag itself, and complains when the two are not paired.
"""

from __future__ import annotations

from softkvm.host.noinstr import noinstr
from softkvm.host.task import Task


class LockdepError(AssertionError):
    """The entry code is wrong: interrupt state and lockdep's account of it have come apart."""


def local_irq_enable(task: Task) -> None:
    """Take interrupts from now on."""
    trace_hardirqs_on(task)
    task.irqs_off = False


def local_irq_disable(task: Task) -> None:
    """Take no interrupts."""
    task.irqs_off = True
    trace_hardirqs_off(task)


def trace_hardirqs_on(task: Task) -> None:
    """The flag is about to be set: lockdep and tracing learn it."""
    if not task.irqs_off:
        raise LockdepError("interrupts are on already")
    task.lockdep_irqs_off = False


def trace_hardirqs_off(task: Task) -> None:
    """The flag was cleared."""
    if not task.irqs_off:
        raise LockdepError("interrupts are on where they must be off")
    task.lockdep_irqs_off = True


def trace_hardirqs_off_finish(task: Task) -> None:
    """RCU watches again after a crossing with interrupts off: tracing may learn that they are."""
    if not task.lockdep_irqs_off:
        raise LockdepError("lockdep was not told that interrupts are off")


def trace_hardirqs_on_prepare(task: Task) -> None:
    """The crossing back will set the flag: the last moment to trace that."""
    if not task.irqs_off:
        raise LockdepError("interrupts are on where they must be off")


def lockdep_hardirqs_on_prepare(task: Task) -> None:
    """The crossing back will set the flag: lockdep's check, as long as RCU watches."""
    if not task.lockdep_irqs_off:
        raise LockdepError("lockdep believes interrupts are on already")


@noinstr
def lockdep_hardirqs_off(task: Task) -> None:
    """The crossing has cleared the flag."""
    task.irqs_off = True
    task.lockdep_irqs_off = True


@noinstr
def lockdep_hardirqs_on(task: Task) -> None:
    """The crossing back sets the flag."""
    task.lockdep_irqs_off = False
    task.irqs_off = False
