"""Every crossing between user space, the kernel and the guest.

Answers to "entry, x86, kvm: Generic entry/exit functionality" (Gleixner, 2020) in its merged form: Linux 6.1 `kernel/entry/{common,kvm}.c`.
System calls are the ioctls; the order of the steps is the order there. Whoever wants to see, filter or delay a crossing hooks in here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from softkvm.host import trace
from softkvm.host.task import TIF_NEED_RESCHED, TIF_NOTIFY_RESUME, TIF_SIGPENDING, TIF_USER_RETURN_NOTIFY, Task

EXIT_TO_USER_MODE_WORK = TIF_NEED_RESCHED | TIF_SIGPENDING | TIF_NOTIFY_RESUME
XFER_TO_GUEST_MODE_WORK = TIF_NEED_RESCHED | TIF_SIGPENDING | TIF_NOTIFY_RESUME
"""Flags that must be handled before a guest runs; checked with `task.flags & XFER_TO_GUEST_MODE_WORK`."""

_Result = TypeVar("_Result")


class GuestContext(Protocol):
    """What a transfer to guest mode needs of the vCPU."""

    def handle_signal_exit(self) -> None:
        """Report `KVM_EXIT_INTR` and count it (`kvm_handle_signal_exit()`)."""


def syscall(task: Task, nr: int, args: tuple[Any, ...], handler: Callable[..., _Result]) -> _Result:
    """Run `handler(*args)` as the system call `nr` of `task`: enter work, the call, exit work, each exactly once."""
    if trace.sys_enter.enabled:
        trace.sys_enter(nr, args)
    try:
        result = handler(*args)
    except BaseException as error:
        _syscall_exit(task, nr, _errno_of(error))
        raise
    if task.flags or trace.sys_exit.enabled:
        _syscall_exit(task, nr, result)
    return result


def _errno_of(error: BaseException) -> int:
    """What the call returns: EINTR for what is no error of the call (Ctrl-C, or an exception of somebody's hook)."""
    return -(error.errno or errno.EIO) if isinstance(error, OSError) else -errno.EINTR


def _syscall_exit(task: Task, nr: int, ret: object) -> None:
    """`syscall_exit_to_user_mode()`: one-time work, the loop, and the user-return notifiers last."""
    if trace.sys_exit.enabled:
        trace.sys_exit(nr, ret)
    while task.flags & EXIT_TO_USER_MODE_WORK:
        flags = task.flags
        task.clear_flag(flags & TIF_SIGPENDING)  # its handler is whatever the caller does next
        _reschedule_or_resume(task, flags)
    if task.flags & TIF_USER_RETURN_NOTIFY:
        task.fire_user_return()


def xfer_to_guest_mode(task: Task, vcpu: GuestContext) -> int:
    """`xfer_to_guest_mode_handle_work()`: handle what is pending; 0 to enter the guest, -EINTR for a signal (which comes first)."""
    while flags := task.flags & XFER_TO_GUEST_MODE_WORK:
        if flags & TIF_SIGPENDING:
            vcpu.handle_signal_exit()
            return -errno.EINTR
        _reschedule_or_resume(task, flags)
    return 0


def _reschedule_or_resume(task: Task, flags: int) -> None:
    """Handle the snapshot `flags` in the kernel's order: reschedule, then notify-resume work."""
    if flags & TIF_NEED_RESCHED:
        task.clear_flag(TIF_NEED_RESCHED)
    if flags & TIF_NOTIFY_RESUME:
        task.run_works()
