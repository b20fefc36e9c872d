"""Halt polling: when a vCPU polls, what it counts, and how the time adapts itself to the guest."""

from __future__ import annotations

import errno

import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import KHZ_NSEC, HrTimer, VirtualClock
from softkvm.kvm import Parameters, Vcpu, Vm, halt, msr
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import leave, out_of_guest

US = 1000
START, LONGEST = 10 * US, 200 * US


class Waiting:
    """In place of the wake-up of a vCPU: virtual time passes while it waits, until the NMI that ends the halt."""

    def __init__(self, vcpu: Vcpu, clock: VirtualClock) -> None:
        self.vcpu, self.clock = vcpu, clock
        self.woken = self.preempted = False
        self.polls: list[int] = []
        self.sleeps = 0
        vcpu.wakeup = self

    def is_set(self) -> bool:
        return self.woken

    def clear(self) -> None:
        self.woken = False

    def set(self) -> None:
        self.woken = True

    def poll(self, ns: int) -> bool:
        self.polls.append(ns)
        if not self.preempted:
            self.clock.advance(ns)
        return self.woken

    def wait(self, timeout: float | None = None) -> bool:
        self.sleeps += 1
        assert timeout is not None
        self.clock.advance(round(timeout * 1e9))
        return self.woken

    def halt(self, play: Script, ns: int) -> None:
        """HLT, which an NMI ends after `ns`."""
        self.polls.clear()
        self.sleeps = 0
        HrTimer(self.clock, lambda now: self.vcpu.queue_nmi()).start(self.clock.monotonic_ns() + ns)
        out_of_guest(self.vcpu, play, leave(self.vcpu, "hlt"))


@pytest.fixture
def waiting(vcpu: Vcpu, clock: VirtualClock) -> Waiting:
    return Waiting(vcpu, clock)


def test_short_halts_are_polled_and_long_ones_end_it(waiting: Waiting, play: Script) -> None:
    times = []
    for ns in (50 * US, 50 * US, 50 * US, 50 * US, 50 * US, 300 * US, 50 * US):
        waiting.halt(play, ns)
        times.append(waiting.vcpu.halt_poll_ns)
    assert times == [START, 2 * START, 4 * START, 8 * START, 8 * START, 0, START]
    stats = waiting.vcpu.statistics()
    assert (stats["halt_exits"], stats["halt_attempted_poll"], stats["halt_successful_poll"]) == (7, 5, 1)
    assert stats["halt_poll_success_ns"] == 50 * US
    assert stats["halt_poll_fail_ns"] == (10 + 20 + 40 + 80) * US
    assert stats["halt_wait_ns"] == (50 + 40 + 30 + 10 + 220 + 50) * US


def test_a_poll_that_succeeds_does_not_sleep(waiting: Waiting, play: Script) -> None:
    waiting.vcpu.halt_poll_ns = LONGEST
    waiting.halt(play, 70 * US)
    assert (waiting.polls, waiting.sleeps) == ([70 * US], 0)
    assert waiting.vcpu.statistics()["halt_wait_ns"] == 0


def test_it_grows_to_the_limit(waiting: Waiting, play: Script) -> None:
    waiting.vcpu.halt_poll_ns = LONGEST - 30 * US
    waiting.halt(play, LONGEST - 10 * US)
    waiting.halt(play, 100 * US)
    assert waiting.vcpu.halt_poll_ns == LONGEST


def test_others_who_want_the_processor_get_it(waiting: Waiting, play: Script) -> None:
    waiting.vcpu.halt_poll_ns = LONGEST
    waiting.preempted = True
    waiting.halt(play, 70 * US)
    assert (waiting.polls, waiting.sleeps) == ([70 * US], 1)


def test_parameters_of_the_module(model: silicon.Model, clock: VirtualClock, play: Script) -> None:
    parameters = Parameters.parse(["halt_poll_ns=90000", "halt_poll_ns_grow=5", "halt_poll_ns_grow_start=3000", "halt_poll_ns_shrink=4"])
    system = kvm.System(model, parameters)
    with system.create_vm(clock=clock) as vm:
        vm.create_irqchip()
        waiting = Waiting(ready(vm.create_vcpu(0), system), clock)
        times = []
        for ns in (80 * US, 80 * US, 80 * US, 100 * US, 100 * US, 100 * US):
            waiting.halt(play, ns)
            times.append(waiting.vcpu.halt_poll_ns)
    assert times == [3000, 15_000, 75_000, 18_750, 4687, 0]


def test_without_growth_there_is_none(model: silicon.Model, clock: VirtualClock, play: Script) -> None:
    system = kvm.System(model, Parameters(halt_poll_ns_grow=0))
    with system.create_vm(clock=clock) as vm:
        vm.create_irqchip()
        waiting = Waiting(ready(vm.create_vcpu(0), system), clock)
        waiting.halt(play, 50 * US)
        assert waiting.vcpu.halt_poll_ns == 0


def test_a_guest_that_polls_itself_keeps_its_host_from_it(waiting: Waiting, play: Script) -> None:
    vcpu = waiting.vcpu
    vcpu.halt_poll_ns = LONGEST
    msr.set(vcpu, uapi.MSR_KVM_POLL_CONTROL, 0, True)
    waiting.halt(play, 50 * US)
    assert (waiting.polls, vcpu.halt_poll_ns) == ([], LONGEST)
    msr.set(vcpu, uapi.MSR_KVM_POLL_CONTROL, 1, True)
    waiting.halt(play, 50 * US)
    assert waiting.polls == [50 * US]


def cap_halt_poll(vm: Vm, ns: int, **other: int) -> None:
    vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_HALT_POLL, args=(ns, 0, 0, 0), **other))


def test_the_capability_is_the_vms_own_limit(vm: Vm, waiting: Waiting, play: Script) -> None:
    assert vm.check_extension(uapi.KVM_CAP_HALT_POLL) == 1
    vcpu = waiting.vcpu
    for ns in (0, 30 * US, (1 << 32) - 1):
        vcpu.halt_poll_ns = LONGEST
        cap_halt_poll(vm, ns)
        waiting.halt(play, 150 * US)
        assert waiting.polls == ([min(ns, 150 * US)] if ns else [])
    for flags, ns in ((1, 0), (0, 1 << 32)):
        with pytest.raises(OSError, match=r"\w") as error:
            cap_halt_poll(vm, ns, flags=flags)
        assert error.value.errno == errno.EINVAL
    assert vm.max_halt_poll_ns == (1 << 32) - 1


def ticks(vcpu: Vcpu, ns: int) -> int:
    return ns * vcpu.clock.tsc_khz // KHZ_NSEC


def test_the_core_polls_the_next_halt_for_as_long_as_kvm_would(waiting: Waiting, play: Script) -> None:
    vcpu = waiting.vcpu
    for ns, window in ((50 * US, START), (50 * US, 2 * START), (300 * US, 0)):
        waiting.halt(play, ns)
        assert vcpu.control.halt_window == ticks(vcpu, window)


def test_what_the_core_has_polled_is_not_polled_again(waiting: Waiting, play: Script) -> None:
    vcpu = waiting.vcpu
    vcpu.halt_poll_ns = 4 * START
    vcpu.block.apic.halt_waited = ticks(vcpu, 4 * START)
    waiting.halt(play, 50 * US)
    assert (waiting.polls, waiting.sleeps, vcpu.halt_poll_ns) == ([], 1, 8 * START)
    stats = vcpu.statistics()
    assert (stats["halt_attempted_poll"], stats["halt_successful_poll"]) == (1, 0)
    assert (stats["halt_poll_fail_ns"], stats["halt_wait_ns"]) == (4 * START, 50 * US)
    waiting.halt(play, 50 * US)
    assert waiting.polls == [50 * US], "the next one"


def test_a_timer_that_ends_the_wait_of_the_core_is_what_it_waited_for(waiting: Waiting, play: Script) -> None:
    vcpu = waiting.vcpu
    vcpu.halt_poll_ns = LONGEST
    vcpu.block.apic.halt_waited = ticks(vcpu, 70 * US)
    waiting.halt(play, 0)
    assert (waiting.polls, waiting.sleeps) == ([], 0)
    stats = vcpu.statistics()
    assert (stats["halt_attempted_poll"], stats["halt_successful_poll"], stats["halt_poll_success_ns"]) == (1, 1, 70 * US)


def test_polls_of_the_core_that_an_interrupt_ended_count(vcpu: Vcpu) -> None:
    vcpu.block.apic.halts, vcpu.block.apic.halt_cycles = 3, ticks(vcpu, 60 * US)
    stats = vcpu.statistics()
    assert (stats["halt_attempted_poll"], stats["halt_successful_poll"], stats["halt_poll_success_ns"]) == (3, 3, 60 * US)


def test_whoever_changes_what_is_polled_has_the_next_halt_exit(vm: Vm, vcpu: Vcpu) -> None:
    vcpu.control.halt_window = 1
    msr.set(vcpu, uapi.MSR_KVM_POLL_CONTROL, 0, True)
    assert vcpu.control.halt_window == 0
    vcpu.control.halt_window = 1
    cap_halt_poll(vm, 0)
    assert vcpu.control.halt_window == 0


def test_guests_that_take_turns_are_not_polled(vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    assert halt.max_poll_ns(vcpu) == LONGEST
    monkeypatch.setattr(vcpu.vm, "turns", object())
    assert halt.max_poll_ns(vcpu) == 0
