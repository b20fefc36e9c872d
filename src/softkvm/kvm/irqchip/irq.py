"""Interrupts on their way: from a source to the local APICs, and from the local APIC or PIC into the guest.

Answers to Linux 6.1 `arch/x86/kvm/{irq,irq_comm}.c` and the delivery part of `lapic.c`; SDM vol. 3, 11.6 (ICR and message fields).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softkvm.kvm.irqchip.lapic_core import LapicCore
    from softkvm.kvm.types import Vcpu, Vm

NO_INTERRUPT = -1

DM_FIXED, DM_LOWEST, DM_SMI, DM_REMRD, DM_NMI, DM_INIT, DM_STARTUP, DM_EXTINT = (mode << 8 for mode in range(8))
"""Delivery modes where the ICR, the LVT and MSI data hold them: bits 10..8."""

DM_MASK = 7 << 8
DEST_LOGICAL = 1 << 11
LEVEL_ASSERT = 1 << 14
TRIGGER_LEVEL = 1 << 15
SHORTHAND_MASK = 3 << 18
SHORTHAND_NONE, SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS = (kind << 18 for kind in range(4))
XAPIC_BROADCAST = 0xFF
X2APIC_BROADCAST = 0xFFFF_FFFF


@dataclass(slots=True)
class LapicIrq:
    """An interrupt message on the (virtual) APIC bus."""

    vector: int
    dest_id: int
    delivery_mode: int = DM_FIXED
    logical: bool = False
    level: bool = True
    level_triggered: bool = False
    shorthand: int = SHORTHAND_NONE
    redirection_hint: bool = False

    @property
    def lowest_priority(self) -> bool:
        """Whether one of the addressed APICs takes it for all."""
        return self.delivery_mode == DM_LOWEST or self.redirection_hint


def deliver(vm: Vm, irq: LapicIrq, source: LapicCore | None = None) -> int:
    """Bring a message to the APICs it addresses; `source` is the sender of an IPI.

    Returns the number of APICs that accepted it, 0 if all refused it, or -1 if it addresses none.
    """
    broadcast = irq.dest_id == XAPIC_BROADCAST and not irq.logical  # lowest priority among all means all, as in KVM
    if irq.lowest_priority and not broadcast:
        chosen = _lowest_priority(vm, irq, source)
        return NO_INTERRUPT if chosen is None else int(_accept(chosen, irq))
    accepted = NO_INTERRUPT
    for lapic in _addressed(vm, irq, source):
        accepted = max(accepted, 0) + _accept(lapic, irq)
    return accepted


def _accept(lapic: LapicCore, irq: LapicIrq) -> bool:
    return lapic.accept(irq.delivery_mode, irq.vector, irq.level, irq.level_triggered)


def _addressed(vm: Vm, irq: LapicIrq, source: LapicCore | None) -> Iterator[LapicCore]:
    if irq.shorthand == SHORTHAND_SELF:
        if source is not None:
            yield source
        return
    for vcpu in vm.vcpus:
        lapic = vcpu.lapic
        if lapic is None or not lapic.hw_enabled:
            continue
        if irq.shorthand == SHORTHAND_NONE:
            if lapic.matches(irq.dest_id, irq.logical, source is not None):
                yield lapic
        elif irq.shorthand == SHORTHAND_ALL or lapic is not source:
            yield lapic


def _lowest_priority(vm: Vm, irq: LapicIrq, source: LapicCore | None) -> LapicCore | None:
    """The APIC that wins the arbitration: KVM's vector hashing spreads vectors evenly and keeps each at one APIC."""
    candidates = [lapic for lapic in _addressed(vm, irq, source) if lapic.sw_enabled]
    return candidates[irq.vector % len(candidates)] if candidates else None


def pv_send_ipi(vm: Vm, bitmap_low: int, bitmap_high: int, first: int, icr: int, wide: bool) -> int:
    """KVM_HC_SEND_IPI: send `icr` to the APIC ids `first + n` for each bit n; bitmaps of 64 bits if `wide`, else of 32.

    Returns the number of APICs that accepted it, or -EINVAL for an ICR that names its destination itself.
    """
    if icr & (SHORTHAND_MASK | DEST_LOGICAL):
        return -errno.EINVAL
    width = 64 if wide else 32
    mask = (1 << width) - 1
    bitmap = bitmap_low & mask | (bitmap_high & mask) << width
    count = 0
    for vcpu in vm.vcpus:
        lapic, bit = vcpu.lapic, vcpu.vcpu_id - first
        if lapic is not None and 0 <= bit < 2 * width and bitmap >> bit & 1:
            count += lapic.accept(icr & DM_MASK, icr & 0xFF, bool(icr & LEVEL_ASSERT), bool(icr & TRIGGER_LEVEL))
    return count


def has_extint(vcpu: Vcpu) -> bool:
    """Whether an interrupt waits that does not come through the local APIC: from the PIC, or from KVM_INTERRUPT."""
    lapic = vcpu.lapic
    if lapic is None:
        return vcpu.userspace_irq != NO_INTERRUPT
    irqchip = vcpu.vm.irqchip
    if irqchip is None:
        return vcpu.userspace_irq != NO_INTERRUPT and lapic.accepts_pic
    return irqchip.pic.output and lapic.accepts_pic


def has_interrupt(vcpu: Vcpu) -> bool:
    """Whether an interrupt waits that ends HLT if RFLAGS.IF is set."""
    lapic = vcpu.lapic
    if lapic is not None and lapic.pending_vector() != NO_INTERRUPT:
        return True
    return has_extint(vcpu)


def has_injectable(vcpu: Vcpu) -> bool:
    """Whether an interrupt can be injected as soon as the guest's state lets it; the silicon delivers those of a virtual APIC by itself."""
    lapic = vcpu.lapic
    return has_extint(vcpu) if lapic is not None and lapic.virtual is not None else has_interrupt(vcpu)


def get_interrupt(vcpu: Vcpu) -> int:
    """Acknowledge the next interrupt, PIC before APIC, and return its vector; -1 if there is none."""
    lapic = vcpu.lapic
    if has_extint(vcpu):
        irqchip = vcpu.vm.irqchip
        if lapic is not None and irqchip is not None:
            return irqchip.pic.read_irq()
        vector, vcpu.userspace_irq = vcpu.userspace_irq, NO_INTERRUPT
        return vector
    return NO_INTERRUPT if lapic is None else lapic.acknowledge()
