"""A VMM as the host sees it: the process that owns the descriptors, with what was put upon all of its threads.

Answers to Linux 6.1 `struct signal_struct`, `struct files_struct` and `struct seccomp`. Several VMMs live in one Python process; each opens
/dev/kvm as a `Process` of its own, and filters, audit and tracer of one do not touch the other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from softkvm.host import context_tracking, entry, static_call, trace
from softkvm.host.call import Call, File
from softkvm.host.seccomp import Filter, Killed

if TYPE_CHECKING:
    from softkvm.host.audit import AuditLog
    from softkvm.host.ptrace import Tracer
    from softkvm.host.task import Task

_FIRST_FD = 3


class Process:
    """One VMM. `cross` is the way of its system calls: `entry.syscall_bare` while nobody wants to see them."""

    def __init__(self, filters: tuple[Filter, ...] = (), audit: AuditLog | None = None) -> None:
        """A process under `filters` (the last one asked first) whose calls go to `audit`."""
        self.cross: Callable[..., Any] = entry.syscall_bare
        self.filters = filters
        self.audit = audit
        self.tracer: Tracer | None = None
        self.supervisor: Callable[[Call], int | None] | None = None
        """Answers calls that a filter gives it (`user_notif`): their result, a negative errno, or None to let them go on."""
        self.on_sigsys: Callable[[Call], None] | None = None
        """Handler of the signal that a filter's `trap` sends, called in place of the call."""
        self._files: WeakValueDictionary[int, File] = WeakValueDictionary()
        self._fds = count(_FIRST_FD)
        self._death: str | None = None
        self._dead_threads: dict[Task, str] = {}
        static_call.register(self)

    def install(self, file: File) -> int:
        """A descriptor for a new file."""
        fd = next(self._fds)
        self._files[fd] = file
        return fd

    def update_static_calls(self) -> None:
        """Calls do entry work if anybody wants to see them."""
        hooks = (self.filters, self.audit, self.tracer, self._death, self._dead_threads)
        watched = any(hooks) or trace.recording() or context_tracking.enabled()
        self.cross = entry.syscall if watched else entry.syscall_bare

    def add_filter(self, new: Filter) -> None:
        """Put the process under one more filter. None is ever taken away, and the strictest action of all counts: rights only shrink."""
        self.filters = (*self.filters, new)
        self.update_static_calls()

    def attach(self, tracer: Tracer) -> None:
        """Stop every call for `tracer` (PTRACE_SEIZE); OSError(EPERM) if there is one."""
        if self.tracer is not None:
            raise OSError(errno.EPERM, "the process is traced already")
        self.tracer = tracer
        self.update_static_calls()

    def detach(self) -> None:
        """Let calls run without a tracer again (PTRACE_DETACH); OSError(ESRCH) if there is none."""
        if self.tracer is None:
            raise OSError(errno.ESRCH, "the process is not traced")
        self.tracer = None
        self.update_static_calls()

    def kill(self, why: str) -> None:
        """End the process: every call in progress comes out, every later one raises Killed."""
        self._death = why
        self.update_static_calls()
        for file in tuple(self._files.values()):
            file.killed()

    def kill_thread(self, task: Task, why: str) -> None:
        """End one thread: its later calls raise Killed."""
        self._dead_threads[task] = why
        self.update_static_calls()

    def check_alive(self, task: Task) -> None:
        """Raise Killed if the process or this thread of it was killed."""
        why = self._death or self._dead_threads.get(task)
        if why is not None:
            raise Killed(why)
