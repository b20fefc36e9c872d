"""`softkvm.host.clock`: conversions are exact, timers fire once and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softkvm.host.clock import Clock, HrTimer, VirtualClock


@given(ns=st.integers(0, 1 << 62), khz=st.integers(1_000, 6_000_000))
def test_ns_to_tsc_is_the_first_cycle_at_or_after_the_time(ns: int, khz: int) -> None:
    clock = Clock(lambda: 0, khz)
    tsc = clock.ns_to_tsc(ns)
    assert clock.tsc_to_ns(tsc) >= ns
    assert clock.tsc_to_ns(tsc - 1) < ns


@given(tsc=st.integers(0, 1 << 62), khz=st.integers(1_000, 6_000_000))
def test_ns_reaching_is_not_early(tsc: int, khz: int) -> None:
    clock = Clock(lambda: 0, khz)
    assert clock.ns_to_tsc(clock.ns_reaching(tsc)) >= tsc
    assert clock.ns_reaching(tsc) - clock.tsc_to_ns(tsc) <= 1


def test_monotonic_follows_the_tsc() -> None:
    cycles = [5_000_000]
    clock = Clock(lambda: cycles[0], 2_000_000)
    before, boot = clock.monotonic_ns(), clock.boottime_ns()
    cycles[0] += 3_000
    assert clock.monotonic_ns() - before == 1_500
    assert clock.boottime_ns() - boot == 1_500
    assert clock.boottime_at(cycles[0]) == clock.boottime_ns()


def test_timers_fire_in_order_at_their_time() -> None:
    clock = VirtualClock()
    start, log = clock.monotonic_ns(), []
    for delay in (300, 100, 200):
        HrTimer(clock, lambda now, d=delay: log.append((d, now - start))).start(start + delay)  # type: ignore[misc]
    assert clock.first_expiry == start + 100
    clock.advance(250)
    assert log == [(100, 100), (200, 200)]
    assert clock.first_expiry == start + 300


def test_a_periodic_timer_rearms_itself_once_per_expiry() -> None:
    clock = VirtualClock()
    fired: list[int] = []

    def tick(now: int) -> int:
        fired.append(now)
        return now + 10

    timer = HrTimer(clock, tick)
    timer.start(clock.monotonic_ns() + 10)
    clock.advance(35)
    assert len(fired) == 3
    timer.cancel()
    assert timer.expires_ns is None
    assert clock.first_expiry is None


def test_a_timer_in_the_past_that_stays_in_the_past_cannot_hang_run_expired() -> None:
    clock = VirtualClock()
    fired: list[int] = []

    def tick(now: int) -> int:
        fired.append(now)
        return 0

    HrTimer(clock, tick).start(0)
    clock.run_expired()
    assert len(fired) == 1


def test_start_inside_the_callback_beats_its_return_value() -> None:
    clock = VirtualClock()
    now = clock.monotonic_ns()
    timer: HrTimer

    def callback(_now: int) -> int:
        timer.start(now + 1_000)
        return now + 500

    timer = HrTimer(clock, callback)
    timer.start(now)
    clock.run_expired()
    assert timer.expires_ns == now + 1_000


def test_a_callback_may_cancel_another_due_timer() -> None:
    clock = VirtualClock()
    now, log = clock.monotonic_ns(), []
    second = HrTimer(clock, lambda _now: log.append("second"))
    first = HrTimer(clock, lambda _now: second.cancel())
    first.start(now - 2)
    second.start(now - 1)
    clock.run_expired()
    assert log == []


def test_on_earlier_is_called_only_when_the_first_expiry_comes_nearer() -> None:
    clock = VirtualClock()
    now, calls = clock.monotonic_ns(), []
    clock.on_earlier = lambda: calls.append(clock.first_expiry)
    early, late = HrTimer(clock, lambda _now: None), HrTimer(clock, lambda _now: None)
    late.start(now + 100)
    early.start(now + 50)
    late.start(now + 90)
    early.cancel()
    assert calls == [now + 100, now + 50]
    assert clock.first_expiry == now + 90
