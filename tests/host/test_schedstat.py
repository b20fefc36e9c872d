"""`softkvm.host.schedstat`: what a thread learns about its processor."""

from __future__ import annotations

import os
import resource
import threading
from types import SimpleNamespace

import pytest

from softkvm.host import schedstat


def test_a_thread_hears_of_each_preemption_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5, 5, 6, 6])
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_nivcsw=next(counts)))
    heard: list[bool] = []
    thread = threading.Thread(target=lambda: heard.extend(schedstat.was_preempted() for _ in range(4)))
    thread.start()
    thread.join()
    assert heard == [True, False, True, False]


def open_files() -> int:
    """Of this process, those that tell of a thread's scheduling."""
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.islink(link) and os.readlink(link).endswith("/schedstat") for link in links)


def test_a_threads_file_stays_open_as_long_as_the_thread() -> None:
    before, seen = open_files(), list[int]()

    def ask() -> None:
        assert schedstat.run_delay_ns() <= schedstat.run_delay_ns()
        seen.append(open_files())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert (seen, open_files()) == ([before + 1], before)
