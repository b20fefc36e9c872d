"""The audit log: one JSON line for each system call, with who made it, its arguments and its result.

Answers to Linux 6.1 `kernel/auditsc.c`: a context is made when the call enters and becomes a line when it leaves, both or none. Calls that
a filter stopped never enter, they leave a line of their own (`"action"`), as seccomp's audit records do.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable
from ctypes import Structure
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from softkvm.host import audit_data
from softkvm.host.call import SYS_NAMES, Call
from softkvm.host.task import Task

_MOST_ARGUMENTS = 4


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line."""

    seq: int
    """Counts the log's lines in the order in which their calls entered, from 1."""
    time: float
    """Seconds since 1970 when the call entered."""
    tid: int
    comm: str
    """Name of the thread."""
    fd: int
    file: str
    """`system`, `vm` or `vcpu`."""
    syscall: str
    call: str
    """Name of the ioctl, or of the system call."""
    args: list[int | str | None]
    """The first four arguments: numbers, and the types of structures."""
    vm: int | None = None
    data: list[Any] | None = None
    """The arguments whole (`host/audit_data.py`), where `args` has only their types."""
    digest: str | None = None
    """SHA-256 of the structures that went in, one behind the other; absent without any."""
    result: int | None = None
    """What Linux would return; absent for a call that a filter stopped."""
    action: str | None = None
    """What a filter decided, if it was not to allow."""


class Context(msgspec.Struct):
    """A call that has entered and not left."""

    record: Record


class AuditLog:
    """Writes records to a file; a context manager that closes it. Safe for use by several threads and by several VMMs."""

    def __init__(self, path: str | Path) -> None:
        """Append to the file `path`; OSError if it cannot be opened."""
        self._file: BinaryIO = Path(path).open("ab")  # noqa: SIM115 - closed by close()
        self._lock = threading.Lock()
        self._sequence = 0

    def syscall_entry(self, task: Task, call: Call) -> None:
        """`audit_syscall_entry()`: begin the call's context."""
        call.audit = Context(self._describe(task, call))

    def syscall_exit(self, call: Call) -> None:
        """`audit_syscall_exit()`: write the context, if the call has one."""
        context, call.audit = call.audit, None
        if context is not None:
            self._write(msgspec.structs.replace(context.record, result=call.ret))

    def seccomp(self, task: Task, call: Call, action: str) -> None:
        """`audit_seccomp()`: a filter did not simply allow the call."""
        self._write(msgspec.structs.replace(self._describe(task, call), action=action))

    def _describe(self, task: Task, call: Call) -> Record:
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
        file, args = call.file, call.args[:_MOST_ARGUMENTS]
        return Record(
            seq=sequence,
            time=time.time(),
            tid=task.tid,
            comm=task.comm,
            fd=file.fd,
            file=file.fd_class,
            vm=file.vm_id,
            syscall=SYS_NAMES.get(call.nr, str(call.nr)),
            call=call.name,
            args=[_show(argument) for argument in args],
            data=None if all(argument is None or isinstance(argument, int) for argument in args) else list(map(audit_data.encode, args)),
            digest=_digest(args),
        )

    def _write(self, record: Record) -> None:
        line = msgspec.json.encode(record) + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        """Write out what is buffered and close the file; nothing happens the second time."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _show(argument: Any) -> int | str | None:
    if argument is None or isinstance(argument, int):
        return argument
    return f"{type(argument).__name__}[{len(argument)}]" if isinstance(argument, list | tuple | dict | set) else type(argument).__name__


def _structures(args: Iterable[Any]) -> Iterable[bytes]:
    for argument in args:
        if isinstance(argument, Structure):
            yield bytes(argument)
        elif isinstance(argument, dict):
            yield from (repr(item).encode() for item in argument.items())
        elif isinstance(argument, list | tuple):
            yield from (bytes(item) if isinstance(item, Structure) else repr(item).encode() for item in argument)


def _digest(args: Iterable[Any]) -> str | None:
    parts = list(_structures(args))
    return hashlib.sha256(b"".join(parts)).hexdigest() if parts else None
