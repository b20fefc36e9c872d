"""What the host's scheduler says about a thread. Answers to Linux 6.1 `Documentation/scheduler/sched-stats.rst`."""

from __future__ import annotations

from pathlib import Path

from softkvm.host.task import current

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def run_delay_ns() -> int:
    """How long the calling thread has been runnable without a core of ours or a CPU of the host's, in ns since it started; of the latter
    what the host counts."""
    waited = current().run_delay
    try:
        return waited + int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return waited
