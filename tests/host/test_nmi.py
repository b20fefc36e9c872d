"""NMIs of the host: entered anywhere, left as it was (Linux 6.1 `irqentry_nmi_{enter,exit}()`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import product

import pytest

from softkvm.host import entry, nmi
from softkvm.host.task import CONTEXT_GUEST, CONTEXT_IDLE, CONTEXT_KERNEL, CONTEXT_USER, TIF_NEED_RESCHED, Task


@pytest.fixture
def hits() -> Iterator[list[Task]]:
    """Tasks whose NMI came to a handler, which asserts what holds inside."""
    seen: list[Task] = []

    def handler() -> bool:
        task = current[0]
        assert nmi.in_nmi(task)
        assert task.irqs_off
        assert task.lockdep_irqs_off
        assert task.rcu_watching
        seen.append(task)
        return True

    nmi.register_nmi_handler(handler)
    yield seen
    nmi.unregister_nmi_handler(handler)


current: list[Task] = [Task()]


def snapshot(task: Task) -> tuple[object, ...]:
    return task.context, task.irqs_off, task.lockdep_irqs_off, task.preempt_count, task.rcu_irq_nesting, task.flags


@pytest.mark.parametrize(
    ("context", "irqs_off", "lockdep_off"),
    list(product((CONTEXT_USER, CONTEXT_KERNEL, CONTEXT_IDLE, CONTEXT_GUEST), (False, True), (False, True))),
)
def test_the_task_is_left_as_it_was(hits: list[Task], context: int, irqs_off: bool, lockdep_off: bool) -> None:
    """Flag and lockdep's account differ in the middle of a crossing, which is where an ordinary interrupt could not come."""
    task = current[0] = Task()
    task.context, task.irqs_off, task.lockdep_irqs_off = context, irqs_off, lockdep_off
    task.set_flag(TIF_NEED_RESCHED)
    before = snapshot(task)
    nmi.do_nmi(task)
    assert hits == [task]
    assert snapshot(task) == before


def test_an_nmi_in_an_interrupt_in_the_idle_task(hits: list[Task]) -> None:
    task = current[0] = Task()
    task.context = CONTEXT_IDLE
    state = entry.irqentry_enter(task)
    before = snapshot(task)
    nmi.do_nmi(task)
    assert snapshot(task) == before
    entry.irqentry_exit(task, state)
    assert task.rcu_irq_nesting == 0
    assert hits == [task]


def test_all_handlers_are_asked_and_what_one_raises_leaves_nothing_behind(hits: list[Task]) -> None:
    def broken() -> bool:
        raise RuntimeError("a handler's mistake")

    task = current[0] = Task()
    before = snapshot(task)
    nmi.register_nmi_handler(broken)
    try:
        with pytest.raises(RuntimeError, match="mistake"):
            nmi.do_nmi(task)
    finally:
        nmi.unregister_nmi_handler(broken)
    assert hits == [task]
    assert snapshot(task) == before


def test_an_nmi_that_nobody_knows_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nmi._unknown_nmi.cache_clear()
    with caplog.at_level(logging.WARNING):
        nmi.do_nmi(Task())
        nmi.do_nmi(Task())
    assert len(caplog.records) == 1
