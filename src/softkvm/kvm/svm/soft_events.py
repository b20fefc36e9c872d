"""Soft events on SVM: INT n, INT3 and INTO, whose injection needs to know where the instruction ends.

Answers to Linux 6.1 `svm_update_soft_interrupt_rip()` and `svm_complete_soft_interrupt()` in `arch/x86/kvm/svm/svm.c`, and to APM vol. 2,
15.7.1 and 15.20. SVM tells no length of the instruction whose event was cut short, and clears the next RIP at that exit. With NRIPS, KVM
stuffs the VMCB's next RIP and leaves RIP and RFLAGS alone; without, it steps over the instruction before the injection and back if that
is cut short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate, events, regs

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_U32 = 0xFFFF_FFFF


def prepare_soft_event(vcpu: Vcpu, vector: int) -> bool:
    """Let the event return behind its instruction at RIP; False if that cannot be decoded (any more): the guest shall execute it again."""
    queue, state = vcpu.events, vcpu.state
    rip = state.rip
    if queue.soft_return is not None and queue.soft_return[0] == rip:
        next_rip = queue.soft_return[1]  # from an injection that was cut short: the instruction's bytes may be gone
    else:
        length = emulate.soft_event_length(vcpu, vector)
        if length is None:
            return False
        next_rip = rip + length if regs.is_64_bit_mode(vcpu) else rip + length & _U32
        queue.soft_return = rip, next_rip
    vcpu.control.next_rip = next_rip
    if not vcpu.saves_next_rip:
        state.rip = next_rip
        state.rflags &= ~events.RFLAGS_RF
        state.interruptibility &= ~events.SHADOW
    return True


def soft_event_cut_short(vcpu: Vcpu, entered: bool) -> None:
    """The event is to be injected again: without NRIPS RIP goes back to its instruction, if it is still where KVM has put it."""
    known = vcpu.events.soft_return
    if known is not None and not vcpu.saves_next_rip and vcpu.state.rip == known[1]:
        vcpu.state.rip = known[0]
