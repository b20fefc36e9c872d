"""`softkvm.kvm.kvmclock`: the pages in guest memory, the master clock, KVM_{GET,SET}_CLOCK, steal time."""

from __future__ import annotations

import struct
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import silicon
from softkvm.host.clock import VirtualClock
from softkvm.host.task import current
from softkvm.kvm import Parameters, System, Vm, kvmclock, msr, request
from softkvm.kvm.kvmclock import scale_delta, service, time_scale
from softkvm.kvm.msr import MsrError
from softkvm.kvm.vcpu_requests import IN_GUEST_MODE, OUTSIDE_GUEST_MODE
from softkvm.uapi import kvm as uapi
from tests.kvm.fakes import FakeVcpu, FakeVm

SECOND = 1_000_000_000
PAGE = 0x1000
WALL, SYSTEM = uapi.MSR_KVM_WALL_CLOCK_NEW, uapi.MSR_KVM_SYSTEM_TIME_NEW


def serve(vcpu: FakeVcpu) -> None:
    service(vcpu, vcpu.take_requests())


def page(vcpu: FakeVcpu) -> tuple[int, int, int, int, int, int]:
    return struct.unpack("<I4xQQIbB2x", vcpu.vm.memory.read(PAGE, 32))


def guest_ns(vcpu: FakeVcpu) -> int:
    """kvmclock as the guest computes it."""
    _, timestamp, system_time, multiplier, shift, _ = page(vcpu)
    return system_time + scale_delta(vcpu.tsc.read() - timestamp, shift, multiplier)


@given(st.integers(1_000_000, 10_000_000_000))
def test_scale_uses_all_bits_of_the_multiplier(hz: int) -> None:
    shift, multiplier = time_scale(hz)
    assert 1 << 31 <= multiplier < 1 << 32
    assert abs(scale_delta(hz << 4, shift, multiplier) - (SECOND << 4)) <= 16


@pytest.mark.parametrize("khz", [2_000_000, 1_234_567])
def test_the_guest_computes_the_vms_time(khz: int) -> None:
    vm = FakeVm()
    vm.tsc.set_default_khz(khz)
    vcpu = FakeVcpu(vm)
    vm.clock.advance(3 * SECOND)
    msr.set(vcpu, SYSTEM, PAGE | 1, False)
    serve(vcpu)
    vm.clock.advance(10 * SECOND)
    assert abs(guest_ns(vcpu) - 13 * SECOND) < 100
    assert abs(vm.kvmclock.get().clock - 13 * SECOND) < 100


def test_version_is_even_after_and_grows() -> None:
    vcpu = FakeVcpu(FakeVm())
    msr.set(vcpu, SYSTEM, PAGE | 1, False)
    versions = []
    for _ in range(3):
        vcpu.make_request(request.REQ_CLOCK_UPDATE)
        serve(vcpu)
        versions.append(page(vcpu)[0])
    assert versions == [2, 4, 6]


def test_stable_flag_follows_the_master_clock() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    msr.set(first, SYSTEM, PAGE | 1, False)
    serve(first)
    assert page(first)[5] == 0
    assert vm.kvmclock.get().flags == 0
    first.make_request(request.REQ_MASTERCLOCK_UPDATE)
    serve(first)
    assert page(first)[5] == 1
    assert second.take_requests() & request.REQ_CLOCK_UPDATE
    data = vm.kvmclock.get()
    assert data.flags == uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC
    assert data.host_tsc == vm.clock.tsc()
    assert data.realtime == vm.clock.realtime_ns()


def test_an_old_guest_on_the_boot_cpu_has_no_master_clock() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    msr.set(vcpu, uapi.MSR_KVM_SYSTEM_TIME, PAGE | 1, False)
    serve(vcpu)
    assert not vm.kvmclock.use_master_clock
    msr.set(vcpu, SYSTEM, PAGE | 1, False)
    serve(vcpu)
    assert vm.kvmclock.use_master_clock


def test_paused_flag_stays_until_the_guest_clears_it() -> None:
    vcpu = FakeVcpu(FakeVm())
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        vcpu.pvclock.set_guest_paused()
    msr.set(vcpu, SYSTEM, PAGE | 1, False)
    vcpu.pvclock.set_guest_paused()
    serve(vcpu)
    vcpu.make_request(request.REQ_CLOCK_UPDATE)
    serve(vcpu)
    assert page(vcpu)[5] & kvmclock.FLAG_GUEST_STOPPED
    vcpu.vm.memory.data[PAGE + 29] = 0
    vcpu.make_request(request.REQ_CLOCK_UPDATE)
    serve(vcpu)
    assert not page(vcpu)[5] & kvmclock.FLAG_GUEST_STOPPED


@pytest.mark.parametrize("index", [SYSTEM, WALL, uapi.MSR_KVM_STEAL_TIME])
def test_a_page_without_memory_is_left_alone(index: int) -> None:
    vcpu = FakeVcpu(FakeVm())
    msr.set(vcpu, index, 1 << 40 | (index != WALL), False)
    serve(vcpu)
    assert not any(vcpu.vm.memory.data)


def test_disabled_clock_is_not_written() -> None:
    vcpu = FakeVcpu(FakeVm())
    msr.set(vcpu, SYSTEM, PAGE, False)
    serve(vcpu)
    assert not any(vcpu.vm.memory.data)


def test_wall_clock_is_the_time_of_kvmclocks_zero() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    born = vm.clock.realtime_ns()
    vm.clock.advance(7 * SECOND + 5)
    msr.set(vcpu, WALL, 0x2000, False)
    version, seconds, nsec = struct.unpack("<III", vm.memory.read(0x2000, 12))
    assert version == 2
    assert seconds * SECOND + nsec == born
    assert msr.get(vcpu, WALL, False) == 0x2000


def test_set_clock() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vm.kvmclock.set(uapi.ClockData(clock=180 * SECOND))
    assert vm.kvmclock.get().clock == 180 * SECOND
    assert vcpu.take_requests() & request.REQ_CLOCK_UPDATE
    vm.clock.advance(SECOND)
    assert vm.kvmclock.get().clock == 181 * SECOND
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        vm.kvmclock.set(uapi.ClockData(flags=1))


@pytest.mark.parametrize(("ago", "gained"), [(180, 180), (-180, 0)])
def test_set_clock_with_realtime_never_steps_back(ago: int, gained: int) -> None:
    vm = FakeVm()
    FakeVcpu(vm)
    realtime = vm.clock.realtime_ns() - ago * SECOND
    vm.kvmclock.set(uapi.ClockData(clock=5 * SECOND, flags=uapi.KVM_CLOCK_REALTIME, realtime=realtime))
    assert vm.kvmclock.get().clock == (5 + gained) * SECOND


def test_system_time_is_not_negative_after_set_clock_to_zero() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    msr.set(vcpu, SYSTEM, PAGE | 1, False)
    vm.kvmclock.set(uapi.ClockData(clock=0))
    vm.clock.advance(50)
    serve(vcpu)
    assert page(vcpu)[2] < SECOND


def test_steal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = iter([1000, 1500, 1800])
    vcpu = FakeVcpu(FakeVm())
    monkeypatch.setattr(vcpu.vm.scheduler, "run_delay", lambda: next(delays))
    with pytest.raises(MsrError):
        msr.set(vcpu, uapi.MSR_KVM_STEAL_TIME, PAGE | 3, False)
    msr.set(vcpu, uapi.MSR_KVM_STEAL_TIME, PAGE | 1, False)
    stolen = []
    for _ in range(3):
        vcpu.make_request(request.REQ_STEAL_UPDATE)
        serve(vcpu)
        steal, version = struct.unpack("<QI", vcpu.vm.memory.read(PAGE, 12))
        assert version % 2 == 0
        stolen.append(steal)
    assert stolen == [0, 500, 800]


# Work that comes later


def test_a_page_that_is_set_refreshes_all_pages_a_moment_later() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    msr.set(first, SYSTEM, PAGE | 1, False)
    assert first.requests & request.REQ_GLOBAL_CLOCK_UPDATE
    serve(first)
    assert page(first)[0] == 2
    assert not second.requests
    vm.clock.advance(kvmclock.UPDATE_DELAY_NS // 2)
    msr.set(first, SYSTEM, PAGE | 1, False)  # one that is under way is not put off
    serve(first)
    vm.clock.advance(kvmclock.UPDATE_DELAY_NS // 2)
    assert first.requests == second.requests == request.REQ_CLOCK_UPDATE
    assert vm.clock.first_expiry is None


def test_pages_are_refreshed_every_five_minutes(vm: Vm, clock: VirtualClock) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.take_requests()
    for _ in range(2):
        clock.advance(kvmclock.SYNC_PERIOD_NS - 1)
        assert not vcpu.requests & request.REQ_CLOCK_UPDATE
        clock.advance(1)
        assert vcpu.take_requests() & request.REQ_CLOCK_UPDATE
    vm.close()
    assert clock.first_expiry is None


def test_periodic_refreshing_can_be_turned_off(model: silicon.Model, clock: VirtualClock) -> None:
    system = System(model, Parameters(kvmclock_periodic_sync=False))
    with system.create_vm(clock=clock) as vm:
        vm.create_vcpu(0)
        assert clock.first_expiry is None


def test_without_a_master_clock_a_vcpu_on_another_core_refreshes_all(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.load()
    assert vcpu.take_requests() & request.REQ_GLOBAL_CLOCK_UPDATE, "it never was on any"
    assert vcpu.yield_core()
    vcpu.load()
    assert not vcpu.take_requests() & request.REQ_GLOBAL_CLOCK_UPDATE


# The master clock changes while nobody is in the guest


def test_the_pair_changes_while_no_vcpu_is_in_the_guest(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, asleep = (vm.create_vcpu(number) for number in range(3))
    for vcpu in (first, second, asleep):
        vcpu.take_requests()
    asleep.blocked = True
    second.mode = IN_GUEST_MODE
    order: list[str] = []

    def kick() -> None:
        assert second.requests == request.REQ_MCLOCK_INPROGRESS, "it must not come back at once"
        order.append("kick")
        second.mode = OUTSIDE_GUEST_MODE

    def change() -> None:
        assert second.mode == OUTSIDE_GUEST_MODE
        order.append("change")

    monkeypatch.setattr(second, "kick_guest", kick)
    monkeypatch.setattr(vm.kvmclock, "_update_gtod_copy", change)
    vm.kvmclock.update_masterclock(by=first)
    assert order == ["kick", "change"]
    assert (first.requests, second.requests, asleep.requests) == (0, request.REQ_CLOCK_UPDATE, request.REQ_CLOCK_UPDATE)
    assert not asleep.wakeup.is_set(), "who sleeps finds the new page when it wakes"


def test_a_vcpu_on_its_way_into_the_guest_waits_for_the_new_pair(vm: Vm) -> None:
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    served = threading.Event()
    second.take_requests()

    def serve() -> None:
        service(second, second.take_requests())
        served.set()

    with vm.kvmclock._update(first):
        thread = threading.Thread(target=serve)
        thread.start()
        while second.requests:  # it has seen that a change is in progress
            time.sleep(0)
        assert not served.is_set()
    thread.join()
    assert second.take_requests() == request.REQ_CLOCK_UPDATE


def test_who_changes_the_clock_on_his_way_into_the_guest_does_not_wait_for_himself(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.task, vcpu.mode = current(), IN_GUEST_MODE
    vm.set_clock(uapi.ClockData(clock=SECOND))
    vcpu.task, vcpu.mode = None, OUTSIDE_GUEST_MODE
    assert vcpu.requests & request.REQ_CLOCK_UPDATE
