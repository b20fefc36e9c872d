"""A host with one processor, which its guests have by turns: who runs when follows from a seed alone.

In place of the fair queue of `sched.py` for runs that repeat. A turn ends after a number of retired instructions that the seed decides,
when the guest halts, or when it spins in a loop of PAUSE; the next guest in the order of their creation that can run has the next one.
When none can, virtual time jumps to the first timer. Everything that threads of guests do, in guest mode and out of it, they do in their
turn, so the order of all accesses to memory, devices and clocks is one and the same in each run.

A VMM takes part by `begin()` and `taking()`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from weakref import WeakKeyDictionary, ref

from softkvm import silicon
from softkvm.host.clock import VirtualClock
from softkvm.host.sched import Guest, Scheduler
from softkvm.host.task import current

TURN = 20_000, 200_000
"""Shortest and longest turn in instructions: some tens to some hundreds of microseconds."""
_U64 = (1 << 64) - 1


class Random:
    """SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014): the same numbers everywhere."""

    def __init__(self, seed: int) -> None:
        """Start from `seed`, modulo 2^64."""
        self._state = seed & _U64

    def next(self) -> int:
        """64 bits."""
        self._state = self._state + 0x9E37_79B9_7F4A_7C15 & _U64
        mixed = (self._state ^ self._state >> 30) * 0xBF58_476D_1CE4_E5B9 & _U64
        mixed = (mixed ^ mixed >> 27) * 0x94D0_49BB_1331_11EB & _U64
        return mixed ^ mixed >> 31

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`."""
        return low + self.next() % (high - low + 1)


class State(Enum):
    """What a guest's thread wants."""

    AWAY = auto()
    """Nothing: it is not in a run."""
    READY = auto()
    """The turn, or it has it."""
    ASLEEP = auto()
    """To be woken."""


class Seat:
    """A guest's place in the round, and the wake-up (`Wakeup` to its users) that its thread sleeps on."""

    def __init__(self, turns: Turns, guest: Guest) -> None:
        """Whoever has nothing to do with a run."""
        self._turns = turns
        self.guest = ref(guest)
        self.state = State.AWAY
        self.woken = False
        self.keeps_time = False
        """It sleeps until the first timer at the latest."""
        self.granted = threading.Event()

    def is_set(self) -> bool:
        """Whether it was woken since `clear()`."""
        return self.woken

    def clear(self) -> None:
        """Forget wake-ups so far."""
        self.woken = False

    def set(self) -> None:
        """Wake the guest's thread, which goes on when its turn comes; callable from any thread."""
        self._turns.wake(self)

    def poll(self, ns: int) -> bool:
        """Nothing is won by waiting in one's own turn."""
        return self.woken

    def wait(self, timeout: float | None = None) -> bool:
        """Give the turn away and sleep; with any `timeout` until the first timer of the clock at the latest. Returns in the next turn."""
        self._turns.fall_asleep(self, timeout is not None)
        return self.woken


class Turns(Scheduler):
    """The scheduler of such a host. `left` is for the guest whose turn it is: how many instructions it may still retire in it."""

    def __init__(self, model: silicon.Model, clock: VirtualClock, seed: int) -> None:
        """As many cores as there are guests, of which one runs; `clock` is the time of all of them."""
        super().__init__(model, None, clock.monotonic_ns)
        self.clock = clock
        self.seed = seed
        self.left = 0
        self._random = Random(seed)
        self._mutex = threading.Lock()
        self._seats: WeakKeyDictionary[Guest, Seat] = WeakKeyDictionary()
        self._holder: Seat | None = None
        self._interrupted: tuple[Seat, int] | None = None

    # --- For the VMM ----------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """All guests are about to run; the one whose turn the end of the last run cut short goes on with it."""
        with self._mutex:
            seats = list(self._seats.values())
            for seat in seats:
                seat.state = State.READY
                seat.granted.clear()
            interrupted, self._interrupted = self._interrupted, None
            if interrupted is not None:
                self._grant(*interrupted)
            elif seats:
                self._grant(seats[0], self._draw())

    @contextmanager
    def taking(self, guest: Guest) -> Iterator[None]:
        """The calling thread runs `guest` in the block, which begins in its turn; it takes part in the round until the end of the block."""
        seat = self._seats[guest]
        self._await(seat)
        try:
            yield
        finally:
            self._leave_round(seat)

    # --- For KVM --------------------------------------------------------------------------------------------------------------------

    def wakeup(self, guest: Guest) -> Seat:
        """A seat for a new guest, behind those that there are."""
        with self._mutex:
            return self._seats.setdefault(guest, Seat(self, guest))

    def schedule(self, guest: Guest) -> None:
        """The turn is over; returns in the next one."""
        seat = self._seats[guest]
        began = self.clock.monotonic_ns()
        with self._mutex:
            if seat is not self._holder:
                return
            self._pass_on()
        self._await(seat)
        current().run_delay += self.clock.monotonic_ns() - began

    def run_delay(self) -> int:
        """How long the calling thread has waited for turns, in virtual ns since it started."""
        return current().run_delay

    def spin(self, guest: Guest) -> bool:
        """The guest waits for another one in a loop: that one should run, and always wants to."""
        self.schedule(guest)
        return True

    # --- For seats ------------------------------------------------------------------------------------------------------------------

    def wake(self, seat: Seat) -> None:
        """`seat` has reason to look around. If all sleep it has the turn at once."""
        with self._mutex:
            seat.woken = True
            if self._holder is None and seat.state is State.ASLEEP:
                self._pass_on()

    def fall_asleep(self, seat: Seat, keeps_time: bool) -> None:
        """`seat`, whose turn it is, waits for a wake-up."""
        with self._mutex:
            seat.state, seat.keeps_time = State.ASLEEP, keeps_time
            self._pass_on()
        self._await(seat)

    @staticmethod
    def _await(seat: Seat) -> None:
        seat.granted.wait()
        seat.granted.clear()

    def _leave_round(self, seat: Seat) -> None:
        with self._mutex:
            if self._interrupted is None:
                self._interrupted = seat, self.left
            seat.state = State.AWAY
            self._pass_on()

    # --- With the mutex held --------------------------------------------------------------------------------------------------------

    def _draw(self) -> int:
        return self._random.between(*TURN)

    def _grant(self, seat: Seat, left: int) -> None:
        self._holder, self.left = seat, left
        seat.state = State.READY
        seat.granted.set()

    def _pass_on(self) -> None:
        """The next turn is that of the next guest that can run. If none can, time goes on to the first timer; without one nobody's."""
        seats = list(self._seats.values())
        behind = seats.index(self._holder) + 1 if self._holder in seats else 0
        order = seats[behind:] + seats[:behind]
        ready = next((seat for seat in order if seat.state is State.READY or (seat.state is State.ASLEEP and seat.woken)), None)
        if ready is None and (expiry := self.clock.first_expiry) is not None:
            ready = next((seat for seat in order if seat.state is State.ASLEEP and seat.keeps_time), None)
            if ready is not None:
                self.clock.skip_to(expiry)
        if ready is None:
            self._holder = None
        else:
            self._grant(ready, self._draw())
