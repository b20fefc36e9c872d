"""`silicon.Wakeup`: whoever waits for it, awake or asleep, is woken."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from softkvm import _engine
from softkvm.silicon import Wakeup

pytestmark = pytest.mark.skipif(not hasattr(_engine, "control_layout"), reason="softkvm._engine is not built")

LONG = 60
"""Seconds that no test waits for."""
ROUNDS = 200


def test_what_was_set_before_ends_every_wait_at_once() -> None:
    wakeup = Wakeup()
    assert not wakeup.is_set()
    wakeup.set()
    wakeup.set()
    assert wakeup.is_set()
    assert wakeup.poll(LONG * 10**9)
    assert wakeup.wait(LONG)
    assert wakeup.wait()
    wakeup.clear()
    assert not wakeup.is_set()


def test_waits_end_by_themselves() -> None:
    wakeup = Wakeup()
    assert not wakeup.poll(0)
    assert not wakeup.poll(1000)
    assert not wakeup.wait(0)
    assert not wakeup.wait(1e-4)


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf")])
def test_impossible_times(timeout: float) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Wakeup().wait(timeout)


@pytest.mark.parametrize("wait", [lambda wakeup: wakeup.wait(), lambda wakeup: wakeup.wait(LONG)], ids=["for ever", "for long"])
def test_two_threads_wake_each_other_and_none_is_missed(wait: Callable[[Wakeup], bool]) -> None:
    ping, pong = Wakeup(), Wakeup()

    def answer() -> None:
        for _ in range(ROUNDS):
            assert wait(ping)
            ping.clear()
            pong.set()

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in range(ROUNDS):
        ping.set()
        if not pong.poll(20_000):
            assert wait(pong)
        pong.clear()
    thread.join(LONG)
    assert not thread.is_alive()


class Interrupted(Exception):
    """Raised by the signal handler."""


@contextmanager
def alarm(milliseconds: float) -> Iterator[None]:
    """The first alarm of many raises: one that comes right before a thread sleeps does not end the sleep."""
    raised = False

    def interrupt(*_: object) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000, milliseconds / 1000)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_signal_handler_ends_a_sleep() -> None:
    with pytest.raises(Interrupted), alarm(20):
        Wakeup().wait()
