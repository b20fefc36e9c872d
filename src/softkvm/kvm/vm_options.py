"""What user space may ask of a VM's behaviour: capabilities that KVM_ENABLE_CAP turns on, and the MSR filter.

Answers to Linux 6.1 `kvm_vm_ioctl_enable_cap()` in `arch/x86/kvm/x86.c` and `kvm_vm_ioctl_enable_cap_generic()` in `virt/kvm/kvm_main.c`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING

from softkvm.host import mm, static_call
from softkvm.kvm import capabilities, dirty_ring, lbr, msr_filter
from softkvm.kvm.ioctl import KvmFile, ioctl, takes, takes_pmu_event_filter
from softkvm.kvm.pmu.filter import EventFilter
from softkvm.kvm.pmu.offer import supported_capabilities
from softkvm.kvm.request import REQ_MSR_FILTER
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series

if TYPE_CHECKING:
    from softkvm.host.sched import Scheduler
    from softkvm.kvm.irqchip import Irqchip
    from softkvm.kvm.irqchip.routing import Routing
    from softkvm.kvm.mmu import Mmu
    from softkvm.kvm.params import Parameters
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.silicon import Model

_MAX_RESERVED_PINS = 4096


class VmOptions(KvmFile):
    """The part of a VM's file that configures it."""

    lock: RLock
    vcpus: list[Vcpu]
    irqchip: Irqchip | None
    mmu: Mmu
    smm_mmu: Mmu
    routing: Routing
    parameters: Parameters
    model: Model
    scheduler: Scheduler

    def init_options(self) -> None:
        """Linux's defaults."""
        self.msr_filter = msr_filter.MsrFilter()
        self.exception_payload = self.exit_on_emulation_failure = self.triple_fault_event = False
        self.enable_pmu = self.parameters.enable_pmu
        self.pmu_event_filter: EventFilter | None = None
        self.perf_capabilities = supported_capabilities(self.model) if self.enable_pmu and self.model.vendor == "intel" else 0
        """PERF_CAPABILITIES of new vCPUs."""
        self.guest_reads_platform_info = True
        """Whether guests may read PLATFORM_INFO."""
        self.user_space_msr = 0
        """KVM_MSR_EXIT_REASON_*: which refused MSR accesses go to user space."""
        self.disabled_exits = 0
        """KVM_X86_DISABLE_EXITS_*: of vCPUs to come."""
        self.max_halt_poll_ns: int | None = None
        """Longest time that a vCPU in HLT is polled for; None is the module's parameter."""
        self.max_vcpu_ids: int | None = None
        self.split_irqchip = False
        """The local APICs are in KVM, PIC and IOAPIC in user space."""
        self.reserved_ioapic_pins = 0
        """GSIs below are the pins of user space's IOAPIC: it hears of the end of their level-triggered interrupts."""

    @property
    def irqchip_in_kernel(self) -> bool:
        """Whether vCPUs have their local APIC in KVM."""
        return self.irqchip is not None or self.split_irqchip

    @ioctl(uapi.KVM_ENABLE_CAP, takes(uapi.EnableCap))
    def enable_cap(self, cap: uapi.EnableCap) -> None:
        """KVM_ENABLE_CAP; OSError(EINVAL) for flags, and for what cannot be enabled; others as the capability has them."""
        option = _OPTIONS.get(cap.cap)
        if cap.flags or option is None:
            raise OSError(errno.EINVAL, "bad flags, or no such capability")
        with self.lock:
            option(self, cap.args[0], cap.args[1])

    @ioctl(uapi.KVM_SET_PMU_EVENT_FILTER, takes_pmu_event_filter)
    def set_pmu_event_filter(self, header: uapi.PmuEventFilter, events: list[int]) -> None:
        """KVM_SET_PMU_EVENT_FILTER: counts from the next time that a counter is programmed; OSError EINVAL, E2BIG."""
        self.pmu_event_filter = EventFilter.make(header, events)

    @ioctl(uapi.KVM_X86_SET_MSR_FILTER, takes(uapi.MsrFilter))
    def x86_set_msr_filter(self, request: uapi.MsrFilter) -> None:
        """KVM_X86_SET_MSR_FILTER: which MSRs the guest may have, of those that it could; OSError EINVAL, EFAULT."""
        new = msr_filter.MsrFilter.make(request)
        with self.lock:
            self.msr_filter = new
        static_call.update()
        for vcpu in self.vcpus:
            vcpu.make_request(REQ_MSR_FILTER)

    def _enable_exception_payload(self, on: int, _more: int) -> None:
        self.exception_payload = bool(on)

    def _enable_exit_on_emulation_failure(self, on: int, _more: int) -> None:
        if on & ~1:
            raise OSError(errno.EINVAL, "neither on nor off")
        self.exit_on_emulation_failure = bool(on)

    def _enable_triple_fault_event(self, on: int, _more: int) -> None:
        self.triple_fault_event = bool(on)

    def _enable_platform_info(self, on: int, _more: int) -> None:
        self.guest_reads_platform_info = bool(on)

    def _enable_x2apic_api(self, flags: int, _more: int) -> None:
        if flags & ~capabilities.X2APIC_API:
            raise OSError(errno.EINVAL, "no such flags")
        self.routing.x2apic_format |= bool(flags & capabilities.X2APIC_API_USE_32BIT_IDS)
        self.routing.x2apic_broadcast_quirk &= not flags & capabilities.X2APIC_API_DISABLE_BROADCAST_QUIRK

    def _enable_pmu_capability(self, capability: int, _more: int) -> None:
        if capability & ~uapi.KVM_PMU_CAP_DISABLE or self.vcpus or not self.parameters.enable_pmu:
            raise OSError(errno.EINVAL, "no such PMU capability, or there are vCPUs")
        if capability & uapi.KVM_PMU_CAP_DISABLE:
            self.enable_pmu, self.perf_capabilities = False, 0

    def _enable_guest_lbr(self, enable: int, address: int) -> None:
        """KVM_CAP_X86_GUEST_LBR: tell user space what the records are like, then give or take them."""
        mm.copy_to_user(address, bytes(lbr.stack_for(self.scheduler.perf.pmu.layout, self.vcpus, bool(enable))))
        for vcpu in self.vcpus:
            with vcpu.ioctl_lock:
                lbr.enable_capability(vcpu, bool(enable))

    def _enable_user_space_msr(self, mask: int, _more: int) -> None:
        if mask & ~msr_filter.USER_SPACE_REASONS:
            raise OSError(errno.EINVAL, "no such reasons")
        self.user_space_msr = mask

    def _enable_disable_exits(self, mask: int, _more: int) -> None:
        if mask & ~_DISABLE_EXITS:
            raise OSError(errno.EINVAL, "no such exits")
        self.disabled_exits |= mask

    def _enable_max_vcpu_id(self, count: int, _more: int) -> None:
        if count > capabilities.MAX_VCPU_IDS or self.max_vcpu_ids not in (None, count):
            raise OSError(errno.EINVAL, "too many vCPU ids, or their number is fixed")
        if count:
            self.max_vcpu_ids = count

    def _enable_halt_poll(self, longest: int, _more: int) -> None:
        if longest >> 32:
            raise OSError(errno.EINVAL, "too many nanoseconds")
        self.max_halt_poll_ns = longest
        for vcpu in self.vcpus:
            vcpu.control.halt_window = 0  # the next HLT exits, and KVM chooses

    def _enable_split_irqchip(self, pins: int, _more: int) -> None:
        if pins > _MAX_RESERVED_PINS:
            raise OSError(errno.EINVAL, "too many pins")
        if self.irqchip_in_kernel or self.vcpus:
            raise OSError(errno.EEXIST, "there are interrupt chips, or vCPUs")
        self.split_irqchip, self.reserved_ioapic_pins = True, pins

    def _enable_manual_dirty_log_protect(self, mode: int, _more: int) -> None:
        enable, initially_set = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
        if mode & ~((enable | initially_set) if mode & enable else enable):
            raise OSError(errno.EINVAL, "no such mode")
        self.mmu.manual_protect = self.smm_mmu.manual_protect = mode

    def _enable_dirty_ring(self, size: int, _more: int) -> None:
        dirty_ring.check_size(size)
        if self.mmu.ring_size or self.vcpus:
            raise OSError(errno.EINVAL, "there are rings, or vCPUs without")
        self.mmu.ring_size = self.smm_mmu.ring_size = size


_DISABLE_EXITS = (
    uapi.KVM_X86_DISABLE_EXITS_MWAIT | uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE | uapi.KVM_X86_DISABLE_EXITS_CSTATE
)


_Option = Callable[[VmOptions, int, int], None]
_OPTIONS: dict[int, _Option] = {
    uapi.KVM_CAP_EXCEPTION_PAYLOAD: VmOptions._enable_exception_payload,
    uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE: VmOptions._enable_exit_on_emulation_failure,
    uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: VmOptions._enable_triple_fault_event,
    uapi.KVM_CAP_MSR_PLATFORM_INFO: VmOptions._enable_platform_info,
    uapi.KVM_CAP_X2APIC_API: VmOptions._enable_x2apic_api,
    uapi.KVM_CAP_PMU_CAPABILITY: VmOptions._enable_pmu_capability,
    uapi.KVM_CAP_X86_USER_SPACE_MSR: VmOptions._enable_user_space_msr,
    uapi.KVM_CAP_X86_DISABLE_EXITS: VmOptions._enable_disable_exits,
    uapi.KVM_CAP_MAX_VCPU_ID: VmOptions._enable_max_vcpu_id,
    uapi.KVM_CAP_HALT_POLL: VmOptions._enable_halt_poll,
    uapi.KVM_CAP_SPLIT_IRQCHIP: VmOptions._enable_split_irqchip,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: VmOptions._enable_manual_dirty_log_protect,
    uapi.KVM_CAP_DIRTY_LOG_RING: VmOptions._enable_dirty_ring,
    uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: VmOptions._enable_dirty_ring,
    series.KVM_CAP_X86_GUEST_LBR: VmOptions._enable_guest_lbr,
}
"""Capability -> what its first two arguments change; the VM's lock is held."""
