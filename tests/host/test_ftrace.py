"""Traces in ftrace's text form."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from softkvm.host import trace
from softkvm.host.ftrace import HEADER, PatternError, Trace, events, select
from softkvm.host.process import Process
from softkvm.host.task import TIF_NEED_RESCHED, Task, current
from tests.host.doubles import File, nothing

# What trace-cmd, Perfetto and every script take apart: task-pid [cpu] flags time: event: fields
LINE = re.compile(
    r"^ *(?P<comm>.+)-(?P<pid>\d+) +\[(?P<cpu>\d{3})\] (?P<flags>[d.][N.][hs.][\d.][\d.]) +"
    r"(?P<time>\d+\.\d{6}): (?P<event>\w+): (?P<fields>.*)$"
)


def test_lines_are_those_of_ftrace() -> None:
    output = io.StringIO()
    with Trace(["sys_*", "kvm_entry"], output):
        file = File()
        file.call(current(), nothing)
        trace.kvm_entry(0, 0xFFF0)
    text = output.getvalue()
    assert text.startswith(HEADER)
    lines = [LINE.match(line) for line in text[len(HEADER) :].splitlines()]
    assert [line["event"] for line in lines if line] == ["sys_enter", "sys_exit", "kvm_entry"]
    assert all(line and int(line["pid"]) == current().tid for line in lines)
    times = [float(line["time"]) for line in lines if line]
    assert times == sorted(times)


def test_the_state_of_the_task_is_told() -> None:
    output = io.StringIO()
    task = current()
    with Trace(["kvm_entry"], output):
        task.irqs_off, task.preempt_count = True, 1
        task.set_flag(TIF_NEED_RESCHED)
        try:
            trace.kvm_entry(0, 0)
        finally:
            task.irqs_off, task.preempt_count = False, 0
            task.clear_flag(TIF_NEED_RESCHED)
    assert " dN.1. " in output.getvalue()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("kvm_exit", {"kvm_exit"}),
        ("kvm_inj_*", {"kvm_inj_virq", "kvm_inj_exception"}),
        ("raw_syscalls", {"sys_enter", "sys_exit"}),
        ("raw_syscalls:*", {"sys_enter", "sys_exit"}),
        ("*", set(trace.registry)),
    ],
)
def test_patterns(pattern: str, names: set[str]) -> None:
    assert {point.name for point in select([pattern])} == names


def test_a_pattern_without_an_event_is_a_sentence() -> None:
    with pytest.raises(PatternError, match="no event matches 'kvm_fly'"):
        select(["kvm_exit", "kvm_fly"])


def test_the_list_has_systems_and_fields() -> None:
    assert ("kvm:kvm_entry", "vcpu_id rip") in events()


def test_one_vmm_can_be_traced_alone() -> None:
    output = io.StringIO()
    mine, other = Process(), Process()
    with Trace(["sys_enter"], output, of=mine):
        for process in (mine, other):
            File(process).call(Task() if process is other else current(), nothing)
    assert output.getvalue().count("sys_enter") == 1


def test_after_the_end_nothing_is_recorded_and_nothing_is_on(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    one = Trace(["sys_enter"], path)
    one.start()
    one.close()
    one.close()
    assert not trace.sys_enter.enabled
    assert path.read_text() == HEADER
