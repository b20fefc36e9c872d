"""Device timers."""

from __future__ import annotations

import threading

from softkvm.vmm.timers import TimerQueue
from tests.vmm.doubles import Time


def test_timers_ring_in_order_of_their_deadlines() -> None:
    time, rung = Time(), list[str]()
    late = time.timers.timer(lambda: rung.append("late"))
    soon = time.timers.timer(lambda: rung.append("soon"))
    late.arm(time.now + 200)
    soon.arm(time.now + 100)
    assert time.timers.next_deadline() == time.now + 100
    time.now += 300
    time.timers.run_expired()
    assert rung == ["soon", "late"]
    assert time.timers.next_deadline() is None


def test_disarmed_and_moved_timers_do_not_ring() -> None:
    time, rung = Time(), list[str]()
    gone = time.timers.timer(lambda: rung.append("gone"))
    moved = time.timers.timer(lambda: rung.append("moved"))
    gone.arm(time.now)
    moved.arm(time.now)
    gone.disarm()
    moved.arm(time.now + 1)
    time.timers.run_expired()
    assert rung == []


def test_a_callback_can_disarm_a_timer_that_is_due_too() -> None:
    time, rung = Time(), list[str]()
    second = time.timers.timer(lambda: rung.append("second"))
    first = time.timers.timer(second.disarm)
    first.arm(time.now)
    second.arm(time.now + 1)
    time.now += 1
    time.timers.run_expired()
    assert rung == []


def test_a_timer_that_arms_itself_waits_for_the_next_call() -> None:
    time, rung = Time(), list[int]()

    def again() -> None:
        rung.append(time.now)
        timer.arm(time.now)

    timer = time.timers.timer(again)
    timer.arm(time.now)
    time.timers.run_expired()
    assert len(rung) == 1


def test_the_thread_rings_timers_and_reports_errors() -> None:
    errors: list[Exception] = []
    reported = threading.Event()

    def report(error: Exception) -> None:
        errors.append(error)
        reported.set()

    def fail() -> None:
        raise ZeroDivisionError

    queue = TimerQueue(lambda: 0)
    queue.timer(fail).arm(0)
    queue.start(report)
    assert reported.wait(10)
    queue.close()
    assert [type(error) for error in errors] == [ZeroDivisionError]
