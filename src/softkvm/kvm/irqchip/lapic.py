"""The local APIC of a vCPU, in xAPIC and x2APIC mode.

Answers to SDM vol. 3, ch. 11 and Linux 6.1 `arch/x86/kvm/lapic.c`. IRR, ISR and TMR are Python integers with one bit per vector, the
other registers a list indexed as the register page is, by offset / 16. Interrupts arrive from any thread, so IRR and TMR change
under `_lock`; everything else belongs to the thread that holds the vCPU.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm import cpuid, request
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.irq import NO_INTERRUPT, LapicIrq
from softkvm.kvm.irqchip.lapic_registers import (
    APIC_BASE_BSP,
    APIC_BASE_DEFAULT,
    APIC_BASE_ENABLE,
    APIC_BASE_X2APIC,
    BITMAPS,
    DFR_CLUSTER,
    DFR_FLAT,
    ICR_BUSY,
    LVT_COMMON,
    LVT_MASKED,
    LVT_TIMER_MODE,
    LVT_TIMER_PERIODIC,
    LVT_WRITABLE,
    READABLE_X2APIC,
    READABLE_XAPIC,
    SPIV_ENABLED,
    SPIV_WRITABLE,
    VERSION,
    X2APIC_MSR_FIRST,
    Reg,
    x2apic_ldr,
)
from softkvm.kvm.irqchip.lapic_timer import TSC_DEADLINE, LapicTimer
from softkvm.kvm.msr import MsrError

if TYPE_CHECKING:
    from softkvm.host.clock import HrTimer
    from softkvm.kvm.types import Vcpu


_U32 = 0xFFFF_FFFF
_BIT = tuple(1 << vector for vector in range(256))
_PAGE = struct.Struct("<" + "I12x" * 64)
_BITMAP = struct.Struct("<8I")


class Lapic:
    """A local APIC; `accept()` is its bus side, `pending_vector()` and `acknowledge()` its core side."""

    def __init__(self, vcpu: Vcpu) -> None:
        """A local APIC after RESET, which also sets the vCPU's APIC base."""
        self.vcpu = vcpu
        self._lock = threading.Lock()
        self._regs = [0] * 64
        self.irr = self.isr = self.tmr = 0
        self.pending_init = False
        self.sipi_vector: int | None = None
        """Vector of a start-up IPI that waits to be acted on; INIT discards it."""
        self.pv_unhalted = False
        """Set by KVM_HC_KICK_CPU: the vCPU leaves HLT once without an interrupt."""
        self._timer = LapicTimer(vcpu, self._timer_fired)
        self.reset(init=False)

    # --- Modes ------------------------------------------------------------------------------------------------------------------

    @property
    def hw_enabled(self) -> bool:
        """Whether APIC_BASE enables the APIC."""
        return bool(self.vcpu.apic_base & APIC_BASE_ENABLE)

    @property
    def sw_enabled(self) -> bool:
        """Whether the spurious vector register enables the APIC."""
        return bool(self._regs[Reg.SPIV] & SPIV_ENABLED)

    @property
    def x2apic(self) -> bool:
        """Whether the APIC is in x2APIC mode."""
        return bool(self.vcpu.apic_base & APIC_BASE_X2APIC)

    @property
    def apic_id(self) -> int:
        """The id in the width of the mode."""
        register = self._regs[Reg.ID]
        return register if self.x2apic else register >> 24

    @property
    def timer(self) -> HrTimer:
        """The host timer behind the APIC timer."""
        return self._timer.hrtimer

    def set_base(self, value: int) -> None:
        """Store APIC_BASE and change the mode as it says; the caller has checked the transition (`msr.py`)."""
        changed = self.vcpu.apic_base ^ value
        self.vcpu.apic_base = value
        if changed & APIC_BASE_ENABLE:
            cpuid.update_runtime(self.vcpu)
            if value & APIC_BASE_ENABLE:
                self._regs[Reg.ID] = (self.vcpu.vcpu_id & 0xFF) << 24
        if changed & value & APIC_BASE_X2APIC:
            self._regs[Reg.ID] = self.vcpu.vcpu_id
            self._regs[Reg.LDR] = x2apic_ldr(self.vcpu.vcpu_id)

    def reset(self, init: bool) -> None:
        """RESET, or INIT if `init`: INIT keeps APIC_BASE, the mode and the ids that come with it."""
        vcpu, regs = self.vcpu, self._regs
        bsp = vcpu.vcpu_id == vcpu.vm.boot_cpu_id
        self._timer.reset()
        if not init:
            vcpu.apic_base = APIC_BASE_DEFAULT | APIC_BASE_ENABLE | (APIC_BASE_BSP if bsp else 0)
        kept = (regs[Reg.ID], regs[Reg.LDR]) if self.x2apic else ((vcpu.vcpu_id & 0xFF) << 24, 0)
        with self._lock:
            regs[:] = [0] * 64
            self.irr = self.isr = self.tmr = 0
        regs[Reg.ID], regs[Reg.LDR] = kept
        regs[Reg.VERSION] = VERSION
        regs[Reg.DFR] = DFR_FLAT
        regs[Reg.SPIV] = 0xFF
        for entry in LVT_WRITABLE:
            regs[entry] = LVT_MASKED
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
        ldr = self._regs[Reg.LDR]
        if x2apic:
            return ldr >> 16 == dest_id >> 16 and bool(ldr & dest_id & 0xFFFF)
        ldr >>= 24
        if self._regs[Reg.DFR] == DFR_FLAT:
            return bool(ldr & dest_id & 0xFF)
        if self._regs[Reg.DFR] == DFR_CLUSTER:
            return ldr >> 4 == dest_id >> 4 and bool(ldr & dest_id & 0xF)
        return False

    def accept(self, mode: int, vector: int, level: bool, level_triggered: bool) -> bool:
        """Take a message of delivery mode `mode` (`irq.DM_*`) from the bus; False if the APIC refuses it."""
        if mode in (irq.DM_FIXED, irq.DM_LOWEST):
            return self._accept_vector(vector, level, level_triggered)
        if mode == irq.DM_NMI:
            self.vcpu.make_request(request.REQ_NMI)
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
        else:  # SMI: there is no SMM; ExtINT comes over LINT0
            return False
        return True

    def _accept_vector(self, vector: int, level: bool, level_triggered: bool) -> bool:
        if (level_triggered and not level) or not self.hw_enabled or not self.sw_enabled:
            return False
        bit = _BIT[vector]
        with self._lock:
            self.tmr = self.tmr | bit if level_triggered else self.tmr & ~bit
            self.irr |= bit
        self.vcpu.make_request(request.REQ_EVENT)
        return True

    def deliver_local(self, register: int) -> bool:
        """Raise the local interrupt of an LVT register; False if it is masked or the APIC is off."""
        lvt = self._regs[register]
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
        return self._regs[Reg.LVT_LINT0] & (LVT_MASKED | irq.DM_MASK) == irq.DM_EXTINT

    @property
    def accepts_pit_nmi(self) -> bool:
        """Whether LINT0 turns PIT ticks into NMIs: the NMI watchdog of old kernels."""
        return self.hw_enabled and self._regs[Reg.LVT_LINT0] & (LVT_MASKED | irq.DM_MASK) == irq.DM_NMI

    # --- Core side --------------------------------------------------------------------------------------------------------------

    def highest_irr(self) -> int:
        """Highest requested vector, whatever the priority; -1 if none."""
        return self.irr.bit_length() - 1

    def ppr(self) -> int:
        """The processor priority."""
        tpr = self._regs[Reg.TPR]
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
        with self._lock:
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
        bit = _BIT[vector]
        self.isr = isr ^ bit
        irqchip = self.vcpu.vm.irqchip
        if irqchip is not None and irqchip.ioapic.handled_vectors & bit:
            irqchip.ioapic.eoi(vector, bool(self.tmr & bit))
        if self.irr:
            self.vcpu.make_request(request.REQ_EVENT)

    def tpr(self) -> int:
        """The task priority register."""
        return self._regs[Reg.TPR]

    @property
    def cr8(self) -> int:
        """The task priority class, as CR8 shows it."""
        return self._regs[Reg.TPR] >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._set_tpr((value & 0xF) << 4)

    def _set_tpr(self, value: int) -> None:
        lowered = value < self._regs[Reg.TPR]
        self._regs[Reg.TPR] = value & 0xFF
        self.vcpu.state.cr8 = value >> 4 & 0xF
        if lowered and self.irr:
            self.vcpu.make_request(request.REQ_EVENT)

    # --- Registers --------------------------------------------------------------------------------------------------------------

    def mmio_read(self, offset: int, size: int) -> int:
        """Read of the register page; ones where no xAPIC answers, zero for registers that cannot be read."""
        if not self.hw_enabled or self.x2apic:
            return (1 << 8 * size) - 1
        number, byte = offset >> 4, offset & 0xF
        if byte + size > 4 or number not in READABLE_XAPIC:
            return 0
        return self._read(number) >> 8 * byte & (1 << 8 * size) - 1

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Write of the register page; only aligned 32-bit writes count, all others are dropped."""
        if size != 4 or offset & 0xF or not self.hw_enabled or self.x2apic:
            return
        writer = _XAPIC_WRITERS.get(offset >> 4)
        if writer is not None:
            writer(self, value & _U32)

    def msr_read(self, index: int) -> int:
        """RDMSR of an x2APIC register; MsrError where that is #GP."""
        number = index - X2APIC_MSR_FIRST
        if not self.x2apic or number not in READABLE_X2APIC:
            raise MsrError(index)
        if number == Reg.ICR:
            return self._regs[Reg.ICR] | self._regs[Reg.ICR2] << 32
        return self._read(number)

    def msr_write(self, index: int, value: int) -> None:
        """WRMSR of an x2APIC register; MsrError where that is #GP."""
        number = index - X2APIC_MSR_FIRST
        if not self.x2apic:
            raise MsrError(index)
        if number == Reg.ICR:
            self._write_icr(value & _U32, value >> 32)
            return
        writer = _X2APIC_WRITERS.get(number)
        if writer is None or value >> 32 or (number == Reg.ESR and value):
            raise MsrError(index)
        writer(self, value)

    def _read(self, number: int) -> int:
        if number in BITMAPS:
            bitmap = (self.isr, self.tmr, self.irr)[number - Reg.ISR >> 3]
            return bitmap >> 32 * (number & 7) & _U32
        if number == Reg.TIMER_CURRENT:
            return self._timer.current_count()
        if number == Reg.TIMER_INITIAL:
            return self._timer.initial_count
        if number == Reg.PPR:
            return self.ppr()
        return self._regs[number]

    def _write_id(self, value: int) -> None:
        self._regs[Reg.ID] = value & 0xFF00_0000

    def _write_tpr(self, value: int) -> None:
        self._set_tpr(value & 0xFF)

    def _write_eoi(self, _value: int) -> None:
        self.set_eoi()

    def _write_ldr(self, value: int) -> None:
        self._regs[Reg.LDR] = value & 0xFF00_0000

    def _write_dfr(self, value: int) -> None:
        self._regs[Reg.DFR] = value | 0x0FFF_FFFF

    def _write_spiv(self, value: int) -> None:
        self._regs[Reg.SPIV] = value & SPIV_WRITABLE
        if not value & SPIV_ENABLED:
            for entry in LVT_WRITABLE:
                self._regs[entry] |= LVT_MASKED

    def _write_esr(self, _value: int) -> None:
        """Latches nothing: KVM detects no APIC errors, so the register stays zero."""

    def _write_icr(self, low: int, dest: int) -> None:
        low &= ~ICR_BUSY
        self._regs[Reg.ICR], self._regs[Reg.ICR2] = low, dest
        message = LapicIrq(
            vector=low & 0xFF,
            dest_id=dest if self.x2apic else dest >> 24,
            delivery_mode=low & irq.DM_MASK,
            logical=bool(low & irq.DEST_LOGICAL),
            level=bool(low & irq.LEVEL_ASSERT),
            level_triggered=bool(low & irq.TRIGGER_LEVEL),
            shorthand=low & irq.SHORTHAND_MASK,
        )
        irq.deliver(self.vcpu.vm, message, self)

    def _write_icr_low(self, value: int) -> None:
        self._write_icr(value, self._regs[Reg.ICR2])

    def _write_icr_high(self, value: int) -> None:
        self._regs[Reg.ICR2] = value & 0xFF00_0000

    def _write_self_ipi(self, value: int) -> None:
        self._accept_vector(value & 0xFF, level=True, level_triggered=False)

    def _write_lvt(self, register: int, value: int) -> None:
        if not self.sw_enabled:
            value |= LVT_MASKED
        was_pic = self.accepts_pic
        self._regs[register] = value & LVT_WRITABLE[register]
        if self.accepts_pic and not was_pic:
            self.vcpu.make_request(request.REQ_EVENT)  # the PIC's output may have been waiting

    def _write_lvt_timer(self, value: int) -> None:
        modes = LVT_TIMER_MODE if self.vcpu.cpuid.has(cpuid.TSC_DEADLINE) else LVT_TIMER_PERIODIC
        if not self.sw_enabled:
            value |= LVT_MASKED
        self._regs[Reg.LVT_TIMER] = value & (LVT_COMMON | modes)
        self._timer.set_mode((value & modes) >> 17)

    def _write_initial_count(self, value: int) -> None:
        self._timer.set_initial_count(value)

    def _write_divide(self, value: int) -> None:
        self._regs[Reg.TIMER_DIVIDE] = value & 0xB
        self._timer.set_divide(value)

    # --- TSC deadline -----------------------------------------------------------------------------------------------------------

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: 0 outside TSC-deadline mode."""
        return self._timer.deadline if self._timer.mode == TSC_DEADLINE else 0

    def set_tsc_deadline(self, value: int) -> None:
        """Write of IA32_TSC_DEADLINE; dropped outside TSC-deadline mode."""
        if self._timer.mode == TSC_DEADLINE and self.vcpu.apic_base & APIC_BASE_ENABLE:
            self._timer.set_deadline(value)

    # --- State ------------------------------------------------------------------------------------------------------------------

    def get_state(self) -> bytes:
        """The 1 KiB register page of KVM_GET_LAPIC."""
        page = list(self._regs)
        with self._lock:
            for first, bitmap in ((Reg.ISR, self.isr), (Reg.TMR, self.tmr), (Reg.IRR, self.irr)):
                page[first : first + 8] = _BITMAP.unpack(bitmap.to_bytes(32, "little"))
        page[Reg.PPR] = self.ppr()
        page[Reg.TIMER_INITIAL] = self._timer.initial_count
        page[Reg.TIMER_CURRENT] = self._timer.current_count()
        if self.x2apic and not self.vcpu.vm.routing.x2apic_format:
            page[Reg.ID] = page[Reg.ID] << 24 & _U32
        return _PAGE.pack(*page)

    def set_state(self, state: bytes) -> None:
        """KVM_SET_LAPIC; OSError(EINVAL) for an x2APIC id that is not the vCPU's. Restarts the timer from its current count."""
        page = list(_PAGE.unpack(state))
        if self.x2apic:
            self._fix_x2apic_page(page)
        bitmaps = [int.from_bytes(_BITMAP.pack(*page[first : first + 8]), "little") for first in (Reg.ISR, Reg.TMR, Reg.IRR)]
        initial, current = page[Reg.TIMER_INITIAL], page[Reg.TIMER_CURRENT]
        for number in (*BITMAPS, Reg.PPR, Reg.TIMER_INITIAL, Reg.TIMER_CURRENT):
            page[number] = 0
        page[Reg.TPR] &= 0xFF
        page[Reg.VERSION] = VERSION
        with self._lock:
            self._regs[:] = page
            self.isr, self.tmr, self.irr = bitmaps
        self._timer.stop()
        self._timer.set_mode((page[Reg.LVT_TIMER] & LVT_TIMER_MODE) >> 17)
        self._timer.set_divide(page[Reg.TIMER_DIVIDE])
        self._timer.restore(initial, current)
        self.vcpu.state.cr8 = self.cr8
        self.vcpu.make_request(request.REQ_EVENT)

    def _fix_x2apic_page(self, page: list[int]) -> None:
        """From the layout of user space, where the id may be in the xAPIC's place and the logical id does not matter."""
        if not self.vcpu.vm.routing.x2apic_format:
            page[Reg.ID] >>= 24
        elif page[Reg.ID] != self.vcpu.vcpu_id:
            raise OSError(errno.EINVAL, "x2APIC id differs from the vCPU's")
        page[Reg.LDR] = x2apic_ldr(page[Reg.ID])


def _lvt_writer(register: int) -> Callable[[Lapic, int], None]:
    return lambda lapic, value: lapic._write_lvt(register, value)


_COMMON_WRITERS: dict[int, Callable[[Lapic, int], None]] = {
    Reg.TPR: Lapic._write_tpr,
    Reg.EOI: Lapic._write_eoi,
    Reg.SPIV: Lapic._write_spiv,
    Reg.ESR: Lapic._write_esr,
    Reg.TIMER_INITIAL: Lapic._write_initial_count,
    Reg.TIMER_DIVIDE: Lapic._write_divide,
    **{register: _lvt_writer(register) for register in LVT_WRITABLE},
    Reg.LVT_TIMER: Lapic._write_lvt_timer,
}
_XAPIC_WRITERS = _COMMON_WRITERS | {
    Reg.ID: Lapic._write_id,
    Reg.LDR: Lapic._write_ldr,
    Reg.DFR: Lapic._write_dfr,
    Reg.ICR: Lapic._write_icr_low,
    Reg.ICR2: Lapic._write_icr_high,
}
_X2APIC_WRITERS = _COMMON_WRITERS | {Reg.SELF_IPI: Lapic._write_self_ipi}
