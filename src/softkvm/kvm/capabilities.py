"""What KVM_CHECK_EXTENSION answers. Answers to Linux 6.1 `kvm_vm_ioctl_check_extension{,_generic}()`."""

from __future__ import annotations

from ctypes import sizeof

from softkvm.kvm import mce
from softkvm.kvm.memslots import USER_MEM_SLOTS
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series

MAX_VCPUS = 1024
MAX_VCPU_IDS = 4096
X2APIC_API_USE_32BIT_IDS, X2APIC_API_DISABLE_BROADCAST_QUIRK = 1 << 0, 1 << 1
X2APIC_API = X2APIC_API_USE_32BIT_IDS | X2APIC_API_DISABLE_BROADCAST_QUIRK
_XSAVE_SIZE = 4096
_COALESCED_RING_PAGE = 2

_PRESENT = (
    uapi.KVM_CAP_IRQCHIP,
    uapi.KVM_CAP_HLT,
    uapi.KVM_CAP_USER_MEMORY,
    uapi.KVM_CAP_SET_TSS_ADDR,
    uapi.KVM_CAP_EXT_CPUID,
    uapi.KVM_CAP_CLOCKSOURCE,
    uapi.KVM_CAP_PIT,
    uapi.KVM_CAP_MP_STATE,
    uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
    uapi.KVM_CAP_USER_NMI,
    uapi.KVM_CAP_IRQ_INJECT_STATUS,
    uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
    uapi.KVM_CAP_IRQFD,
    uapi.KVM_CAP_PIT2,
    uapi.KVM_CAP_REINJECT_CONTROL,
    uapi.KVM_CAP_SET_BOOT_CPU_ID,
    uapi.KVM_CAP_PIT_STATE2,
    uapi.KVM_CAP_IOEVENTFD,
    uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR,
    uapi.KVM_CAP_INTERNAL_ERROR_DATA,
    uapi.KVM_CAP_VCPU_EVENTS,
    uapi.KVM_CAP_DEBUGREGS,
    uapi.KVM_CAP_ENABLE_CAP,
    uapi.KVM_CAP_XSAVE,
    uapi.KVM_CAP_XCRS,
    uapi.KVM_CAP_GET_TSC_KHZ,
    uapi.KVM_CAP_TSC_DEADLINE_TIMER,
    uapi.KVM_CAP_KVMCLOCK_CTRL,
    uapi.KVM_CAP_SIGNAL_MSI,
    uapi.KVM_CAP_READONLY_MEM,
    uapi.KVM_CAP_IRQFD_RESAMPLE,
    uapi.KVM_CAP_ENABLE_CAP_VM,
    uapi.KVM_CAP_IOAPIC_POLARITY_IGNORED,
    uapi.KVM_CAP_IOEVENTFD_NO_LENGTH,
    uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH,
    uapi.KVM_CAP_CHECK_EXTENSION_VM,
    uapi.KVM_CAP_IMMEDIATE_EXIT,
    uapi.KVM_CAP_GET_MSR_FEATURES,
    uapi.KVM_CAP_COALESCED_PIO,
    uapi.KVM_CAP_EXCEPTION_PAYLOAD,
    uapi.KVM_CAP_SREGS2,
    uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    uapi.KVM_CAP_VM_TSC_CONTROL,
    uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    uapi.KVM_CAP_TSC_CONTROL,
    uapi.KVM_CAP_VCPU_ATTRIBUTES,
    uapi.KVM_CAP_PMU_EVENT_FILTER,
    uapi.KVM_CAP_PMU_CAPABILITY,
    series.KVM_CAP_TSC_OFFSET,
)

_VALUES = {
    **dict.fromkeys(_PRESENT, 1),
    uapi.KVM_CAP_NR_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPU_ID: MAX_VCPU_IDS,
    uapi.KVM_CAP_NR_MEMSLOTS: USER_MEM_SLOTS,
    uapi.KVM_CAP_IRQ_ROUTING: 4096,
    uapi.KVM_CAP_COALESCED_MMIO: _COALESCED_RING_PAGE,
    uapi.KVM_CAP_ADJUST_CLOCK: uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC,
    uapi.KVM_CAP_SYNC_REGS: uapi.KVM_SYNC_X86_VALID_FIELDS,
    uapi.KVM_CAP_XSAVE2: _XSAVE_SIZE,
    uapi.KVM_CAP_X2APIC_API: X2APIC_API,
    series.KVM_CAP_X86_GUEST_LBR: sizeof(series.LbrStack),
    uapi.KVM_CAP_MCE: mce.MAX_BANKS,
}


def check(cap: int) -> int:
    """The capability's value, 0 if KVM does not have it."""
    return _VALUES.get(cap, 0)
