"""Restartable sequences: aborted once when disturbed, never entered by a system call."""

from __future__ import annotations

import pytest

from softkvm.host import context_tracking, rseq
from softkvm.host.task import TIF_SIGPENDING, Task
from tests.host.doubles import File, nothing


def test_a_signal_aborts_a_critical_section_once() -> None:
    task, aborts = Task(), list[int]()
    task.rseq = rseq.Rseq()
    task.rseq.abort = lambda: aborts.append(1)
    task.set_flag(TIF_SIGPENDING)
    File().call(task, nothing)
    File().call(task, nothing)
    assert aborts == [1]
    assert task.flags == 0


def test_a_new_core_is_told() -> None:
    task = Task()
    task.rseq = rseq.Rseq()
    rseq.note_event(task, cpu_id=3)
    assert task.rseq.cpu_id == 3
    File().call(task, nothing)
    assert not task.rseq.events


def test_a_system_call_in_a_critical_section_is_a_violation() -> None:
    task = Task()
    task.rseq = rseq.Rseq()
    task.rseq.abort = lambda: None
    file = File()
    context_tracking.enable()
    try:
        with pytest.raises(rseq.RseqViolation):
            file.call(task, nothing)
    finally:
        context_tracking.disable()
    assert (task.context, task.irqs_off) == (2, False)


def test_whoever_has_no_sequence_pays_nothing() -> None:
    task = Task()
    rseq.note_event(task)
    assert task.flags == 0
