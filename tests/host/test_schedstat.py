"""`softkvm.host.schedstat`: what a thread learns about its processor."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress
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


def open_files(tid: int) -> int:
    """Of this process, those that tell of a thread's scheduling."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # another thread has closed it meanwhile
            found += os.readlink(f"/proc/self/fd/{name}").endswith(f"/{tid}/schedstat")
    return found


def test_a_threads_file_stays_open_as_long_as_the_thread() -> None:
    tids, seen = list[int](), list[int]()

    def ask() -> None:
        tids.append(threading.get_native_id())
        assert schedstat.run_delay_ns() <= schedstat.run_delay_ns()
        seen.append(open_files(tids[0]))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert (seen, open_files(tids[0])) == ([1], 0)
