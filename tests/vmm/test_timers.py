"""Device timers."""

from __future__ import annotations

import threading

from softkvm.vmm.timers import Timers
from tests.vmm.doubles import Time


def test_a_timer_rings_once_at_its_deadline() -> None:
    time, rung = Time(), list[int]()
    timer = time.timers.timer(lambda: rung.append(time.now))
    start = time.now
    timer.arm(start + 100)
    time.advance(99)
    assert rung == []
    time.advance(1000)
    assert rung == [start + 100]


def test_disarmed_and_moved_timers_do_not_ring() -> None:
    time, rung = Time(), list[str]()
    gone = time.timers.timer(lambda: rung.append("gone"))
    moved = time.timers.timer(lambda: rung.append("moved"))
    gone.arm(time.now + 1)
    moved.arm(time.now + 1)
    gone.disarm()
    moved.arm(time.now + 10)
    time.advance(5)
    assert rung == []


def test_a_callback_can_arm_its_timer_again() -> None:
    time, rung = Time(), list[int]()

    def again() -> None:
        rung.append(time.now)
        timer.arm(time.now + 10)

    start = time.now
    timer = time.timers.timer(again)
    timer.arm(start + 10)
    time.advance(35)
    assert rung == [start + 10, start + 20, start + 30]


def test_callbacks_run_under_the_lock_of_the_board() -> None:
    time, lock = Time(), threading.RLock()
    free: list[bool] = []

    def try_lock() -> None:
        other = threading.Thread(target=lambda: free.append(lock.acquire(blocking=False)))
        other.start()
        other.join()

    Timers(time, lock).timer(try_lock).arm(time.now)
    time.run_expired()
    assert free == [False]
