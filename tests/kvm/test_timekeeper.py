"""One of the waiting vCPUs runs the timers for all."""

from __future__ import annotations

from softkvm.kvm.timekeeper import Timekeeper


class Waiter:
    """A vCPU that counts how often it was woken."""

    def __init__(self, blocked: bool = True) -> None:
        self.blocked = blocked
        self.woken = 0

    def wake(self) -> None:
        """Count."""
        self.woken += 1


def test_one_of_the_waiters_keeps_the_time() -> None:
    first, second = Waiter(), Waiter()
    keeper = Timekeeper(lambda: [first, second])
    assert keeper.claims(first, 100)
    assert not keeper.claims(second, 100)
    assert keeper.claims(first, 150), "the keeper remains the keeper"


def test_an_earlier_timer_brings_its_own_keeper() -> None:
    first, second = Waiter(), Waiter()
    keeper = Timekeeper(lambda: [first, second])
    keeper.claims(first, 100)
    assert keeper.claims(second, 50)
    assert not keeper.claims(first, 60)


def test_who_leaves_wakes_nobody_while_it_runs() -> None:
    first, second = Waiter(), Waiter()
    keeper = Timekeeper(lambda: [first, second])
    keeper.claims(first, 100)
    keeper.claims(second, 100)
    first.blocked = False
    keeper.leave(first)
    assert keeper.vacant
    assert second.woken == 0
    assert keeper.claims(first, 100), "it waits again"
    assert not keeper.vacant


def test_who_stops_running_hands_over_to_one_who_waits() -> None:
    first, running, second = Waiter(), Waiter(blocked=False), Waiter()
    keeper = Timekeeper(lambda: [first, running, second])
    keeper.claims(first, 100)
    keeper.claims(second, 100)
    first.blocked = False
    keeper.leave(first)
    keeper.hand_over()
    assert (running.woken, second.woken) == (0, 1)
    assert keeper.claims(second, 100)
    keeper.hand_over()
    assert second.woken == 1


def test_an_heir_that_leaves_too_passes_the_task_on() -> None:
    first, second, third = Waiter(), Waiter(), Waiter()
    keeper = Timekeeper(lambda: [first, second, third])
    keeper.claims(first, 100)
    keeper.claims(second, 100)
    first.blocked = False
    keeper.leave(first)
    keeper.hand_over()
    second.blocked = False  # it was leaving when it was chosen
    keeper.leave(second)
    keeper.hand_over()
    assert third.woken == 1


def test_nobody_is_asked_when_all_have_left() -> None:
    first, second = Waiter(), Waiter()
    keeper = Timekeeper(lambda: [first, second])
    keeper.claims(first, 100)
    keeper.leave(second)
    assert not keeper.vacant, "the keeper is still there, and nobody trusts in it"
    keeper.claims(second, 100)
    first.blocked = second.blocked = False
    keeper.leave(first)
    keeper.hand_over()
    assert not keeper.vacant
    assert (first.woken, second.woken) == (0, 0)
