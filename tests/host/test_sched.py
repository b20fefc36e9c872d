"""Cores and who is on them: a guest stays until another one needs its core (`vcpu_load()` and `vcpu_put()`)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest

from softkvm import silicon
from softkvm.host import trace
from softkvm.host.sched import SLICE_NS, Cpu, Entity, Scheduler
from softkvm.host.task import current
from tests import fake_engine


class Guest:
    def __init__(self) -> None:
        self.cpu: Cpu | None = None
        self.busy = False
        self.need_resched = False

    def sched_in(self, cpu: Cpu) -> None:
        self.cpu = cpu

    def sched_out(self) -> None:
        self.cpu = None

    def yield_core(self) -> bool:
        if not self.busy:
            self.cpu = None
        return not self.busy

    def set_need_resched(self) -> None:
        self.need_resched = True

    def call(self, function: Callable[[], object]) -> bool:
        if not self.busy:
            function()
        return not self.busy

    def interrupt_guest(self, function: Callable[[], None]) -> None:
        """Nobody is in a guest."""


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


# --- Fewer cores than guests -------------------------------------------------------------------------------------------------------

MS = 1_000_000


class Stepped(Scheduler):
    """A scheduler in which nobody really waits: time passes, and guests act, when a test says so."""

    def __init__(self, limit: int) -> None:
        self.time = 0
        super().__init__(fake_engine.Model("cascadelake"), limit, lambda: self.time)  # type: ignore[arg-type]

    def _wait(self, entity: Entity) -> None:
        entity.arrived = True

    def on_cores(self) -> set[Guest]:
        return {cpu.occupant for cpu in self._cpus if isinstance(cpu.occupant, Guest)}

    def pass_time(self, ns: int) -> None:
        """Let `ns` pass in steps of a millisecond; who must reschedule does."""
        for _ in range(ns // MS):
            self.time += MS
            self.tick()
            for guest in self.on_cores():
                if guest.need_resched:
                    guest.need_resched = False
                    self.schedule(guest)


def busy_guests(scheduler: Stepped, count: int) -> list[Guest]:
    guests = [Guest() for _ in range(count)]
    for guest in guests:
        guest.busy = True
        scheduler.load(guest)
    return guests


@pytest.fixture(autouse=True)
def scripted_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silicon, "Core", fake_engine.Core)


@pytest.mark.parametrize(("count", "cores"), [(2, 1), (3, 1), (3, 2), (5, 2), (7, 4)])
def test_cores_are_shared_fairly(count: int, cores: int) -> None:
    scheduler = Stepped(cores)
    guests = busy_guests(scheduler, count)
    ran = dict.fromkeys(guests, 0)
    for _ in range(1000):
        assert len(scheduler.on_cores()) == cores
        for guest in scheduler.on_cores():
            ran[guest] += 1
        scheduler.pass_time(MS)
    assert sum(ran.values()) == 1000 * cores
    assert max(ran.values()) - min(ran.values()) <= 2 * SLICE_NS // MS


def test_nobody_is_disturbed_while_nobody_waits() -> None:
    scheduler = Stepped(2)
    guests = busy_guests(scheduler, 2)
    scheduler.pass_time(100 * MS)
    assert not any(guest.need_resched for guest in guests)


def test_a_sleeper_leaves_its_core_and_gets_no_credit_for_its_sleep() -> None:
    scheduler = Stepped(1)
    sleeper, worker = busy_guests(scheduler, 2)
    scheduler.sleep(sleeper)
    assert scheduler.on_cores() == {worker}
    scheduler.pass_time(100 * MS)
    scheduler.load(sleeper)
    scheduler.pass_time(100 * MS)
    assert abs(scheduler.runtime(sleeper) - scheduler.runtime(worker)) <= 2 * SLICE_NS


def test_whoever_stayed_on_a_core_alone_owes_a_slice_at_most() -> None:
    """A vCPU whose machine was paused on its core must not starve when it runs again."""
    scheduler = Stepped(2)
    paused, worker = busy_guests(scheduler, 2)
    scheduler.pass_time(1000 * MS)
    scheduler.sleep(paused)
    scheduler.sleep(worker)
    late, _ = busy_guests(scheduler, 2)
    scheduler.load(paused)
    assert scheduler.runtime(paused) <= scheduler.runtime(late) + SLICE_NS


def test_notifiers_are_paired() -> None:
    scheduler = Stepped(1)
    stays: list[str] = []

    class Noted(Guest):
        def sched_out(self) -> None:
            stays.append("out")

    first, second = Noted(), Noted()
    for guest in (first, second):
        guest.busy = True
        scheduler.load(guest)
    scheduler.pass_time(50 * MS)
    assert len(stays) >= 10
    scheduler.sleep(first)
    scheduler.sleep(first)  # harmless
    assert scheduler.on_cores() == {second}


def test_switches_are_traced() -> None:
    switches: list[tuple[object, ...]] = []

    def probe(*values: object) -> None:
        switches.append(values)

    scheduler = Stepped(1)
    first, _ = busy_guests(scheduler, 2)
    trace.sched_switch.register(probe)
    try:
        scheduler.sleep(first)
    finally:
        trace.sched_switch.unregister(probe)
    mine = current()
    assert switches == [(mine.comm, mine.tid, 120, "S", mine.comm, mine.tid, 120)]


def test_threads_take_turns() -> None:
    """Real threads on one core: each gets it again and again, and none keeps it while another one waits."""
    scheduler = Scheduler(fake_engine.Model("cascadelake"), 1)  # type: ignore[arg-type]
    turns: list[int] = []

    class Thread(Guest, threading.Thread):
        def __init__(self, number: int) -> None:
            threading.Thread.__init__(self)
            Guest.__init__(self)
            self.number = number
            self.busy = True
            self.resched = threading.Event()

        def set_need_resched(self) -> None:
            self.resched.set()

        def call(self, function: Callable[[], object]) -> bool:
            return False

        def interrupt_guest(self, function: Callable[[], None]) -> None:
            """Nobody calls."""

        def run(self) -> None:
            scheduler.load(self)
            for _ in range(5):
                turns.append(self.number)
                self.resched.wait(0.02)
                self.resched.clear()
                scheduler.schedule(self)
                assert self.cpu is not None
            scheduler.sleep(self)

    threads = [Thread(number) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(turns) == {0: 5, 1: 5, 2: 5}
    assert len(scheduler._cpus) == 1


@pytest.mark.parametrize("limit", [0, -1])
def test_a_host_has_a_core(limit: int) -> None:
    with pytest.raises(ValueError, match="at least one core"):
        Scheduler(fake_engine.Model("cascadelake"), limit)  # type: ignore[arg-type]


# --- Functions on another CPU ------------------------------------------------------------------------------------------------------


def test_a_call_runs_here_while_nobody_runs_the_guest(scheduler: Scheduler) -> None:
    guest = Guest()
    scheduler.load(guest)
    assert guest.cpu is not None
    assert scheduler.call_on(guest.cpu, lambda: 7) == scheduler.call_for(guest, lambda: 7) == 7
    scheduler.put(guest)
    assert scheduler.call_for(guest, lambda: 8) == 8


def test_a_call_to_a_busy_guest_runs_in_its_thread_once(scheduler: Scheduler) -> None:
    guest, calls, threads = Guest(), [], []
    scheduler.load(guest)
    guest.busy = True

    def interrupt(function: Callable[[], None]) -> None:
        calls.append(function)
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    guest.interrupt_guest = interrupt  # type: ignore[method-assign]
    assert guest.cpu is not None
    scheduler.call_on(guest.cpu, lambda: threads.append(threading.current_thread()))
    calls[0]()
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_what_a_call_raises_comes_out_at_the_caller(scheduler: Scheduler) -> None:
    guest = Guest()
    scheduler.load(guest)

    def fail() -> None:
        raise OSError("no counter")

    with pytest.raises(OSError, match="no counter"):
        scheduler.call_for(guest, fail)


def test_a_guests_events_come_and_go_with_it(scheduler: Scheduler) -> None:
    first, second = Guest(), Guest()
    context = scheduler.events(first)
    scheduler.load(first)
    cpu = first.cpu
    assert cpu is not None
    assert cpu.perf.task is context
    scheduler.load(second)
    assert second.cpu is cpu
    assert cpu.perf.task is None
    assert scheduler.events(second) is cpu.perf.task
