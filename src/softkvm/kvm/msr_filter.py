"""MSRs that user space wants to refuse or to serve itself: KVM_X86_SET_MSR_FILTER and KVM_CAP_X86_USER_SPACE_MSR.

Answers to Linux 6.1 `kvm_vm_ioctl_set_msr_filter()`, `kvm_msr_allowed()`, `kvm_msr_user_space()` and `complete_fast_msr_access()` in
`arch/x86/kvm/x86.c`. A filter is about what the guest does; KVM_GET_MSRS and KVM_SET_MSRS pass it by.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from softkvm.host import mm
from softkvm.kvm import events, exits, msr
from softkvm.kvm.msr_kinds import MsrError
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

USER_SPACE_REASONS = uapi.KVM_MSR_EXIT_REASON_INVAL | uapi.KVM_MSR_EXIT_REASON_UNKNOWN | uapi.KVM_MSR_EXIT_REASON_FILTER
"""What KVM_CAP_X86_USER_SPACE_MSR can ask for."""
_RANGE_FLAGS = uapi.KVM_MSR_FILTER_READ | uapi.KVM_MSR_FILTER_WRITE
_X2APIC = range(0x800, 0x900)
_U32 = 0xFFFF_FFFF


class FilteredMsr(MsrError):
    """The filter does not let the guest have the MSR."""

    reason = uapi.KVM_MSR_EXIT_REASON_FILTER


class Range(NamedTuple):
    """MSRs from `base` on, each with a bit, 1 = allowed; `flags` say for which direction."""

    flags: int
    base: int
    nmsrs: int
    bitmap: bytes


class MsrFilter(NamedTuple):
    """A filter: the first range that has the MSR decides, the default for all others."""

    default_allow: bool = True
    ranges: tuple[Range, ...] = ()

    @classmethod
    def make(cls, request: uapi.MsrFilter) -> MsrFilter:
        """The filter that user space describes; OSError EINVAL for one that makes no sense, EFAULT for a bitmap that is not there."""
        if request.flags & ~uapi.KVM_MSR_FILTER_DEFAULT_DENY:
            raise OSError(errno.EINVAL, "bad flags")
        used = [one for one in request.ranges if one.nmsrs]
        deny = bool(request.flags & uapi.KVM_MSR_FILTER_DEFAULT_DENY)
        if deny and not used:
            raise OSError(errno.EINVAL, "a filter that denies everything")
        return cls(not deny, tuple(_range(one) for one in used))

    @property
    def is_open(self) -> bool:
        """Whether it lets everything pass."""
        return self.default_allow and not self.ranges

    def allows(self, index: int, write: bool) -> bool:
        """Whether the guest may have the MSR; the x2APIC's are not filtered."""
        if index in _X2APIC:
            return True
        kind = uapi.KVM_MSR_FILTER_WRITE if write else uapi.KVM_MSR_FILTER_READ
        for flags, base, nmsrs, bitmap in self.ranges:
            bit = index - base
            if flags & kind and 0 <= bit < nmsrs:
                return bool(bitmap[bit >> 3] >> (bit & 7) & 1)
        return self.default_allow


def _range(request: uapi.MsrFilterRange) -> Range:
    size = (request.nmsrs + 63) // 64 * 8
    if not request.flags or request.flags & ~_RANGE_FLAGS or size > uapi.KVM_MSR_FILTER_MAX_BITMAP_SIZE:
        raise OSError(errno.EINVAL, "bad range of MSRs")
    return Range(request.flags, request.base, request.nmsrs, mm.copy_from_user(request.bitmap, size))


# --- In place of `msr.get()` and `msr.set()` while there is a filter ------------------------------------------------------------------


def filtered_get(vcpu: Vcpu, index: int, host_initiated: bool) -> int:
    """The guest's RDMSR."""
    if not vcpu.vm.msr_filter.allows(index, write=False):
        raise FilteredMsr(index)
    return msr.get(vcpu, index, host_initiated)


def filtered_set(vcpu: Vcpu, index: int, value: int, host_initiated: bool) -> None:
    """The guest's WRMSR."""
    if not vcpu.vm.msr_filter.allows(index, write=True):
        raise FilteredMsr(index)
    msr.set(vcpu, index, value, host_initiated)


# --- What was refused ----------------------------------------------------------------------------------------------------------------


def refuse(vcpu: Vcpu, error: MsrError, value: int | None) -> int:
    """RDMSR (`value` None) or WRMSR cannot be done: user space does it, if it has asked for that kind; else #GP."""
    index = vcpu.gpr[1] & _U32
    if not vcpu.vm.user_space_msr & error.reason:
        events.inject_gp(vcpu)
        return 1
    shared = vcpu.kvm_run.msr
    shared.error, shared.reason, shared.index, shared.data = 0, error.reason, index, value or 0
    shared.pad[:] = [0] * 7
    if value is None:
        return vcpu.exit_to_user(uapi.KVM_EXIT_X86_RDMSR, _complete_rdmsr)
    return vcpu.exit_to_user(uapi.KVM_EXIT_X86_WRMSR, _complete_wrmsr)


def _complete_rdmsr(vcpu: Vcpu) -> int:
    shared, gpr = vcpu.kvm_run.msr, vcpu.gpr
    if not shared.error:
        gpr[0], gpr[2] = shared.data & _U32, shared.data >> 32
    return _complete_wrmsr(vcpu)


def _complete_wrmsr(vcpu: Vcpu) -> int:
    if vcpu.kvm_run.msr.error:
        events.inject_gp(vcpu)
        return 1
    return exits.skip(vcpu)
