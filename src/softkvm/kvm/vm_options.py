"""What user space may ask of a VM's behaviour: capabilities that KVM_ENABLE_CAP turns on, and the MSR filter.

Answers to Linux 6.1 `kvm_vm_ioctl_enable_cap()` in `arch/x86/kvm/x86.c` and `kvm_vm_ioctl_enable_cap_generic()` in `virt/kvm/kvm_main.c`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING

from softkvm.host import static_call
from softkvm.kvm import capabilities, dirty_ring, msr_filter
from softkvm.kvm.ioctl import KvmFile, ioctl, takes
from softkvm.kvm.request import REQ_MSR_FILTER
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.irqchip import Irqchip
    from softkvm.kvm.mmu import Mmu
    from softkvm.kvm.vcpu import Vcpu

_MAX_RESERVED_PINS = 4096


class VmOptions(KvmFile):
    """The part of a VM's file that configures it."""

    lock: RLock
    vcpus: list[Vcpu]
    irqchip: Irqchip | None
    mmu: Mmu

    def init_options(self) -> None:
        """Linux's defaults."""
        self.msr_filter = msr_filter.MsrFilter()
        self.user_space_msr = 0
        """KVM_MSR_EXIT_REASON_*: which refused MSR accesses go to user space."""
        self.disabled_exits = 0
        """KVM_X86_DISABLE_EXITS_*: of vCPUs to come."""
        self.max_vcpu_ids: int | None = None
        self.split_irqchip = False
        """The local APICs are in KVM, PIC and IOAPIC in user space."""
        self.reserved_ioapic_pins = 0
        """GSIs below are the pins of user space's IOAPIC: it hears of the end of their level-triggered interrupts."""

    @property
    def irqchip_in_kernel(self) -> bool:
        """Whether vCPUs have their local APIC in KVM."""
        return self.irqchip is not None or self.split_irqchip

    def enable_option(self, cap: int, argument: int) -> None:
        """KVM_ENABLE_CAP of a capability that only changes how the VM behaves; OSError(EINVAL) for any other."""
        option = _OPTIONS.get(cap)
        if option is None:
            raise OSError(errno.EINVAL, "no such capability")
        with self.lock:
            option(self, argument)

    @ioctl(uapi.KVM_X86_SET_MSR_FILTER, takes(uapi.MsrFilter))
    def x86_set_msr_filter(self, request: uapi.MsrFilter) -> None:
        """KVM_X86_SET_MSR_FILTER: which MSRs the guest may have, of those that it could; OSError EINVAL, EFAULT."""
        new = msr_filter.MsrFilter.make(request)
        with self.lock:
            self.msr_filter = new
        static_call.update()
        for vcpu in self.vcpus:
            vcpu.make_request(REQ_MSR_FILTER)

    def _enable_user_space_msr(self, mask: int) -> None:
        if mask & ~msr_filter.USER_SPACE_REASONS:
            raise OSError(errno.EINVAL, "no such reasons")
        self.user_space_msr = mask

    def _enable_disable_exits(self, mask: int) -> None:
        if mask & ~_DISABLE_EXITS:
            raise OSError(errno.EINVAL, "no such exits")
        self.disabled_exits |= mask

    def _enable_max_vcpu_id(self, count: int) -> None:
        if count > capabilities.MAX_VCPU_IDS or self.max_vcpu_ids not in (None, count):
            raise OSError(errno.EINVAL, "too many vCPU ids, or their number is fixed")
        if count:
            self.max_vcpu_ids = count

    def _enable_split_irqchip(self, pins: int) -> None:
        if pins > _MAX_RESERVED_PINS:
            raise OSError(errno.EINVAL, "too many pins")
        if self.irqchip_in_kernel or self.vcpus:
            raise OSError(errno.EEXIST, "there are interrupt chips, or vCPUs")
        self.split_irqchip, self.reserved_ioapic_pins = True, pins

    def _enable_manual_dirty_log_protect(self, mode: int) -> None:
        enable, initially_set = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET
        if mode & ~((enable | initially_set) if mode & enable else enable):
            raise OSError(errno.EINVAL, "no such mode")
        self.mmu.manual_protect = mode

    def _enable_dirty_ring(self, size: int) -> None:
        dirty_ring.check_size(size)
        if self.mmu.ring_size or self.vcpus:
            raise OSError(errno.EINVAL, "there are rings, or vCPUs without")
        self.mmu.ring_size = size


_DISABLE_EXITS = (
    uapi.KVM_X86_DISABLE_EXITS_MWAIT | uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE | uapi.KVM_X86_DISABLE_EXITS_CSTATE
)


_OPTIONS: dict[int, Callable[[VmOptions, int], None]] = {
    uapi.KVM_CAP_X86_USER_SPACE_MSR: VmOptions._enable_user_space_msr,
    uapi.KVM_CAP_X86_DISABLE_EXITS: VmOptions._enable_disable_exits,
    uapi.KVM_CAP_MAX_VCPU_ID: VmOptions._enable_max_vcpu_id,
    uapi.KVM_CAP_SPLIT_IRQCHIP: VmOptions._enable_split_irqchip,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: VmOptions._enable_manual_dirty_log_protect,
    uapi.KVM_CAP_DIRTY_LOG_RING: VmOptions._enable_dirty_ring,
    uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: VmOptions._enable_dirty_ring,
}
"""Capability -> what its first argument changes; the VM's lock is held."""
