"""`softkvm.host.schedstat`: what a thread learns about its processor."""

from __future__ import annotations

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
