"""The clocks of a VM, for whoever wants to look: what Linux shows of each vCPU in debugfs, and what the TSC's offsets and kvmclock rest on.

Answers to Linux 6.1 `arch/x86/kvm/debugfs.c` (`tsc-offset`, `tsc-scaling-ratio`, `tsc-scaling-ratio-frac-bits`); the rest, which Linux has
in memory only (`struct kvm_arch`, `struct kvm_vcpu_arch`), has those structures' names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from softkvm.kvm.kvmclock import MSR_ENABLED, TimeInfo

if TYPE_CHECKING:
    from softkvm.kvm.types import Vcpu, Vm


@dataclass(frozen=True, slots=True)
class VcpuTscStatus:
    """One vCPU's TSC and kvmclock page."""

    vcpu_id: int
    tsc_offset: int
    """L1's, as two's complement of 64 bits."""
    tsc_scaling_ratio: int
    """In units of 2^-frac_bits."""
    tsc_scaling_ratio_frac_bits: int
    virtual_tsc_khz: int
    tsc_catchup: bool
    """Whether the rate is kept by a jump at each VM exit, for want of scaling."""
    this_tsc_generation: int
    matched: bool
    """Whether it is of the VM's current generation."""
    guest_tsc: int
    """Its TSC when the host's was `TscStatus.host_tsc`."""
    ia32_tsc_adjust: int
    kvmclock_page: int | None
    """Guest-physical address of the time info that the guest has asked for."""
    hv_clock: TimeInfo | None
    """What was last written there."""


@dataclass(frozen=True, slots=True)
class TscStatus:
    """A VM's clocks at one instant."""

    host_tsc: int
    host_tsc_khz: int
    cur_tsc_generation: int
    nr_vcpus_matched_tsc: int
    """vCPUs of the current generation, not counting the one that began it."""
    online_vcpus: int
    use_master_clock: bool
    master_cycle_now: int
    """The host's TSC at the master clock's instant."""
    master_kernel_ns: int
    """The host's boot time then, in ns."""
    kvmclock_offset: int
    """From boot time to kvmclock, in ns."""
    kvmclock: int
    """kvmclock at `host_tsc`, in ns."""
    realtime: int
    """CLOCK_REALTIME at `host_tsc`, in ns since 1970."""
    vcpus: list[VcpuTscStatus]


def read(vm: Vm) -> TscStatus:
    """The clocks of `vm` now; for any thread."""
    realtime, host_tsc = vm.clock.realtime_and_tsc()
    clock = vm.kvmclock.pair()
    return TscStatus(
        host_tsc=host_tsc,
        host_tsc_khz=vm.clock.tsc_khz,
        cur_tsc_generation=vm.tsc.current.number,
        nr_vcpus_matched_tsc=vm.tsc.vcpus_matched,
        online_vcpus=len(vm.vcpus),
        use_master_clock=clock.use_master_clock,
        master_cycle_now=clock.cycle_now,
        master_kernel_ns=clock.kernel_ns,
        kvmclock_offset=clock.offset,
        kvmclock=vm.kvmclock.at(host_tsc),
        realtime=realtime,
        vcpus=[_of_vcpu(vcpu, host_tsc) for vcpu in vm.vcpus],
    )


def _of_vcpu(vcpu: Vcpu, host_tsc: int) -> VcpuTscStatus:
    tsc, pvclock = vcpu.tsc, vcpu.pvclock
    return VcpuTscStatus(
        vcpu_id=vcpu.vcpu_id,
        tsc_offset=tsc.offset,
        tsc_scaling_ratio=tsc.hardware_ratio,
        tsc_scaling_ratio_frac_bits=vcpu.vm.tsc.precision,
        virtual_tsc_khz=tsc.khz,
        tsc_catchup=tsc.catchup,
        this_tsc_generation=tsc.generation.number,
        matched=tsc.generation.number == vcpu.vm.tsc.current.number,
        guest_tsc=tsc.read(host_tsc),
        ia32_tsc_adjust=tsc.adjust,
        kvmclock_page=pvclock.system_time_msr & ~MSR_ENABLED if pvclock.active else None,
        hv_clock=pvclock.hv_clock,
    )
