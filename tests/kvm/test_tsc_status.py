"""`softkvm.kvm.tsc_status`: what is shown is what the clocks are, at one instant."""

from __future__ import annotations

import pytest

from softkvm import kvm
from softkvm.host.clock import VirtualClock
from softkvm.kvm.kvmclock import FLAG_TSC_STABLE, service
from softkvm.kvm.tsc import FRACTION_BITS, SVM_FRACTION_BITS
from softkvm.uapi import kvm as uapi

SECOND = 1_000_000_000
PAGE = 0x1000


def test_two_vcpus_in_phase_and_one_that_leaves(vm: kvm.Vm, clock: VirtualClock, ram: object) -> None:
    first, second = vm.create_vcpu(0), vm.create_vcpu(1)
    clock.advance(3 * SECOND)
    vm.set_clock(uapi.ClockData(clock=50 * SECOND))
    first.set_msrs({uapi.MSR_KVM_SYSTEM_TIME_NEW: PAGE | 1})
    service(first, first.requests)
    clock.advance(SECOND)
    status = vm.tsc_status()
    assert (status.host_tsc, status.host_tsc_khz, status.realtime) == (clock.tsc(), clock.tsc_khz, clock.realtime_ns())
    assert (status.cur_tsc_generation, status.nr_vcpus_matched_tsc, status.online_vcpus) == (1, 1, 2)
    assert status.use_master_clock
    assert status.kvmclock == 51 * SECOND
    assert status.master_kernel_ns + status.kvmclock_offset == 50 * SECOND
    shown = status.vcpus[0]
    assert shown.guest_tsc == first.tsc.read() == 4 * SECOND * clock.tsc_khz // 1_000_000
    assert shown.kvmclock_page == PAGE
    assert shown.hv_clock is not None
    assert (shown.hv_clock.system_time, shown.hv_clock.flags, shown.hv_clock.version) == (50 * SECOND, FLAG_TSC_STABLE, 2)
    assert status.vcpus[1].kvmclock_page is None
    second.set_tsc_offset(5)
    status = vm.tsc_status()
    assert [(shown.tsc_offset, shown.this_tsc_generation, shown.matched) for shown in status.vcpus] == [
        (first.get_tsc_offset(), 1, False),
        (5, 2, True),
    ]


def test_ratio_is_in_the_silicons_units(vm: kvm.Vm, clock: VirtualClock) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.set_tsc_khz(3 * clock.tsc_khz)
    (shown,) = vm.tsc_status().vcpus
    assert shown.tsc_scaling_ratio_frac_bits == (SVM_FRACTION_BITS if vm.model.vendor == "amd" else FRACTION_BITS)
    assert shown.tsc_scaling_ratio == 3 << shown.tsc_scaling_ratio_frac_bits
    assert shown.virtual_tsc_khz == 3 * clock.tsc_khz


@pytest.mark.parametrize("vcpus", [0, 1])
def test_without_anything(vm: kvm.Vm, vcpus: int) -> None:
    for number in range(vcpus):
        vm.create_vcpu(number)
    status = vm.tsc_status()
    assert not status.use_master_clock
    assert [shown.hv_clock for shown in status.vcpus] == [None] * vcpus
