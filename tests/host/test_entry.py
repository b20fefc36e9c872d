"""The order of work at crossings: kvm-core reference 2.3 and 2.5 (`kernel/entry/common.c`, `kernel/entry/kvm.c`)."""

from __future__ import annotations

import errno

import pytest

from softkvm.host import entry, trace
from softkvm.host.task import TIF_NEED_RESCHED, TIF_NOTIFY_RESUME, TIF_SIGPENDING, Task


class Guest:
    def __init__(self) -> None:
        self.signal_exits = 0

    def handle_signal_exit(self) -> None:
        self.signal_exits += 1


def test_a_signal_comes_before_all_other_work() -> None:
    task, guest, done = Task(), Guest(), []
    task.add_work(lambda: done.append("work"))
    task.set_flag(TIF_NEED_RESCHED)
    task.set_flag(TIF_SIGPENDING)
    assert entry.xfer_to_guest_mode(task, guest) == -errno.EINTR
    assert guest.signal_exits == 1
    assert done == []
    assert task.flags & (TIF_NEED_RESCHED | TIF_NOTIFY_RESUME)


def test_transfer_runs_work_until_nothing_is_pending() -> None:
    task, done = Task(), []

    def first() -> None:
        done.append(1)
        task.add_work(lambda: done.append(2))

    task.add_work(first)
    task.set_flag(TIF_NEED_RESCHED)
    assert entry.xfer_to_guest_mode(task, Guest()) == 0
    assert done == [1, 2]
    assert not task.flags & entry.XFER_TO_GUEST_MODE_WORK


def test_syscall_fires_user_return_notifiers_once_and_last() -> None:
    task, order = Task(), []

    def handler() -> str:
        task.on_user_return(lambda: order.append("user return"))
        task.add_work(lambda: order.append("work"))
        order.append("call")
        return "result"

    assert entry.syscall(task, 1, (), handler) == "result"
    assert order == ["call", "work", "user return"]
    entry.syscall(task, 1, (), lambda: None)
    assert order == ["call", "work", "user return"]


def test_a_signal_is_delivered_when_the_call_returns() -> None:
    task = Task()
    task.set_flag(TIF_SIGPENDING)
    entry.syscall(task, 1, (), lambda: None)
    assert not task.flags


def test_exit_work_runs_and_is_traced_when_the_call_fails() -> None:
    task, returns, done = Task(), [], []
    probe = lambda nr, ret: returns.append((nr, ret))  # noqa: E731
    trace.sys_exit.register(probe)

    def handler() -> None:
        task.add_work(lambda: done.append(1))
        raise OSError(errno.EBUSY, "busy")

    try:
        with pytest.raises(OSError, match="busy"):
            entry.syscall(task, 7, (), handler)
    finally:
        trace.sys_exit.unregister(probe)
    assert returns == [(7, -errno.EBUSY)]
    assert done == [1]


def test_exit_work_runs_when_ctrl_c_ends_the_call() -> None:
    task, done = Task(), []

    def handler() -> None:
        task.on_user_return(lambda: done.append(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry.syscall(task, 1, (), handler)
    assert done == [1]
