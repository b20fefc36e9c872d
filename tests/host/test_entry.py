"""What is done at crossings, watched or not (Linux 6.1 `kernel/entry/{common,kvm}.c`). Its order is in test_entry_order.py."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from softkvm.host import context_tracking, entry, trace
from softkvm.host.call import SYS_IOCTL
from softkvm.host.process import Process
from softkvm.host.task import (
    TIF_NEED_RESCHED,
    TIF_NOTIFY_RESUME,
    TIF_NOTIFY_SIGNAL,
    TIF_PATCH_PENDING,
    TIF_SIGPENDING,
    TIF_UPROBE,
    Task,
)
from tests.host.doubles import File, nothing


class Guest:
    """A vCPU that tells what is asked of it."""

    def __init__(self, schedule: Callable[[], object] = lambda: None) -> None:
        self.signal_exits = 0
        self.on_schedule = schedule

    def notice_flags(self) -> None: ...

    def schedule(self) -> None:
        self.on_schedule()

    def handle_signal_exit(self) -> None:
        self.signal_exits += 1


@pytest.fixture(params=["bare", "watched"])
def file(request: pytest.FixtureRequest) -> Iterator[File]:
    """Results must not depend on whether anybody watches."""
    process = Process()
    if request.param == "bare":
        assert process.cross is entry.syscall_bare
        yield File(process)
    else:
        context_tracking.enable()
        assert process.cross is entry.syscall
        yield File(process)
        context_tracking.disable()
        assert process.cross is entry.syscall_bare


def test_a_call_takes_its_arguments_and_gives_its_result(file: File) -> None:
    assert file.call(Task(), lambda it, a, b: (it, a + b), 2, 3) == (file, 5)


def test_an_error_comes_out_as_it_is(file: File) -> None:
    def fail(it: File) -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OSError, match="busy"):
        file.call(Task(), fail)


def test_user_return_notifiers_fire_once_and_last(file: File) -> None:
    task = Task()
    order: list[str] = []

    def handler(it: File) -> None:
        task.on_user_return(lambda: order.append("user return"))
        task.add_work(lambda: order.append("work"))
        order.append("call")

    file.call(task, handler)
    assert order == ["call", "work", "user return"]
    file.call(task, nothing)
    assert order == ["call", "work", "user return"]


def test_a_signal_is_delivered_when_the_call_returns(file: File) -> None:
    task = Task()
    task.set_flag(TIF_SIGPENDING)
    file.call(task, nothing)
    assert not task.flags


@pytest.mark.parametrize("flag", [TIF_NOTIFY_RESUME, TIF_NOTIFY_SIGNAL, TIF_UPROBE, TIF_PATCH_PENDING])
def test_work_queued_meanwhile_is_done_before_user_space(file: File, flag: int) -> None:
    task = Task()
    done: list[int] = []

    def again() -> None:
        done.append(1)
        task.add_work(lambda: done.append(2), flag)

    file.call(task, lambda it: task.add_work(again, flag))
    assert done == [1, 2]
    assert not task.flags


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt(), RuntimeError("a hook's")])
def test_exit_work_runs_however_the_call_ends(file: File, error: BaseException) -> None:
    task = Task()
    done: list[int] = []

    def handler(it: File) -> None:
        task.on_user_return(lambda: done.append(1))
        raise error

    with pytest.raises(type(error)):
        file.call(task, handler)
    assert done == [1]
    assert (task.irqs_off, task.lockdep_irqs_off, task.call) == (False, False, None)


def test_a_call_inside_of_kvm_run_leaves_the_signal_for_it(file: File) -> None:
    """A probe that reads the vCPU's registers in the middle of KVM_RUN must not eat the kick that is to end it."""
    task = Task()
    task.guest = Guest()
    task.set_flag(TIF_SIGPENDING)
    file.call(task, nothing)
    assert task.flags == TIF_SIGPENDING


def test_a_call_inside_of_a_watched_call_crosses_nothing() -> None:
    task, process = Task(), Process()
    process.cross = entry.syscall
    file = File(process)
    seen: list[str] = []

    def outer(it: File) -> None:
        task.set_flag(TIF_SIGPENDING)
        file.call(task, lambda inner: seen.append("inner"))
        assert task.flags == TIF_SIGPENDING

    file.call(task, outer)
    assert seen == ["inner"]


def test_sys_exit_tells_the_errno() -> None:
    returns: list[tuple[int, int]] = []

    def probe(nr: int, ret: int) -> None:
        returns.append((nr, ret))

    def handler(it: File) -> None:
        raise OSError(errno.EBUSY, "busy")

    file = File()
    trace.sys_exit.register(probe)
    try:
        with pytest.raises(OSError, match="busy"):
            file.call(Task(), handler)
        file.call(Task(), lambda it: 12)
        file.call(Task(), lambda it: file)
    finally:
        trace.sys_exit.unregister(probe)
    assert returns == [(SYS_IOCTL, -errno.EBUSY), (SYS_IOCTL, 12), (SYS_IOCTL, file.fd)]


# --- Before the guest --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [TIF_SIGPENDING, TIF_NOTIFY_SIGNAL])
def test_a_signal_comes_before_all_other_work(flag: int) -> None:
    task, guest = Task(), Guest()
    done: list[str] = []
    task.add_work(lambda: done.append("work"))
    task.set_flag(TIF_NEED_RESCHED)
    task.set_flag(flag)
    assert entry.xfer_to_guest_mode(task, guest) == -errno.EINTR
    assert guest.signal_exits == 1
    assert done == []
    assert task.flags == flag | TIF_NEED_RESCHED | TIF_NOTIFY_RESUME


def test_transfer_does_work_until_nothing_is_pending() -> None:
    task = Task()
    done: list[object] = []

    def first() -> None:
        done.append(1)
        task.set_flag(TIF_NEED_RESCHED)
        task.add_work(lambda: done.append(2))

    task.guest = Guest(lambda: done.append("schedule"))
    task.add_work(first)
    task.set_flag(TIF_NEED_RESCHED)
    assert entry.xfer_to_guest_mode(task, Guest()) == 0
    assert done == ["schedule", 1, 2, "schedule"] or done == ["schedule", 1, "schedule", 2]
    assert not task.flags & entry.XFER_TO_GUEST_MODE_WORK


@pytest.mark.parametrize("flag", [TIF_UPROBE, TIF_PATCH_PENDING])
def test_what_waits_for_user_space_does_not_hold_up_the_guest(flag: int) -> None:
    """Live patching was left out of the transfer to guest mode on purpose."""
    task = Task()
    done: list[int] = []
    task.add_work(lambda: done.append(1), flag)
    assert entry.xfer_to_guest_mode(task, Guest()) == 0
    assert done == []


# --- Interrupts --------------------------------------------------------------------------------------------------------------------


def interrupted(task: Task, preempt: Callable[[], None] = lambda: None) -> None:
    state = entry.irqentry_enter(task)
    assert task.irqs_off
    assert task.rcu_watching
    preempt()
    entry.irqentry_exit(task, state)


def test_an_interrupt_preempts_the_kernel_only_with_interrupts_on_and_preempt_count_0() -> None:
    scheduled: list[str] = []
    for name, irqs_off, count in (("preempted", False, 0), ("irqs off", True, 0), ("preemption off", False, 1)):
        task = Task()
        task.context = 0
        task.irqs_off = task.lockdep_irqs_off = irqs_off
        task.preempt_count = count
        task.guest = Guest(partial(scheduled.append, name))
        interrupted(task, lambda task=task: task.set_flag(TIF_NEED_RESCHED))  # type: ignore[misc]
        assert task.irqs_off is irqs_off
    assert scheduled == ["preempted"]


def test_an_interrupt_never_preempts_the_idle_task() -> None:
    task = Task()
    task.context = 1
    task.set_flag(TIF_NEED_RESCHED)
    interrupted(task)
    assert task.flags == TIF_NEED_RESCHED
    assert (task.rcu_watching, task.irqs_off, task.rcu_irq_nesting) == (False, False, 0)


def test_an_interrupt_out_of_user_space_does_the_exit_work_but_not_the_one_time_work() -> None:
    task = Task()
    done: list[str] = []
    task.add_work(lambda: done.append("work"))
    task.on_user_return(lambda: done.append("user return"))
    interrupted(task)
    assert done == ["work", "user return"]
    assert (task.context, task.irqs_off, task.flags) == (2, False, 0)
