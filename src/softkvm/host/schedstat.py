"""What the host's scheduler says about a thread. Answers to Linux 6.1 `Documentation/scheduler/sched-stats.rst`."""

from __future__ import annotations

from pathlib import Path

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


def run_delay_ns() -> int:
    """How long the calling thread has been runnable without a CPU, in ns since it started; 0 where the host does not count that."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
