"""The inside of a local APIC: modes, what arrives from the APIC bus, what the core takes.

Answers to SDM vol. 3, 11.4, 11.6 and 11.8 and Linux 6.1 `arch/x86/kvm/lapic.c`. IRR, ISR and TMR are Python integers with one bit per
vector, the other registers a list indexed as the register page is, by offset / 16. Interrupts arrive from any thread, so IRR and TMR
change under `lock`; everything else belongs to the thread that holds the vCPU.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import cpuid, request
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.irq import NO_INTERRUPT
from softkvm.kvm.irqchip.lapic_registers import (
    APIC_BASE_BSP,
    APIC_BASE_DEFAULT,
    APIC_BASE_ENABLE,
    APIC_BASE_X2APIC,
    DFR_CLUSTER,
    DFR_FLAT,
    LVT_MASKED,
    LVT_WRITABLE,
    SPIV_ENABLED,
    VERSION,
    Reg,
    x2apic_ldr,
)
from softkvm.kvm.irqchip.lapic_timer import LapicTimer

if TYPE_CHECKING:
    from softkvm.host.clock import HrTimer
    from softkvm.kvm.irqchip.apicv import ApicV
    from softkvm.kvm.types import Vcpu


_BIT = tuple(1 << vector for vector in range(256))
_U32 = 0xFFFF_FFFF


class LapicCore:
    """A local APIC; `accept()` is its bus side, `pending_vector()` and `acknowledge()` its core side."""

    def __init__(self, vcpu: Vcpu) -> None:
        """A local APIC after RESET, which also sets the vCPU's APIC base."""
        self.vcpu = vcpu
        self.lock = threading.Lock()
        self.regs = [0] * 64
        self.apicv: ApicV | None = None
        """How the silicon can virtualize the APIC, if it may."""
        self.virtual: ApicV | None = None
        """The same while it does."""
        self._irr = self._isr = self.tmr = 0
        self.pending_init = False
        self.sipi_vector: int | None = None
        """Vector of a start-up IPI that waits to be acted on; INIT discards it."""
        self.pv_unhalted = False
        """Set by KVM_HC_KICK_CPU: the vCPU leaves HLT once without an interrupt."""
        self.apic_timer = LapicTimer(vcpu, self._timer_fired)
        self.reset(init=False)

    # --- What the silicon may have ------------------------------------------------------------------------------------------------

    @property
    def irr(self) -> int:
        """Requested interrupts, a bit per vector."""
        return self._irr if self.virtual is None else self.virtual.irr

    @irr.setter
    def irr(self, value: int) -> None:
        if self.virtual is None:
            self._irr = value
        else:
            self.virtual.irr = value

    @property
    def isr(self) -> int:
        """Interrupts in service, a bit per vector."""
        return self._isr if self.virtual is None else self.virtual.isr

    @isr.setter
    def isr(self, value: int) -> None:
        if self.virtual is None:
            self._isr = value
        else:
            self.virtual.isr = value

    def update_virtual(self, allowed: bool) -> None:
        """`kvm_vcpu_update_apicv()`: let the silicon virtualize the APIC, or no longer; `allowed`: nothing outside it is against that."""
        apicv = self.apicv
        wanted = allowed and apicv is not None and self.hw_enabled and self.x2apic
        if apicv is None or wanted == (self.virtual is not None):
            return
        with self.lock:
            irr, isr = self.irr, self.isr
            if wanted:
                apicv.begin(irr, isr, self.regs[Reg.TPR], self.icr)
                self.virtual = apicv
            else:
                self.icr = apicv.icr
                self.virtual = None
                apicv.end()
            self.irr, self.isr = irr, isr

    def scan_ioapic(self) -> None:
        """`vcpu_scan_ioapic()`: let the ends of interrupts exit that an IOAPIC, or who listens to its pins, must hear of."""
        if self.virtual is not None:
            self.virtual.load_eoi_exitmap(self.vcpu.vm.routing.handled_vectors())

    @property
    def icr(self) -> int:
        """The interrupt command register of an x2APIC."""
        return self.regs[Reg.ICR] | self.regs[Reg.ICR2] << 32 if self.virtual is None else self.virtual.icr

    @icr.setter
    def icr(self, value: int) -> None:
        self.regs[Reg.ICR], self.regs[Reg.ICR2] = value & _U32, value >> 32
        if self.virtual is not None:
            self.virtual.icr = value

    # --- Modes ------------------------------------------------------------------------------------------------------------------

    @property
    def hw_enabled(self) -> bool:
        """Whether APIC_BASE enables the APIC."""
        return bool(self.vcpu.apic_base & APIC_BASE_ENABLE)

    @property
    def sw_enabled(self) -> bool:
        """Whether the spurious vector register enables the APIC."""
        return bool(self.regs[Reg.SPIV] & SPIV_ENABLED)

    @property
    def x2apic(self) -> bool:
        """Whether the APIC is in x2APIC mode."""
        return bool(self.vcpu.apic_base & APIC_BASE_X2APIC)

    @property
    def apic_id(self) -> int:
        """The id in the width of the mode."""
        register = self.regs[Reg.ID]
        return register if self.x2apic else register >> 24

    @property
    def lvtpc(self) -> int:
        """The LVT register for performance monitoring, which is in the control block: the silicon takes the guest's interrupts by it."""
        return int(self.vcpu.control.virtual_lvtpc)

    @lvtpc.setter
    def lvtpc(self, value: int) -> None:
        self.vcpu.control.virtual_lvtpc = value

    @property
    def timer(self) -> HrTimer:
        """The host timer behind the APIC timer."""
        return self.apic_timer.hrtimer

    def set_base(self, value: int) -> None:
        """Store APIC_BASE and change the mode as it says; the caller has checked the transition (`msr.py`)."""
        changed = self.vcpu.apic_base ^ value
        self.vcpu.apic_base = value
        if changed & APIC_BASE_ENABLE:
            cpuid.update_runtime(self.vcpu)
            if value & APIC_BASE_ENABLE:
                self.regs[Reg.ID] = (self.vcpu.vcpu_id & 0xFF) << 24
        if changed & value & APIC_BASE_X2APIC:
            self.regs[Reg.ID] = self.vcpu.vcpu_id
            self.regs[Reg.LDR] = x2apic_ldr(self.vcpu.vcpu_id)
        self.vcpu.vm.apic_map.forget()
        self.vcpu.pmu.choose_interrupts()
        self.vcpu.make_request(request.REQ_APICV_UPDATE)

    def reset(self, init: bool) -> None:
        """RESET, or INIT if `init`: INIT keeps APIC_BASE, the mode and the ids that come with it."""
        vcpu, regs = self.vcpu, self.regs
        bsp = vcpu.vcpu_id == vcpu.vm.boot_cpu_id
        self.apic_timer.reset()
        if not init:
            vcpu.apic_base = APIC_BASE_DEFAULT | APIC_BASE_ENABLE | (APIC_BASE_BSP if bsp else 0)
            if self.virtual is not None:
                vcpu.make_request(request.REQ_APICV_UPDATE)
        kept = (regs[Reg.ID], regs[Reg.LDR]) if self.x2apic else ((vcpu.vcpu_id & 0xFF) << 24, 0)
        with self.lock:
            regs[:] = [0] * 64
            self.irr = self.isr = self.tmr = self.icr = 0
        self.set_tpr(0)
        regs[Reg.ID], regs[Reg.LDR] = kept
        vcpu.vm.apic_map.forget()
        regs[Reg.VERSION] = VERSION
        regs[Reg.DFR] = DFR_FLAT
        regs[Reg.SPIV] = 0xFF
        for entry in LVT_WRITABLE:
            regs[entry] = LVT_MASKED
        self.lvtpc = LVT_MASKED
        if bsp:  # virtual wire mode without firmware: KVM's LINT0 quirk
            regs[Reg.LVT_LINT0] = irq.DM_EXTINT

    # --- Bus side ---------------------------------------------------------------------------------------------------------------

    def matches(self, dest_id: int, logical: bool, is_ipi: bool) -> bool:
        """Whether a message to `dest_id` is for this APIC."""
        x2apic = self.x2apic
        if x2apic and not is_ipi and dest_id == irq.XAPIC_BROADCAST and self.vcpu.vm.routing.x2apic_broadcast_quirk:
            return True
        if dest_id == (irq.X2APIC_BROADCAST if x2apic else irq.XAPIC_BROADCAST):
            return True
        if not logical:
            # An id above FFh means its vCPU even before that switches to x2APIC mode, as in KVM.
            return dest_id == (self.vcpu.vcpu_id if dest_id > 0xFF else self.apic_id)
        return self._matches_logical(dest_id, x2apic)

    def _matches_logical(self, dest_id: int, x2apic: bool) -> bool:
        ldr = self.regs[Reg.LDR]
        if x2apic:
            return ldr >> 16 == dest_id >> 16 and bool(ldr & dest_id & 0xFFFF)
        ldr >>= 24
        if self.regs[Reg.DFR] == DFR_FLAT:
            return bool(ldr & dest_id & 0xFF)
        if self.regs[Reg.DFR] == DFR_CLUSTER:
            return ldr >> 4 == dest_id >> 4 and bool(ldr & dest_id & 0xF)
        return False

    def accept(self, mode: int, vector: int, level: bool, level_triggered: bool) -> bool:
        """Take a message of delivery mode `mode` (`irq.DM_*`) from the bus; False if the APIC refuses it."""
        if mode in (irq.DM_FIXED, irq.DM_LOWEST):
            return self.accept_vector(vector, level, level_triggered)
        if mode == irq.DM_NMI:
            self.vcpu.queue_nmi()
        elif mode == irq.DM_INIT:
            if level_triggered and not level:  # INIT level de-assert synchronises arbitration ids only: SDM vol. 3, 11.6.1
                return False
            self.pending_init, self.sipi_vector = True, None
            self.vcpu.make_request(request.REQ_EVENT)
        elif mode == irq.DM_STARTUP:
            self.sipi_vector = vector
            self.vcpu.make_request(request.REQ_EVENT)
        elif mode == irq.DM_REMRD:  # KVM's own use of this mode: a paravirtual kick
            self.pv_unhalted = True
            self.vcpu.make_request(request.REQ_UNHALT)
        elif mode == irq.DM_SMI:
            self.vcpu.make_request(request.REQ_SMI)
        else:  # ExtINT comes over LINT0
            return False
        return True

    def accept_vector(self, vector: int, level: bool, level_triggered: bool) -> bool:
        """Take a fixed interrupt; False if the APIC is off, or for the falling edge of a level-triggered one."""
        if (level_triggered and not level) or not self.hw_enabled or not self.sw_enabled:
            return False
        bit = _BIT[vector]
        with self.lock:
            self.tmr = self.tmr | bit if level_triggered else self.tmr & ~bit
            virtual = self.virtual
            if virtual is None:
                self._irr |= bit
            else:
                virtual.posted.post(vector)
        if virtual is None:
            self.vcpu.make_request(request.REQ_EVENT)
        return True

    def deliver_local(self, register: int) -> bool:
        """Raise the local interrupt of an LVT register; False if it is masked or the APIC is off."""
        lvt = self.lvtpc if register == Reg.LVT_PMC else self.regs[register]
        if lvt & LVT_MASKED or not self.hw_enabled:
            return False
        return self.accept(lvt & irq.DM_MASK, lvt & 0xFF, True, bool(lvt & irq.TRIGGER_LEVEL))

    def _timer_fired(self) -> None:
        self.deliver_local(Reg.LVT_TIMER)

    @property
    def accepts_pic(self) -> bool:
        """Whether the PIC's output reaches the core: through LINT0 in ExtINT mode, or around a disabled APIC."""
        if not self.hw_enabled:
            return True
        return self.regs[Reg.LVT_LINT0] & (LVT_MASKED | irq.DM_MASK) == irq.DM_EXTINT

    @property
    def accepts_pit_nmi(self) -> bool:
        """Whether LINT0 turns PIT ticks into NMIs: the NMI watchdog of old kernels."""
        return self.hw_enabled and self.regs[Reg.LVT_LINT0] & (LVT_MASKED | irq.DM_MASK) == irq.DM_NMI

    # --- Core side --------------------------------------------------------------------------------------------------------------

    def highest_irr(self) -> int:
        """Highest requested vector, whatever the priority; -1 if none."""
        return self.irr.bit_length() - 1

    def ppr(self) -> int:
        """The processor priority."""
        tpr = self.regs[Reg.TPR]
        in_service = max(self.isr.bit_length() - 1, 0)
        return tpr if tpr & 0xF0 >= in_service & 0xF0 else in_service & 0xF0

    def pending_vector(self) -> int:
        """The vector that the core may take now; -1 if none."""
        irr = self.irr
        if not irr or not self.hw_enabled:
            return NO_INTERRUPT
        vector = irr.bit_length() - 1
        return vector if vector & 0xF0 > self.ppr() & 0xF0 else NO_INTERRUPT

    def acknowledge(self) -> int:
        """Move the pending vector from IRR to ISR and return it; -1 if there is none."""
        with self.lock:
            vector = self.pending_vector()
            if vector != NO_INTERRUPT:
                self.irr &= ~_BIT[vector]
                self.isr |= _BIT[vector]
        return vector

    def set_eoi(self) -> None:
        """End of interrupt: retire the highest vector in service and tell the IOAPIC."""
        isr = self.isr
        if not isr:
            return
        vector = isr.bit_length() - 1
        self.isr = isr ^ _BIT[vector]
        self.end_of_interrupt(vector)
        if self.irr:
            self.vcpu.make_request(request.REQ_EVENT)

    def end_of_interrupt(self, vector: int) -> None:
        """`kvm_ioapic_send_eoi()`: `vector` is in service no longer."""
        if trace.kvm_eoi.enabled:
            trace.kvm_eoi(self.apic_id, vector)
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None:
            if irqchip.ioapic.handled_vectors & _BIT[vector]:
                irqchip.ioapic.eoi(vector, bool(self.tmr & _BIT[vector]))
        elif self.vcpu.vm.routing.user_ioapic_handles(vector):
            self.vcpu.pending_ioapic_eoi = vector
            self.vcpu.make_request(request.REQ_IOAPIC_EOI_EXIT)

    def tpr(self) -> int:
        """The task priority register."""
        return self.regs[Reg.TPR]

    @property
    def cr8(self) -> int:
        """The task priority class, as CR8 shows it."""
        return self.regs[Reg.TPR] >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.set_tpr((value & 0xF) << 4)

    def set_tpr(self, value: int) -> None:
        """Write the task priority register."""
        lowered = value < self.regs[Reg.TPR]
        self.regs[Reg.TPR] = value & 0xFF
        self.vcpu.state.cr8 = value >> 4 & 0xF
        if self.virtual is not None:
            self.virtual.set_tpr(value & 0xFF)
        if lowered and self.irr:
            self.vcpu.make_request(request.REQ_EVENT)
