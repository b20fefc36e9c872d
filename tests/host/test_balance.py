"""`host/balance.py`: where a thread may run when it steps aside."""

from __future__ import annotations

import os

import pytest

from softkvm.host import balance

ALLOWED = {1, 4, 6}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the thread asks of the operating system; it may run on `ALLOWED`."""
    made: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(ALLOWED))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, processors: made.append(processors))
    monkeypatch.setattr(os, "sched_yield", lambda: made.append("yield"))
    return made


def test_the_thread_leaves_the_processor_and_may_come_back(calls: list[object]) -> None:
    balance.step_aside(4)
    assert calls == [{1, 6}, ALLOWED]


def test_where_there_is_one_processor_it_yields(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4})
    balance.step_aside(4)
    assert calls == ["yield"]
