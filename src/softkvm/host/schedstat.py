"""What the host's scheduler says about a thread. Answers to Linux 6.1 `Documentation/scheduler/sched-stats.rst` and getrusage(2)."""

from __future__ import annotations

import os
import resource
import threading

from softkvm.host.task import current

_SCHEDSTAT = "/proc/thread-self/schedstat"
_MOST_BYTES = 64


class _Schedstat:
    """The file of the thread that opens it, as long as that lives: who only forgets a file object is warned of it."""

    def __init__(self) -> None:
        self.fd = os.open(_SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _Seen(threading.local):
    """What is kept of this thread."""

    preemptions = 0
    """How often it had lost its processor when somebody last asked."""
    file: _Schedstat | None = None
    """What the host counts of it, once somebody has asked."""


_seen = _Seen()


def run_delay_ns() -> int:
    """How long the calling thread has been runnable without a core of ours or a CPU of the host's, in ns since it started; of the latter
    what the host counts."""
    waited = current().run_delay
    try:
        file = _seen.file = _seen.file or _Schedstat()
        return waited + int(os.pread(file.fd, _MOST_BYTES, 0).split()[1])
    except (OSError, IndexError, ValueError):
        return waited


def was_preempted() -> bool:
    """Whether another thread has taken the processor from the calling one since its last call; a yield that somebody used counts too."""
    before, _seen.preemptions = _seen.preemptions, resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    return _seen.preemptions != before
