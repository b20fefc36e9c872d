"""What the host's scheduler says about a thread. Answers to Linux 6.1 `Documentation/scheduler/sched-stats.rst` and getrusage(2)."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

from softkvm.host.task import current

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class _Seen(threading.local):
    """How often this thread had lost its processor when somebody last asked."""

    preemptions = 0


_seen = _Seen()


def run_delay_ns() -> int:
    """How long the calling thread has been runnable without a core of ours or a CPU of the host's, in ns since it started; of the latter
    what the host counts."""
    waited = current().run_delay
    try:
        return waited + int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return waited


def was_preempted() -> bool:
    """Whether another thread has taken the processor from the calling one since its last call; a yield that somebody used counts too."""
    before, _seen.preemptions = _seen.preemptions, resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    return _seen.preemptions != before
