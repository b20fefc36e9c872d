"""Soft events on VMX: INT n, INT3 and INTO, injected with the length of their instruction, which every exit tells.

Answers to Linux 6.1 `__vmx_complete_interrupts()` in `arch/x86/kvm/vmx/vmx.c` and SDM vol. 3, 26.6.1 and 28.2.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


def prepare_soft_event(vcpu: Vcpu, vector: int) -> bool:
    """Let the event return behind its instruction."""
    vcpu.control.event_instruction_length = vcpu.events.instruction_length
    return True


def soft_event_cut_short(vcpu: Vcpu, entered: bool) -> None:
    """The event is to be injected again: the exit tells the length, unless the entry never was and KVM knows it still."""
    if entered:
        vcpu.events.instruction_length = vcpu.exit.instruction_length
