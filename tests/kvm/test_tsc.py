"""`softkvm.kvm.tsc`: synchronisation of writes, offsets, rates. The cases follow `kvm_synchronize_tsc()` of Linux 6.1."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.host import trace
from softkvm.kvm import kvmclock, msr, request
from softkvm.kvm import tsc as tsc_rules
from softkvm.kvm.msr_index import IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE
from softkvm.uapi import kvm as uapi
from tests.kvm.fakes import FakeVcpu, FakeVm

U64 = (1 << 64) - 1
SECOND = 1_000_000_000


def test_the_first_vcpu_starts_at_zero_and_others_follow_it() -> None:
    vm = FakeVm()
    first = FakeVcpu(vm, 0)
    assert first.tsc.read() == 0
    assert vm.tsc.current.number == 1
    vm.clock.advance(5 * SECOND)
    second = FakeVcpu(vm, 1)
    assert second.tsc.offset == first.tsc.offset
    assert second.tsc.read() == 5 * SECOND * 2
    assert vm.tsc.vcpus_matched == 1
    assert vm.tsc.current.number == 1


def test_host_writes_within_a_second_give_the_current_offset_whatever_the_value() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    msr.set(first, IA32_TSC, 1 << 40, True)
    assert vm.tsc.current.number == 2
    vm.clock.advance(1_000_000)
    msr.set(second, IA32_TSC, (1 << 40) + 12345, True)
    assert second.tsc.offset == first.tsc.offset
    assert vm.tsc.vcpus_matched == 1


def test_a_write_further_away_begins_a_generation() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vm.clock.advance(SECOND)
    hertz = vcpu.tsc.khz * 1000
    msr.set(vcpu, IA32_TSC, vcpu.tsc.read() + hertz, True)  # exactly one second is too much
    assert vm.tsc.current.number == 2
    expected = vcpu.tsc.read()
    msr.set(vcpu, IA32_TSC, vcpu.tsc.read() + hertz - 1, True)
    assert vm.tsc.current.number == 2
    assert vcpu.tsc.read() == expected


def test_a_matched_write_of_the_same_vcpu_is_counted_once() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    msr.set(first, IA32_TSC, 1 << 40, True)
    for _ in range(3):
        msr.set(first, IA32_TSC, 1 << 40, True)
    assert vm.tsc.vcpus_matched == 0
    msr.set(second, IA32_TSC, 1 << 40, True)
    msr.set(second, IA32_TSC, 1 << 40, True)
    assert vm.tsc.vcpus_matched == 1


def test_another_rate_does_not_match() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    second.tsc.set_khz(1_000_000)
    msr.set(first, IA32_TSC, 1 << 40, True)
    msr.set(second, IA32_TSC, 1 << 40, True)
    assert vm.tsc.current.number == 3


def test_a_matched_generation_asks_for_the_master_clock() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    msr.set(first, IA32_TSC, 1 << 40, True)
    assert not first.take_requests() & request.REQ_MASTERCLOCK_UPDATE
    msr.set(second, IA32_TSC, 1 << 40, True)
    assert second.take_requests() & request.REQ_MASTERCLOCK_UPDATE


def test_guest_writes_move_tsc_and_adjust_together() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vm.clock.advance(SECOND)
    before = vcpu.tsc.read()
    msr.set(vcpu, IA32_TSC, before - (1 << 32) & U64, False)
    assert msr.get(vcpu, IA32_TSC_ADJUST, False) == -(1 << 32) & U64
    assert vcpu.tsc.read() == before - (1 << 32) & U64
    assert vm.tsc.current.number == 1


def test_guest_adjust_moves_the_tsc_and_host_adjust_does_not() -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vm.clock.advance(SECOND)
    before = vcpu.tsc.read()
    msr.set(vcpu, IA32_TSC_ADJUST, 1000, False)
    assert vcpu.tsc.read() == before + 1000
    msr.set(vcpu, IA32_TSC_ADJUST, 5000, True)
    assert vcpu.tsc.read() == before + 1000
    assert msr.get(vcpu, IA32_TSC_ADJUST, True) == 5000
    msr.set(vcpu, IA32_TSC_ADJUST, 4000, False)
    assert vcpu.tsc.read() == before


def test_offset_attribute() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    first.tsc.set_offset(1 << 48)
    assert first.tsc.offset == first.control.tsc_offset == 1 << 48
    assert first.tsc.read() == vm.clock.tsc() + (1 << 48)
    assert vm.tsc.vcpus_matched == 0
    second.tsc.set_offset(1 << 48)
    assert vm.tsc.vcpus_matched == 1
    assert second.take_requests() & request.REQ_MASTERCLOCK_UPDATE


@pytest.mark.parametrize(("vendor", "precision"), [("intel", 48), ("amd", 32)])
def test_scaling(vendor: str, precision: int) -> None:
    vm = FakeVm(vendor)
    vcpu = FakeVcpu(vm)
    vcpu.tsc.set_khz(3_000_000)
    assert vcpu.control.tsc_multiplier == (3 << precision) // 2 << 48 - precision
    assert vcpu.tsc.scale(1000) == 1500
    vcpu.tsc.set_khz(2_000_499)  # within 250 ppm: not worth it
    assert vcpu.control.tsc_multiplier == 1 << 48
    assert vcpu.tsc.khz == 2_000_499
    vcpu.tsc.set_khz(0)
    assert vcpu.tsc.khz == 2_000_000
    for khz in (1 << 31, -1):
        with pytest.raises(OSError, match=r"\[Errno 22\]"):
            vcpu.tsc.set_khz(khz)


def test_the_vms_rate_is_for_new_vcpus() -> None:
    vm = FakeVm()
    first = FakeVcpu(vm, 0)
    vm.tsc.set_default_khz(1_000_000)
    assert (first.tsc.khz, FakeVcpu(vm, 1).tsc.khz) == (2_000_000, 1_000_000)
    vm.tsc.set_default_khz(0)
    assert vm.tsc.default_khz == 2_000_000


@given(khz=st.integers(100_000, 8_000_000), ahead=st.integers(1, 1 << 40))
def test_waiting_for_a_tsc_value_is_neither_early_nor_late(khz: int, ahead: int) -> None:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vcpu.tsc.set_khz(khz)
    vcpu.tsc.set_offset(0)
    deadline = vcpu.tsc.read() + ahead
    expiry = vcpu.tsc.expiry_of(deadline)
    assert expiry is not None
    vm.clock.advance(expiry - vm.clock.monotonic_ns() - 1)
    assert vcpu.tsc.read() < deadline
    vm.clock.advance(1)
    assert vcpu.tsc.read() >= deadline
    assert vcpu.tsc.expiry_of(deadline) is None


@given(l1=st.integers(0, U64), l2=st.integers(0, U64))
def test_an_l2_without_scaling_adds_both_offsets(l1: int, l2: int) -> None:
    assert tsc_rules.nested_offset(l1, l2) == l1 + l2 & U64


def test_the_ratio_of_l2_scales_the_signed_offset_of_l1() -> None:
    four, half = 4 << 48, 1 << 47
    assert tsc_rules.nested_offset(-1000 & U64, 7, four) == -3993 & U64
    assert tsc_rules.nested_offset(1001, 0, half) == 500
    assert tsc_rules.nested_offset(-1001 & U64, 0, half) == -500 & U64
    assert tsc_rules.nested_ratio(four, half) == 2 << 48


def test_a_running_l2_gets_a_new_offset_of_l1_at_once_and_the_host_still_reads_l1s() -> None:
    vcpu = FakeVcpu(FakeVm())
    vcpu.tsc.enter_nested(-(1 << 48) & U64)
    vcpu.tsc.set_offset(1 << 50)
    assert vcpu.control.tsc_offset == (1 << 50) - (1 << 48)
    assert vcpu.tsc.offset == 1 << 50
    assert vcpu.tsc.read(0) == 1 << 50
    vcpu.tsc.leave_nested()
    assert vcpu.control.tsc_offset == 1 << 50


def test_amd_silicon_scales_by_less_than_256() -> None:
    for vendor, allowed in (("intel", True), ("amd", False)):
        vcpu = FakeVcpu(FakeVm(vendor))
        if allowed:
            vcpu.tsc.set_khz(600_000_000)
        else:
            with pytest.raises(OSError, match=r"\[Errno 22\]"):
                vcpu.tsc.set_khz(600_000_000)


# Silicon without TSC scaling


def test_without_scaling_a_slower_rate_is_refused_and_changes_nothing() -> None:
    vcpu = FakeVcpu(FakeVm("amd", scaling=False))
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        vcpu.tsc.set_khz(1_000_000)
    assert (vcpu.tsc.khz, vcpu.tsc.ratio, vcpu.tsc.catchup) == (2_000_000, 1 << 48, False)
    vcpu.tsc.set_khz(2_000_400)
    assert not vcpu.tsc.catchup


def test_without_scaling_a_faster_tsc_catches_up_and_never_goes_back() -> None:
    vm = FakeVm("amd", scaling=False)
    vcpu = FakeVcpu(vm)
    vcpu.tsc.set_khz(3_000_000)
    assert vcpu.tsc.catchup
    assert vcpu.control.tsc_multiplier == 1 << 48
    vm.clock.advance(SECOND)
    assert vcpu.tsc.read() == 2 * SECOND
    vcpu.make_request(request.REQ_CLOCK_UPDATE)
    kvmclock.service(vcpu, vcpu.take_requests())
    assert vcpu.tsc.read() == 3 * SECOND
    msr.set(vcpu, IA32_TSC, SECOND, False)  # the guest's own step back is not made up for
    vm.clock.advance(SECOND)
    vcpu.tsc.catch_up()
    assert vcpu.tsc.read() == 4 * SECOND
    vcpu.tsc.set_offset(100 * SECOND)
    before = vcpu.tsc.read()
    vcpu.tsc.catch_up()
    assert vcpu.tsc.read() == before
    assert vcpu.tsc.adjust == -2 * SECOND & U64
    vcpu.tsc.set_khz(0)
    assert not vcpu.tsc.catchup


def test_without_scaling_a_vm_may_ask_for_any_rate_and_its_vcpus_run_at_the_hosts() -> None:
    vm = FakeVm("amd", scaling=False)
    vm.tsc.set_default_khz(1_000_000)
    vcpu = FakeVcpu(vm)
    assert (vcpu.tsc.khz, vcpu.tsc.ratio, vcpu.tsc.catchup) == (1_000_000, 1 << 48, False)


def test_a_deadline_of_a_tsc_that_catches_up_is_at_its_own_rate() -> None:
    vm = FakeVm("amd", scaling=False)
    vcpu = FakeVcpu(vm)
    vcpu.tsc.set_khz(4_000_000)
    now = vm.clock.monotonic_ns()
    assert vcpu.tsc.expiry_of(vcpu.tsc.read() + 4 * SECOND) == now + SECOND


def test_a_tsc_that_catches_up_is_no_master_clock() -> None:
    vm = FakeVm("amd", scaling=False)
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    vm.kvmclock.update_masterclock()
    assert vm.kvmclock.use_master_clock
    second.tsc.set_khz(3_000_000)
    vm.kvmclock.update_masterclock()
    assert not vm.kvmclock.use_master_clock
    assert not first.tsc.catchup


# What a guest can do to itself, and to nobody else

WRITES = st.lists(
    st.tuples(st.sampled_from([IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE]), st.integers(0, U64), st.integers(0, 10 * SECOND)),
    max_size=20,
)


@given(writes=WRITES, scaling=st.booleans(), khz=st.sampled_from([2_000_000, 3_141_592]))
def test_random_writes_of_a_guest_harm_itself_only(writes: list[tuple[int, int, int]], scaling: bool, khz: int) -> None:
    vm = FakeVm("amd", scaling=scaling)
    vm.tsc.set_default_khz(khz)
    villain, other = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    vm.kvmclock.update_masterclock()
    before = (other.tsc.offset, other.tsc.adjust, vm.tsc.current, vm.tsc.vcpus_matched, vm.kvmclock.use_master_clock)
    base = villain.tsc.offset - villain.tsc.adjust & U64
    for index, value, pause in writes:
        expected = villain.tsc.read() - villain.tsc.adjust + value
        msr.set(villain, index, value, False)
        if index == IA32_TSC:
            assert msr.get(villain, IA32_TSC, False) == value
        elif index == IA32_TSC_ADJUST:
            assert (villain.tsc.adjust, villain.tsc.read()) == (value, expected & U64)
        if not villain.tsc.catchup:
            assert villain.tsc.offset - villain.tsc.adjust & U64 == base, "TSC and TSC_ADJUST move together"
        vm.clock.advance(pause)
        for vcpu in vm.vcpus:
            kvmclock.service(vcpu, vcpu.take_requests())
        assert (vm.tsc.current, vm.tsc.vcpus_matched, vm.kvmclock.use_master_clock) == before[2:]
    assert other.tsc.adjust == before[1]
    if not other.tsc.catchup:
        assert other.tsc.offset == before[0]
    assert abs(vm.kvmclock.get().clock - sum(pause for _, _, pause in writes)) < 100


# Tracepoints


def test_the_events_of_time() -> None:
    vm = FakeVm()
    first, second = FakeVcpu(vm, 0), FakeVcpu(vm, 1)
    lines: list[str] = []
    points = [trace.kvm_write_tsc_offset, trace.kvm_track_tsc, trace.kvm_update_master_clock, trace.kvm_pvclock_update]
    probes = [(point, partial(lambda point, *values: lines.append(f"{point.name}: {point.print(*values)}"), point)) for point in points]
    for point, probe in probes:
        point.register(probe)
    try:
        second.tsc.set_offset(77)
        msr.set(first, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0x1001, False)
        kvmclock.service(first, first.take_requests() | request.REQ_MASTERCLOCK_UPDATE)
    finally:
        for point, probe in probes:
            point.unregister(probe)
    offset = first.tsc.offset
    assert lines == [
        f"kvm_write_tsc_offset: vcpu=1 prev={offset} next=77",
        "kvm_track_tsc: vcpu_id 1 masterclock 0 offsetmatched 0 nr_online 2 hostclock tsc",
        "kvm_update_master_clock: masterclock 0 hostclock tsc offsetmatched 0",
        "kvm_pvclock_update: vcpu_id 0, pvclock { version 2, tsc_timestamp 0x0, system_time 0x0, "
        "tsc_to_system_mul 0x80000000, tsc_shift 0, flags 0x0 }",
    ]
