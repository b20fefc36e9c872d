"""Which local APIC a physical destination means, in a table, so that an IPI does not ask every APIC of a large VM.

Answers to `struct kvm_apic_map` and `kvm_recalculate_apic_map()` of Linux 6.1 `arch/x86/kvm/lapic.c`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from softkvm.kvm.irqchip import irq

if TYPE_CHECKING:
    from softkvm.kvm.irqchip.lapic_core import LapicCore
    from softkvm.kvm.types import Vm

_BROADCASTS = (irq.XAPIC_BROADCAST, irq.X2APIC_BROADCAST)


class ApicMap:
    """The table; all methods may be called from any thread."""

    def __init__(self, vm: Vm) -> None:
        """Of a VM's APICs, however many there will be."""
        self._vm = vm
        self._generation = 0
        self._table: tuple[int, dict[int, LapicCore]] = -1, {}
        """The generation that it is of, and the APICs by destination."""

    def forget(self) -> None:
        """An id, or whether an APIC is on, has changed."""
        self._generation += 1

    def physical(self, destination: int) -> LapicCore | None:
        """The only APIC that a physical destination means; None where there is no such, or several, as for a broadcast."""
        generation, by_destination = self._table
        if generation != self._generation:
            generation = self._generation  # before the APICs are looked at: a change meanwhile makes the table an old one
            by_destination = self._build()
            self._table = generation, by_destination
        return by_destination.get(destination)

    def _build(self) -> dict[int, LapicCore]:
        lapics = [vcpu.lapic for vcpu in self._vm.vcpus if vcpu.lapic is not None and vcpu.lapic.hw_enabled]
        named = [(name, lapic) for lapic in lapics for name in {lapic.apic_id, lapic.vcpu.vcpu_id}]
        times = Counter(name for name, _ in named)
        return {
            name: lapic
            for name, lapic in named
            if times[name] == 1 and name not in _BROADCASTS and lapic.matches(name, logical=False, is_ipi=True)
        }
