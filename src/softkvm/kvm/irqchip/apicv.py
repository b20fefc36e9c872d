"""What the silicon has of a local APIC while it virtualizes it: interrupts arrive, end, and are sent to other vCPUs without an exit.

Answers to Linux 6.1 `kvm_vcpu_update_apicv()` of `arch/x86/kvm/x86.c`, `arch/x86/kvm/vmx/posted_intr.c` and `arch/x86/kvm/svm/avic.c`; SDM
vol. 3, ch. 30; APM vol. 2, 15.29. The silicon virtualizes x2APICs only. Interrupts for the vCPU are posted, by any thread; IRR and ISR are
the silicon's, in the control block, and belong to the thread that holds the vCPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm import silicon
from softkvm.kvm import msr_bitmap
from softkvm.kvm.irqchip.lapic_registers import X2APIC_MSR_FIRST, Reg
from softkvm.silicon.control import ControlBlock, VirtualApic
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_BYTES = 32
_APIC = offset_of(ControlBlock, "apic")
_IRR, _ISR, _EOI_EXIT = (_APIC + offset_of(VirtualApic, name) for name in ("irr", "isr", "eoi_exit"))
_WRITES = tuple(X2APIC_MSR_FIRST + register for register in (Reg.EOI, Reg.ICR, Reg.SELF_IPI))


class ApicV:
    """The silicon's part of one vCPU's local APIC."""

    def __init__(self, vcpu: Vcpu, wakeup: silicon.Wakeup) -> None:
        """Off: KVM has all of the APIC. `wakeup` is what the vCPU's thread waits on in HLT."""
        self._vcpu = vcpu
        self._state = vcpu.block.apic
        self._irr, self._isr, self._eoi_exit = (vcpu.block_memory[start : start + _BYTES] for start in (_IRR, _ISR, _EOI_EXIT))
        self.posted = silicon.PostedInterrupts(wakeup)
        """How any thread brings an interrupt to the vCPU."""

    def begin(self, irr: int, isr: int, tpr: int, icr: int) -> None:
        """Give the silicon the APIC with this state."""
        state = self._state
        self.irr, self.isr, state.tpr, state.icr, state.enable = irr, isr, tpr, icr, 1
        self._set_table(self.posted)
        for index in _WRITES:
            msr_bitmap.pass_through(self._vcpu, index, write=True)

    def end(self) -> None:
        """Take it back."""
        self._set_table(None)
        self._state.enable = 0
        for index in _WRITES:
            msr_bitmap.intercept(self._vcpu, index, write=True)

    def _set_table(self, posted: silicon.PostedInterrupts | None) -> None:
        self._vcpu.vm.ipi_table.set(self._vcpu.vcpu_id, posted)

    @property
    def irr(self) -> int:
        """Requested interrupts, with what was posted until now (`sync_pir_to_irr()`)."""
        posted = self.posted.take()
        if posted is None:
            return int.from_bytes(self._irr, "little")
        irr = int.from_bytes(self._irr, "little") | int.from_bytes(posted, "little")
        self._irr[:] = irr.to_bytes(_BYTES, "little")
        return irr

    @irr.setter
    def irr(self, value: int) -> None:
        self.posted.take()
        self._irr[:] = value.to_bytes(_BYTES, "little")

    @property
    def isr(self) -> int:
        """Interrupts in service."""
        return int.from_bytes(self._isr, "little")

    @isr.setter
    def isr(self, value: int) -> None:
        self._isr[:] = value.to_bytes(_BYTES, "little")

    @property
    def icr(self) -> int:
        """The last interrupt command."""
        return int(self._state.icr)

    @icr.setter
    def icr(self, value: int) -> None:
        self._state.icr = value

    def set_tpr(self, value: int) -> None:
        """The task priority has changed."""
        self._state.tpr = value

    def take_halt_waited(self) -> int:
        """How long the HLT that exited had waited on the core, in cycles of the host's TSC; 0 for one that was asked about before."""
        waited = int(self._state.halt_waited)
        if waited:
            self._state.halt_waited = 0
        return waited

    @property
    def halts(self) -> int:
        """HLTs that an interrupt ended on the core."""
        return int(self._state.halts)

    @property
    def halt_cycles(self) -> int:
        """How long these were, in cycles of the host's TSC."""
        return int(self._state.halt_cycles)

    def load_eoi_exitmap(self, vectors: int) -> None:
        """Exit at the end of these vectors (`vmx_load_eoi_exitmap()`)."""
        self._eoi_exit[:] = vectors.to_bytes(_BYTES, "little")
