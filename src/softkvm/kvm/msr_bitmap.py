"""The MSR bitmap of a vCPU: which of its MSRs the guest uses without an exit. Answers to SDM vol. 3, 25.6.9 and APM vol. 2, 15.11."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.kvm.types import Vcpu


def pass_through(vcpu: Vcpu, index: int, write: bool) -> None:
    """Let the guest read, or write, the MSR without an exit."""
    vcpu.block.msr_bitmap[1 if index >> 30 else 0][int(write)][(index & 0x1FFF) >> 3] &= ~(1 << (index & 7))


def intercept(vcpu: Vcpu, index: int, write: bool) -> None:
    """The opposite."""
    vcpu.block.msr_bitmap[1 if index >> 30 else 0][int(write)][(index & 0x1FFF) >> 3] |= 1 << (index & 7)
