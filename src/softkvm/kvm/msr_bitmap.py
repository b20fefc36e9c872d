"""The MSR bitmap of a vCPU: which of its MSRs the guest uses without an exit.

Answers to SDM vol. 3, 25.6.9 and APM vol. 2, 15.11, and to `vmx_msr_filter_changed()` of Linux 6.1: what KVM passes through and what user
space filters are two things, and the guest has what both allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


def pass_through(vcpu: Vcpu, index: int, write: bool) -> None:
    """Let the guest read, or write, the MSR without an exit, unless user space filters it."""
    vcpu.msrs_passed_through.add((index, write))
    _set(vcpu, index, write)


def intercept(vcpu: Vcpu, index: int, write: bool) -> None:
    """The opposite."""
    vcpu.msrs_passed_through.discard((index, write))
    _set(vcpu, index, write)


def filter_changed(vcpu: Vcpu) -> None:
    """KVM_REQ_MSR_FILTER_CHANGED: look at the filter again."""
    for index, write in vcpu.msrs_passed_through:
        _set(vcpu, index, write)


def _set(vcpu: Vcpu, index: int, write: bool) -> None:
    bitmap = vcpu.block.msr_bitmap[1 if index >> 30 else 0][int(write)]
    byte, bit = (index & 0x1FFF) >> 3, 1 << (index & 7)
    if (index, write) in vcpu.msrs_passed_through and vcpu.vm.msr_filter.allows(index, write):
        bitmap[byte] &= ~bit
    else:
        bitmap[byte] |= bit
