"""Non-maskable interrupts of the host, such as the overflow of a performance counter while a guest ran: entry, handlers, exit.

Answers to Linux 6.1 `irqentry_nmi_{enter,exit}()` in `kernel/entry/common.c`, `nmi_{enter,exit}()` in `include/linux/hardirq.h` and
`arch/x86/kernel/nmi.c`. An NMI may come between any two steps of a task, with its interrupt flag on or off and in any context: its entry
believes nothing, tells RCU unconditionally, and the exit restores what was there; no work is done and nobody is rescheduled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from softkvm.host.irqflags import (
    lockdep_hardirqs_off,
    lockdep_hardirqs_on,
    lockdep_hardirqs_on_prepare,
    trace_hardirqs_off_finish,
    trace_hardirqs_on_prepare,
)
from softkvm.host.noinstr import instrumentation, noinstr
from softkvm.host.task import Task

NMI_OFFSET = 1 << 20
"""What one NMI adds to the preempt count."""
NMI_MASK = 0xF << 20

Handler = Callable[[], bool]
"""Handles an NMI; whether it was the handler's own."""

_log = logging.getLogger(__name__)
_handlers: tuple[Handler, ...] = ()


def register_nmi_handler(handler: Handler) -> None:
    """Ask `handler` about every NMI from now on."""
    global _handlers
    _handlers = (*_handlers, handler)


def unregister_nmi_handler(handler: Handler) -> None:
    """The opposite; harmless for one that is not registered."""
    global _handlers
    _handlers = tuple(other for other in _handlers if other != handler)


def in_nmi(task: Task) -> bool:
    """Whether the task is in an NMI: where nothing may wait for a lock."""
    return bool(task.preempt_count & NMI_MASK)


@noinstr
def do_nmi(task: Task) -> None:
    """`exc_nmi()`: an NMI has arrived at the core under `task`."""
    lockdep_was_on, irqs_were_off = not task.lockdep_irqs_off, task.irqs_off
    irqentry_nmi_enter(task)
    try:
        with instrumentation():
            default_do_nmi()
    finally:
        irqentry_nmi_exit(task, lockdep_was_on, irqs_were_off)


@noinstr
def irqentry_nmi_enter(task: Task) -> None:
    """It begins: preemption is off, lockdep hears of the flag, RCU watches, and only then tracing is allowed."""
    task.preempt_count += NMI_OFFSET
    lockdep_hardirqs_off(task)
    task.rcu_irq_nesting += 1
    with instrumentation():
        trace_hardirqs_off_finish(task)


@noinstr
def irqentry_nmi_exit(task: Task, lockdep_was_on: bool, irqs_were_off: bool) -> None:
    """It ends, in the opposite order; lockdep's account and the flag go back to where each was."""
    if lockdep_was_on:
        with instrumentation():
            trace_hardirqs_on_prepare(task)
            lockdep_hardirqs_on_prepare(task)
    task.rcu_irq_nesting -= 1
    if lockdep_was_on:
        lockdep_hardirqs_on(task)
    task.irqs_off = irqs_were_off
    task.preempt_count -= NMI_OFFSET


def default_do_nmi() -> None:
    """Ask all handlers, as one NMI may stand for several causes."""
    if not sum([handler() for handler in _handlers]):
        _unknown_nmi()


@cache
def _unknown_nmi() -> None:
    _log.warning("an NMI that nobody knows the cause of")
