"""Time in a snapshot: kvmclock and the TSCs of all vCPUs, at one instant, carried over to another host's TSC.

Answers to Linux 6.1 `Documentation/virt/kvm/devices/vcpu.rst`, 4.1 (KVM_VCPU_TSC_OFFSET): kvmclock is set with the wall clock that it goes
with, so that it comes out ahead by the time between; every TSC is put ahead by as much, by its offset. vCPUs that were in phase get equal
offsets and are in phase again.
"""

from __future__ import annotations

from collections.abc import Sequence

from softkvm import kvm
from softkvm.uapi import kvm as uapi
from softkvm.vmm.snapshot.records import ClockState, VcpuState

_KHZ_NSEC = 1_000_000
_U64 = (1 << 64) - 1
_PAGE = 4096


def save(status: kvm.TscStatus) -> ClockState:
    """kvmclock and wall clock at the instant of `status`, at which `VcpuTscStatus.guest_tsc` are the TSCs."""
    return ClockState(kvmclock=status.kvmclock & _U64, realtime=status.realtime)


def restore(vm: kvm.Vm, vcpus: Sequence[kvm.Vcpu], clock: ClockState, states: Sequence[VcpuState]) -> tuple[int, int]:
    """Set kvmclock and the TSCs; the host's TSC at some instant since, and how many ns had passed by then since the snapshot."""
    vm.set_clock(uapi.ClockData(clock=clock.kvmclock, realtime=clock.realtime, flags=uapi.KVM_CLOCK_REALTIME))
    now = vm.tsc_status()
    passed = now.kvmclock - clock.kvmclock
    cell = kvm.allocate_memory(_PAGE)  # the attribute's value is passed by its address
    with memoryview(cell) as value:
        for vcpu, state, tsc in zip(vcpus, states, now.vcpus, strict=True):
            scaled = now.host_tsc * tsc.tsc_scaling_ratio >> tsc.tsc_scaling_ratio_frac_bits
            wanted = state.tsc + passed * state.tsc_khz // _KHZ_NSEC
            value[:8] = (wanted - scaled & _U64).to_bytes(8, "little")
            vcpu.set_device_attr(uapi.DeviceAttr(group=uapi.KVM_VCPU_TSC_CTRL, attr=uapi.KVM_VCPU_TSC_OFFSET, addr=cell.address))
    return now.host_tsc, passed
