"""Traces in the text form of ftrace's `trace` file, which Perfetto and many a script read; or in trace-cmd's own (`host/trace_dat.py`).

Answers to Linux 6.1 `Documentation/trace/ftrace.rst` and `kernel/trace/trace_output.c` (`trace_print_context()`). A line has the thread,
the core, the state of interrupts and preemption, CLOCK_MONOTONIC in seconds, and the event with its fields.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TextIO

from softkvm.host import process, trace
from softkvm.host.task import TIF_NEED_RESCHED, Task, current
from softkvm.host.trace_dat import DatFile

HEADER = """\
# tracer: nop
#
#                                _-----=> irqs-off/BH-disabled
#                               / _----=> need-resched
#                              | / _---=> hardirq/softirq
#                              || / _--=> preempt-depth
#                              ||| / _-=> migrate-disable
#                              |||| /     delay
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
"""
_COMM_LENGTH = 15
_BUFFER = 1 << 16
_DAT = ".dat"


class PatternError(ValueError):
    """No event has such a name; the message is one sentence."""


def select(patterns: Sequence[str]) -> list[trace.Tracepoint]:
    """The events that match one of the patterns: `kvm_exit`, `kvm_*`, `kvm:*`, `raw_syscalls`, `*`; PatternError if one matches none."""
    found: dict[str, trace.Tracepoint] = {}
    for pattern in patterns:
        names = {name: point for name, point in trace.registry.items() if _matches(point, pattern)}
        if not names:
            raise PatternError(f"no event matches {pattern!r}; `--trace help` lists them")
        found.update(names)
    return list(found.values())


def _matches(point: trace.Tracepoint, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (point.name, f"{point.system}:{point.name}", point.system))


def events() -> list[tuple[str, str]]:
    """Every event with the names of its fields, as `system:event`."""
    return [(f"{point.system}:{point.name}", " ".join(point.fields)) for point in trace.registry.values()]


class _Text:
    """A trace as text."""

    def __init__(self, output: str | Path | TextIO) -> None:
        self._owned = isinstance(output, str | Path)
        self._file: TextIO = Path(output).open("w", buffering=_BUFFER) if isinstance(output, str | Path) else output  # noqa: SIM115
        self._file.write(HEADER)

    def record(self, task: Task, cpu: int, now: int, point: trace.Tracepoint, values: Sequence[object]) -> None:
        if not self._file.closed:
            self._file.write(f"{context(task, cpu, now)}{point.name}: {point.print(*values)}\n")

    def close(self) -> None:
        if self._file.closed:
            return
        self._file.flush()
        if self._owned:
            self._file.close()


class Trace:
    """Writes events to a file from `start()` to `close()`; a context manager of that. A file `*.dat` has trace-cmd's form."""

    def __init__(
        self,
        patterns: Sequence[str],
        output: str | Path | TextIO,
        of: process.Process | None = None,
    ) -> None:
        """Events that match `patterns` go to `output`: all, or those of one VMM. PatternError; OSError if the file cannot be made."""
        self._points = select(patterns)
        binary = isinstance(output, str | Path) and Path(output).suffix == _DAT
        self._sink = DatFile(str(output), self._points) if binary else _Text(output)
        self._of = of
        self._lock = threading.Lock()
        self._closed = False
        self._probes: list[tuple[trace.Tracepoint, Callable[..., None]]] = []

    def start(self) -> None:
        """Begin to record."""
        for point in self._points:
            probe = partial(self._record, point)
            self._probes.append((point, probe))
            point.register(probe)

    def close(self) -> None:
        """Stop recording, and write out what is buffered; nothing happens the second time."""
        probes, self._probes = self._probes, []
        for point, probe in probes:
            point.unregister(probe)
        with self._lock:
            if not self._closed:
                self._closed = True
                self._sink.close()

    def _record(self, point: trace.Tracepoint, *values: object) -> None:
        task = current()
        if self._of is not None and (task.call is None or task.call.file.process is not self._of):
            return
        cpu = getattr(task.call.file, "cpu_index", 0) if task.call is not None else 0
        with self._lock:
            if not self._closed:
                self._sink.record(task, cpu, time.monotonic_ns(), point, values)

    def __enter__(self) -> Trace:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def context(task: Task, cpu: int, now: int) -> str:
    """The columns before the event, `now` in ns."""
    flags = "d" if task.irqs_off else "."
    flags += "N" if task.flags & TIF_NEED_RESCHED else "."
    flags += "h" if task.rcu_irq_nesting else "."
    flags += str(task.preempt_count) if task.preempt_count else "."
    seconds, microseconds = divmod(now // 1000, 1_000_000)
    return f"{task.comm[:_COMM_LENGTH]:>16}-{task.tid:<7d} [{cpu:03d}] {flags}. {seconds:5d}.{microseconds:06d}: "
