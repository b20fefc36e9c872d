"""Cores and who is on them: a guest stays until another one needs its core (`vcpu_load()` and `vcpu_put()`)."""

from __future__ import annotations

import pytest

from softkvm import silicon
from softkvm.host.sched import Cpu, Scheduler
from tests import fake_engine


class Guest:
    def __init__(self) -> None:
        self.cpu: Cpu | None = None
        self.busy = False

    def sched_in(self, cpu: Cpu) -> None:
        self.cpu = cpu

    def yield_core(self) -> bool:
        if not self.busy:
            self.cpu = None
        return not self.busy


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    monkeypatch.setattr(silicon, "Core", fake_engine.Core)
    return Scheduler(fake_engine.Model("cascadelake"))  # type: ignore[arg-type]


def test_an_idle_guest_makes_room(scheduler: Scheduler) -> None:
    first, second = Guest(), Guest()
    scheduler.load(first)
    cpu = first.cpu
    scheduler.load(second)
    assert (first.cpu, second.cpu) == (None, cpu)


def test_a_busy_guest_keeps_its_core(scheduler: Scheduler) -> None:
    first, second = Guest(), Guest()
    scheduler.load(first)
    first.busy = True
    scheduler.load(second)
    assert first.cpu is not None
    assert second.cpu is not None
    assert (first.cpu.index, second.cpu.index) == (0, 1)


def test_a_core_that_was_given_back_is_taken_first(scheduler: Scheduler) -> None:
    first, second, third = Guest(), Guest(), Guest()
    scheduler.load(first)
    first.busy = True
    scheduler.load(second)
    given_back = second.cpu
    scheduler.put(second)
    scheduler.put(second)  # harmless
    first.busy = False
    scheduler.load(third)
    assert third.cpu is given_back
    assert first.cpu is not None
