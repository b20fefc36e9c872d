"""One system call as the entry code sees it: what was asked for, by whom, on which file, and what comes back.

Stands where Linux has `struct pt_regs`. Whoever stops a call (a tracer, a filter's supervisor, a `sys_enter` probe) reads and rewrites
these attributes; the entry code looks at them again afterwards. Numbers are those of x86-64 (`arch/x86/entry/syscalls/syscall_64.tbl`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from ctypes import Structure, addressof
from inspect import signature
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from softkvm.host.audit import Context
    from softkvm.host.process import Process

SYS_READ, SYS_POLL, SYS_MMAP, SYS_IOCTL, SYS_PREAD64 = 0, 7, 9, 16, 17
SYS_NAMES = {SYS_READ: "read", SYS_POLL: "poll", SYS_MMAP: "mmap", SYS_IOCTL: "ioctl", SYS_PREAD64: "pread64"}
SKIPPED = -1
"""`Call.nr` of a call that is not to be made."""

Handler = Callable[..., Any]


class File(Protocol):
    """What is behind a descriptor, as far as the host must know."""

    fd: int
    process: Process

    @property
    def fd_class(self) -> str:
        """`system`, `vm`, `vcpu` or `stats`: what filters and logs call the file."""
        ...

    @property
    def vm_id(self) -> int | None:
        """Number of the VM that the file belongs to."""
        ...

    def syscall_handler(self, nr: int, command: int) -> Handler:
        """The function for a call, which takes the file and the call's arguments; OSError with the errno of an unknown one."""
        ...

    def syscall_name(self, nr: int, command: int) -> str:
        """Its name: `KVM_RUN`, `mmap`; a number for an unknown ioctl."""
        ...

    def killed(self) -> None:
        """The process was killed: whoever uses the file must come out."""
        ...


class Call:
    """A system call in progress. `nr`, `command` (of an ioctl) and `args` may be rewritten until it is made, `result` afterwards."""

    __slots__ = ("_asked", "_handler", "args", "audit", "command", "error", "file", "nr", "result")

    def __init__(self, file: File, nr: int, command: int, args: tuple[Any, ...], handler: Handler) -> None:
        self.file = file
        self.nr = nr
        self.command = command
        self.args = args
        self.result: Any = None
        self.error: BaseException | None = OSError(errno.ENOSYS, "the call was not made")
        self.audit: Context | None = None
        self._asked = (nr, command)
        self._handler = handler

    @property
    def name(self) -> str:
        """Of the ioctl or the system call."""
        return self.file.syscall_name(self.nr, self.command)

    @property
    def handler(self) -> Handler:
        """The function for the number that the call has now; OSError for one that the file does not know."""
        if (self.nr, self.command) == self._asked:
            return self._handler
        return self.file.syscall_handler(self.nr, self.command)

    def make(self) -> None:
        """Do it, unless it is to be skipped; what it raises is kept as its error."""
        if self.nr == SKIPPED:
            return
        try:
            self.result, self.error = self.handler(self.file, *self.args), None
        except BaseException as error:
            self.error = error

    def skip(self, result: Any = None, error: OSError | None = None) -> None:
        """Do not make the call; it returns `result` or raises `error`."""
        self.nr, self.result, self.error = SKIPPED, result, error

    def outcome(self) -> Any:
        """What the caller gets: the result, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.result

    @property
    def ret(self) -> int:
        """The result as Linux returns it: a number, a descriptor, or -errno; EINTR for what is no error of the call (Ctrl-C, a hook's)."""
        if isinstance(self.error, OSError):
            return -(self.error.errno or errno.EIO)
        if self.error is not None:
            return -errno.EINTR
        if isinstance(self.result, int):
            return self.result
        return int(getattr(self.result, "fd", 0))

    @property
    def registers(self) -> tuple[int, ...]:
        """The six arguments as numbers: descriptor, command, then values and addresses of structures."""
        head = (self.file.fd, self.command) if self.nr == SYS_IOCTL else (self.file.fd,)
        return (*head, *(_number(argument) for argument in self.args), 0, 0, 0, 0, 0, 0)[:6]

    def values(self, field: str) -> Iterator[int]:
        """The numbers that `field` names: a parameter of the call, or a member of its structures (of each, where it takes several)."""
        names = list(signature(self.handler).parameters)[1:]
        for name, argument in zip(names, self.args, strict=False):
            if name == field and isinstance(argument, int):
                yield int(argument)
            for structure in argument if isinstance(argument, list | tuple) else (argument,):
                value = getattr(structure, field, None) if isinstance(structure, Structure) else None
                if isinstance(value, int):
                    yield value


def _number(argument: object) -> int:
    if isinstance(argument, int):
        return argument & (1 << 64) - 1
    return addressof(argument) if isinstance(argument, Structure) else 0
