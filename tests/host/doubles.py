"""A file whose calls do what a test says, on a process of its own."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from softkvm.host.call import SYS_IOCTL, SYS_NAMES, Call
from softkvm.host.process import Process
from softkvm.host.task import Task

NAMES = {0xAE80: "KVM_RUN", 0xAE9A: "KVM_NMI"}
RUN, NMI = NAMES


class File:
    """A vCPU file without a vCPU."""

    vm_id = 4

    def __init__(self, process: Process | None = None, fd_class: str = "vcpu") -> None:
        self.process = process if process is not None else Process()
        self.fd_class = fd_class
        self.fd = self.process.install(self)
        self.was_killed = False
        self.handlers: dict[int, Callable[..., Any]] = {}

    def call(self, task: Task, handler: Callable[..., Any], *args: Any, command: int = RUN) -> Any:
        """The ioctl `command`, which `handler` does."""
        return self.process.cross(task, self, SYS_IOCTL, command, args, handler)

    def syscall_handler(self, nr: int, command: int) -> Callable[..., Any]:
        if command not in self.handlers:
            raise OSError(errno.EINVAL, "no such ioctl")
        return self.handlers[command]

    def syscall_name(self, nr: int, command: int) -> str:
        return NAMES.get(command, hex(command)) if nr == SYS_IOCTL else SYS_NAMES[nr]

    def killed(self) -> None:
        self.was_killed = True


def nothing(file: File, *args: Any) -> None:
    """A call that does nothing."""


def a_call(command: int = RUN, args: tuple[Any, ...] = (), fd_class: str = "vcpu") -> Call:
    return Call(File(fd_class=fd_class), SYS_IOCTL, command, args, nothing)
