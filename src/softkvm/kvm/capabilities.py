"""What KVM_CHECK_EXTENSION answers. Answers to Linux 6.1 `kvm_vm_ioctl_check_extension{,_generic}()`."""

from __future__ import annotations

from ctypes import sizeof

from softkvm.kvm import dirty_ring, mce
from softkvm.kvm.memslots import USER_MEM_SLOTS
from softkvm.uapi import kvm as uapi
from softkvm.uapi import kvmi, series

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
    uapi.KVM_CAP_SYS_ATTRIBUTES,
    uapi.KVM_CAP_SPLIT_IRQCHIP,
    uapi.KVM_CAP_X86_SMM,
    uapi.KVM_CAP_X86_MSR_FILTER,
    uapi.KVM_CAP_SET_GUEST_DEBUG,
    uapi.KVM_CAP_X86_ROBUST_SINGLESTEP,
    series.KVM_CAP_TSC_OFFSET,
    kvmi.V9.ioctls.capability,
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
    uapi.KVM_CAP_MULTI_ADDRESS_SPACE: 2,  # the guest's, and SMM's
    uapi.KVM_CAP_X86_USER_SPACE_MSR: uapi.KVM_MSR_EXIT_REASON_INVAL | uapi.KVM_MSR_EXIT_REASON_UNKNOWN | uapi.KVM_MSR_EXIT_REASON_FILTER,
    uapi.KVM_CAP_X86_DISABLE_EXITS: uapi.KVM_X86_DISABLE_EXITS_HLT
    | uapi.KVM_X86_DISABLE_EXITS_PAUSE
    | uapi.KVM_X86_DISABLE_EXITS_CSTATE
    | uapi.KVM_X86_DISABLE_EXITS_MWAIT,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET,
    uapi.KVM_CAP_DIRTY_LOG_RING: dirty_ring.MAX_SIZE,
    uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: dirty_ring.MAX_SIZE,
    uapi.KVM_CAP_SET_GUEST_DEBUG2: uapi.KVM_GUESTDBG_ENABLE
    | uapi.KVM_GUESTDBG_SINGLESTEP
    | uapi.KVM_GUESTDBG_USE_SW_BP
    | uapi.KVM_GUESTDBG_USE_HW_BP
    | uapi.KVM_GUESTDBG_INJECT_DB
    | uapi.KVM_GUESTDBG_INJECT_BP
    | uapi.KVM_GUESTDBG_BLOCKIRQ,
}


_TSC_CONTROL = frozenset({uapi.KVM_CAP_TSC_CONTROL, uapi.KVM_CAP_VM_TSC_CONTROL})


def check(cap: int, tsc_control: bool) -> int:
    """The capability's value, 0 if KVM does not have it; `tsc_control` says whether the silicon scales TSCs."""
    if cap in _TSC_CONTROL and not tsc_control:
        return 0
    return _VALUES.get(cap, 0)
