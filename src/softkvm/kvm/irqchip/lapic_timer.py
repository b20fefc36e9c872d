"""The local APIC's timer: one-shot, periodic and TSC-deadline, on a host timer.

Answers to SDM vol. 3, 11.5.4 and Linux 6.1 `arch/x86/kvm/lapic.c` (`struct kvm_timer`). The timer's bus clock is 1 GHz, as KVM has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host.clock import HrTimer

if TYPE_CHECKING:
    from softkvm.kvm.types import Vcpu

ONE_SHOT, PERIODIC, TSC_DEADLINE, RESERVED_MODE = range(4)
"""Timer modes: bits 18..17 of the LVT timer register."""

MIN_PERIOD_NS = 200_000
"""Shortest period of a periodic timer (KVM's `min_timer_period_us`): a guest cannot make its host do nothing but timers."""

FOREVER_NS = 1 << 60
"""Latest expiry, after 36 years of uptime: keeps it within 64 bits of TSC."""


class LapicTimer:
    """Counts down from an initial count, or waits for a TSC value; `fire` is called at each expiry.

    Registers are written by the vCPU's thread while any thread may expire the timer, so whether the timer runs, and until when, is kept in
    one place: the host timer.
    """

    def __init__(self, vcpu: Vcpu, fire: Callable[[], None]) -> None:
        """A stopped one-shot timer that divides by 2, as after reset."""
        self._vcpu = vcpu
        self._clock = vcpu.vm.clock
        self._fire = fire
        self.hrtimer = HrTimer(self._clock, self._expired)
        self.mode = ONE_SHOT
        self.initial_count = 0
        self.divisor = 2
        self._deadline = 0

    def reset(self) -> None:
        """The state after RESET and INIT."""
        self.stop()
        self.mode, self.divisor = ONE_SHOT, 2

    def stop(self) -> None:
        """Disarm and forget the count."""
        self.hrtimer.cancel()
        self.initial_count = self._deadline = 0

    def set_mode(self, mode: int) -> None:
        """Write of the LVT's mode field; to or from TSC-deadline mode disarms the timer (SDM vol. 3, 11.5.4.1)."""
        if mode == self.mode:
            return
        if TSC_DEADLINE in (mode, self.mode):
            self.stop()
        self.mode = mode

    def set_initial_count(self, count: int) -> None:
        """Start counting down from `count`; 0 stops. No effect in TSC-deadline mode."""
        if self.mode != TSC_DEADLINE:
            self.initial_count = count
            self._start(self.period_ns)

    def set_divide(self, register: int) -> None:
        """Write of the divide configuration register; what is left of a running count is kept in ticks."""
        divisor = divisor_of(register)
        if divisor == self.divisor:
            return
        left = self.current_count()
        self.divisor = divisor
        if left and self.mode != TSC_DEADLINE:
            self._start(left * divisor)

    @property
    def deadline(self) -> int:
        """The TSC-deadline MSR: the guest TSC that it waits for, 0 if disarmed or expired."""
        return self._deadline if self.hrtimer.expires_ns is not None else 0

    def set_deadline(self, deadline: int) -> None:
        """Write of the TSC-deadline MSR in TSC-deadline mode: arm for the guest TSC `deadline`; 0 disarms, the past fires at once."""
        self._deadline = deadline
        expiry = self._vcpu.tsc.expiry_of(deadline) if deadline else None
        if expiry is not None:
            self.hrtimer.start(min(expiry, FOREVER_NS))
            return
        self.hrtimer.cancel()
        if deadline:
            self._fire()

    def current_count(self) -> int:
        """The current count register."""
        expires, period = self.hrtimer.expires_ns, self.period_ns
        if expires is None or period == 0:
            return 0
        left = max(expires - self._clock.monotonic_ns(), 0)
        return min(left, period) // self.divisor

    def restore(self, initial_count: int, current_count: int) -> None:
        """Continue a count that stood at `current_count` of `initial_count` when it was saved."""
        self.hrtimer.cancel()
        if self.mode == TSC_DEADLINE:
            return
        self.initial_count = initial_count
        left = min(current_count * self.divisor, self.period_ns)
        if left == 0 and self.mode == PERIODIC:
            left = self.period_ns
        self._start(left)

    @property
    def period_ns(self) -> int:
        """Length of a whole count."""
        period = self.initial_count * self.divisor
        return max(period, MIN_PERIOD_NS) if self.mode == PERIODIC and period else period

    def _start(self, delay_ns: int) -> None:
        if self.initial_count == 0:
            self.hrtimer.cancel()
        else:
            self.hrtimer.start(self._clock.monotonic_ns() + delay_ns)

    def _expired(self, now: int) -> int | None:
        following = None
        if self.mode == PERIODIC and (period := self.period_ns):
            missed = max(now - self.hrtimer.expiry, 0) // period
            following = self.hrtimer.expiry + (missed + 1) * period
        self._fire()
        return following


def divisor_of(register: int) -> int:
    """The divisor that a divide configuration register selects: bits 3, 1, 0 (SDM vol. 3, figure 11-10)."""
    power = (register >> 1 & 4 | register & 3) + 1
    return 1 << (power & 7)
