"""`softkvm.host.turns`: one guest at a time, in an order that the seed decides."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from softkvm import silicon
from softkvm.host.clock import HrTimer, VirtualClock
from softkvm.host.sched import Cpu
from softkvm.host.turns import TURN, Random, Seat, Turns


class Guest:
    """A guest of no consequence, weakly referenceable."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sched_in(self, cpu: Cpu) -> None: ...
    def sched_out(self) -> None: ...
    def yield_core(self) -> bool:
        return True

    def set_need_resched(self) -> None: ...
    def interrupt_guest(self, function: Callable[[], None]) -> None: ...
    def call(self, function: Callable[[], object]) -> bool:
        return False


class Host:
    """Turns with guests, and threads that run them; `log` is who did what in which order."""

    def __init__(self, names: str, seed: int = 1) -> None:
        self.clock = VirtualClock()
        self.turns = Turns(silicon.Model("cascadelake"), self.clock, seed)
        self.guests = {name: Guest(name) for name in names}
        self.seats: dict[str, Seat] = {name: self.turns.wakeup(guest) for name, guest in self.guests.items()}
        self.log: list[str] = []

    def run(self, **lives: Callable[[Guest, Seat], None]) -> str:
        """Give each guest its life, in a thread; what they logged."""
        self.turns.begin()
        threads = [threading.Thread(target=self._live, args=(name, life)) for name, life in lives.items()]
        for thread in reversed(threads):
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not any(thread.is_alive() for thread in threads), "the round came to a stop"
        return "".join(self.log)

    def _live(self, name: str, life: Callable[[Guest, Seat], None]) -> None:
        guest = self.guests[name]
        with self.turns.taking(guest):
            life(guest, self.seats[name])

    def busy(self, guest: Guest, seat: Seat) -> None:
        """Work for three turns."""
        for _ in range(3):
            self.log.append(guest.name)
            self.turns.schedule(guest)


@pytest.fixture
def host() -> Host:
    return Host("abc")


def test_guests_go_round(host: Host) -> None:
    assert host.run(a=host.busy, b=host.busy, c=host.busy) == "abcabcabc"


def test_the_seed_decides_how_long_turns_are() -> None:
    def lengths(seed: int) -> list[int]:
        host = Host("ab", seed)
        found: list[int] = []

        def life(guest: Guest, seat: Seat) -> None:
            for _ in range(5):
                found.append(host.turns.left)
                host.turns.schedule(guest)

        host.run(a=life, b=life)
        return found

    assert lengths(1) == lengths(1) != lengths(2)
    assert all(TURN[0] <= length <= TURN[1] for length in lengths(3))


def test_a_sleeper_has_no_turn_until_it_is_woken(host: Host) -> None:
    def sleeper(guest: Guest, seat: Seat) -> None:
        assert seat.wait()
        host.log.append("woken ")

    def waker(guest: Guest, seat: Seat) -> None:
        host.busy(guest, seat)
        host.seats["a"].set()
        host.busy(guest, seat)

    assert host.run(a=sleeper, b=waker, c=host.busy) == "bcbcbcbwoken bb"


def test_when_all_sleep_time_jumps_to_the_first_timer(host: Host) -> None:
    start, rung = host.clock.monotonic_ns(), list[int]()
    HrTimer(host.clock, lambda now: rung.append(now - start)).start(start + 5_000_000)

    def keeper(guest: Guest, seat: Seat) -> None:
        assert not seat.wait(timeout=123.0)
        host.clock.run_expired()
        host.seats["a"].set()
        host.seats["c"].set()

    def sleeper(guest: Guest, seat: Seat) -> None:
        assert seat.wait()
        host.log.append(guest.name)

    assert host.run(a=sleeper, b=keeper, c=sleeper) == "ca"
    assert rung == [5_000_000]


def test_without_a_timer_somebody_outside_wakes_them(host: Host) -> None:
    def wake() -> None:
        for seat in host.seats.values():
            seat.set()

    timer = threading.Timer(0, wake)

    def sleeper(guest: Guest, seat: Seat) -> None:
        if guest.name == "c":
            timer.start()
        assert seat.wait()

    host.run(a=sleeper, b=sleeper, c=sleeper)
    timer.join()


def test_a_run_goes_on_with_the_turn_that_the_last_one_cut_short(host: Host) -> None:
    left: list[int] = []

    def first(guest: Guest, seat: Seat) -> None:
        if guest.name == "a":
            host.turns.schedule(guest)
        if guest.name == "b":
            host.turns.left -= 5
            left.append(host.turns.left)

    def second(guest: Guest, seat: Seat) -> None:
        host.log.append(guest.name)
        left.append(host.turns.left)

    host.run(a=first, b=first, c=first)
    assert host.run(a=second, b=second, c=second) == "bca"
    assert left[1] == left[0]


def test_time_spent_waiting_for_a_turn_is_steal_time(host: Host) -> None:
    delays: list[int] = []

    def life(guest: Guest, seat: Seat) -> None:
        host.clock.advance(100)
        host.turns.schedule(guest)
        delays.append(host.turns.run_delay())

    host.run(a=life, b=life, c=life)
    assert delays == [200, 100, 0]


def test_random_numbers_are_those_of_splitmix64() -> None:
    random = Random(1234567)
    assert [random.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
