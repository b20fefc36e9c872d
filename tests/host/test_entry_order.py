"""The exact order of work on the three crossings (Linux 6.1 `kernel/entry/common.c`): every step writes its name into a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from softkvm.host import context_tracking, entry, ptrace, rseq, trace
from softkvm.host.audit import AuditLog
from softkvm.host.call import Call
from softkvm.host.process import Process
from softkvm.host.seccomp import ALLOW, Filter
from softkvm.host.task import (
    CONTEXT_GUEST,
    CONTEXT_IDLE,
    CONTEXT_KERNEL,
    TIF_NEED_RESCHED,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
    TIF_UPROBE,
    Task,
)
from tests.host.doubles import File

STEPS = {
    entry: (
        "check_user_regs",
        "lockdep_hardirqs_off",
        "trace_hardirqs_off_finish",
        "local_irq_enable",
        "local_irq_disable",
        "secure_computing",
        "schedule",
        "do_signal",
        "resume_user_mode_work",
        "trace_hardirqs_on_prepare",
        "lockdep_hardirqs_on_prepare",
        "lockdep_hardirqs_on",
    ),
    context_tracking: ("user_exit_irqoff", "user_enter_irqoff", "guest_enter_irqoff"),
    rseq: ("check_syscall", "handle_notify_resume"),
    ptrace: ("report_syscall_entry", "report_syscall_exit"),
}

ENTER = ["check_user_regs", "lockdep_hardirqs_off", "user_exit_irqoff", "trace_hardirqs_off_finish"]
LEAVE = ["trace_hardirqs_on_prepare", "lockdep_hardirqs_on_prepare", "user_enter_irqoff", "lockdep_hardirqs_on"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps in the order in which they were taken."""
    order: list[str] = []

    def record(name: str, step: Callable[..., Any], *args: Any) -> Any:
        order.append(name)
        return step(*args)

    for module, names in STEPS.items():
        for name in names:
            monkeypatch.setattr(module, name, partial(record, name, getattr(module, name)))
    return order


class Log(AuditLog):
    def __init__(self, path: Path, order: list[str]) -> None:
        super().__init__(path)
        self.order = order

    def syscall_entry(self, task: Task, call: Call) -> None:
        self.order.append("audit_syscall_entry")
        super().syscall_entry(task, call)

    def syscall_exit(self, call: Call) -> None:
        self.order.append("audit_syscall_exit")
        super().syscall_exit(call)


@pytest.fixture
def watched(log: list[str], tmp_path: Path) -> Iterator[File]:
    """A file with a tracer, a filter and an audit log."""
    with Log(tmp_path / "audit", log) as audit:
        process = Process((Filter((), ALLOW),), audit)
        process.attach(ptrace.Tracer())
        yield File(process)


def pending(task: Task, log: list[str]) -> None:
    """Every kind of exit work."""
    task.set_flag(TIF_NEED_RESCHED)
    task.set_flag(TIF_SIGPENDING)
    task.add_work(lambda: log.append("uprobe"), TIF_UPROBE)
    task.add_work(lambda: log.append("livepatch"), TIF_PATCH_PENDING)
    task.add_work(lambda: log.append("task work"))
    task.on_user_return(lambda: log.append("user return notifier"))


LOOP = [
    "local_irq_enable",
    "schedule",
    "uprobe",
    "livepatch",
    "do_signal",
    "resume_user_mode_work",
    "task work",
    "handle_notify_resume",
    "local_irq_disable",
]


def test_a_system_call_with_everything_on(log: list[str], watched: File) -> None:
    task = Task()
    enter, leave = (lambda *_: log.append("sys_enter")), (lambda *_: log.append("sys_exit"))
    trace.sys_enter.register(enter)
    trace.sys_exit.register(leave)

    def handler(it: File) -> None:
        log.append("the call")
        assert task.rcu_watching
        assert not task.irqs_off
        pending(task, log)

    try:
        watched.call(task, handler)
    finally:
        trace.sys_enter.unregister(enter)
        trace.sys_exit.unregister(leave)
    assert log == [
        *ENTER,
        "local_irq_enable",
        "report_syscall_entry",
        "secure_computing",
        "sys_enter",
        "audit_syscall_entry",
        "the call",
        "check_syscall",
        "audit_syscall_exit",
        "sys_exit",
        "report_syscall_exit",
        "local_irq_disable",
        *LOOP,
        "user return notifier",
        *LEAVE,
    ]


def test_a_quiet_system_call_still_crosses_in_order(log: list[str]) -> None:
    file = File()
    context_tracking.enable()
    try:
        file.call(Task(), lambda it: log.append("the call"))
    finally:
        context_tracking.disable()
    assert log == [*ENTER, "local_irq_enable", "the call", "check_syscall", "local_irq_disable", *LEAVE]


def test_the_notifiers_fire_once_however_often_the_loop_runs(log: list[str], watched: File) -> None:
    task = Task()

    def again() -> None:
        log.append("work 1")
        task.add_work(lambda: log.append("work 2"), TIF_UPROBE)

    def handler(it: File) -> None:
        task.add_work(again)
        task.on_user_return(lambda: log.append("user return notifier"))

    watched.call(task, handler)
    done = [step for step in log if step in ("work 1", "work 2", "user return notifier")]
    assert done == ["work 1", "work 2", "user return notifier"]
    assert log[-5:] == ["user return notifier", *LEAVE]


def test_an_interrupt_out_of_user_space(log: list[str]) -> None:
    task = Task()
    pending(task, log)
    state = entry.irqentry_enter(task)
    log.append("the interrupt")
    entry.irqentry_exit(task, state)
    assert log == [*ENTER, "the interrupt", *LOOP, "user return notifier", *LEAVE]


@pytest.mark.parametrize(
    ("context", "irqs_off", "leave"),
    [
        (CONTEXT_KERNEL, False, ["schedule", "local_irq_enable"]),
        (CONTEXT_KERNEL, True, []),
        (CONTEXT_IDLE, False, ["trace_hardirqs_on_prepare", "lockdep_hardirqs_on_prepare", "lockdep_hardirqs_on"]),
        (CONTEXT_IDLE, True, []),
    ],
)
def test_an_interrupt_out_of_the_kernel(log: list[str], context: int, irqs_off: bool, leave: list[str]) -> None:
    task = Task()
    task.context, task.irqs_off, task.lockdep_irqs_off = context, irqs_off, irqs_off
    task.set_flag(TIF_NEED_RESCHED)
    state = entry.irqentry_enter(task)
    log.append("the interrupt")
    entry.irqentry_exit(task, state)
    assert log == ["lockdep_hardirqs_off", "trace_hardirqs_off_finish", "the interrupt", *leave]
    assert (task.context, task.irqs_off) == (context, irqs_off)


def test_guest_mode(log: list[str]) -> None:
    task = Task()
    task.context, task.irqs_off, task.lockdep_irqs_off = CONTEXT_KERNEL, True, True

    def guest() -> int:
        log.append("the guest")
        assert (task.context, task.irqs_off, task.rcu_watching) == (CONTEXT_GUEST, False, False)
        return 12

    assert entry.run_guest(task, guest) == 12
    assert log == [
        "trace_hardirqs_on_prepare",
        "lockdep_hardirqs_on_prepare",
        "guest_enter_irqoff",
        "lockdep_hardirqs_on",
        "the guest",
        "lockdep_hardirqs_off",
        "trace_hardirqs_off_finish",
    ]
    assert (task.context, task.irqs_off) == (CONTEXT_KERNEL, True)


def test_the_transfer_to_guest_mode(log: list[str]) -> None:
    task = Task()
    task.set_flag(TIF_NEED_RESCHED)
    task.add_work(lambda: log.append("task work"))

    class Guest:
        def handle_signal_exit(self) -> None:
            log.append("signal exit")

    assert entry.xfer_to_guest_mode(task, Guest()) == 0
    assert log == ["schedule", "resume_user_mode_work", "task work", "handle_notify_resume"]
    log.clear()
    pending(task, log)
    assert entry.xfer_to_guest_mode(task, Guest()) < 0
    assert log == ["signal exit"]
