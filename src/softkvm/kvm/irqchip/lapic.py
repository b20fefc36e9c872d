"""The local APIC of a vCPU as software sees it: the xAPIC register page, the x2APIC MSRs, and the state that KVM_{GET,SET}_LAPIC move.

Answers to SDM vol. 3, ch. 11 (registers), 11.12 (x2APIC) and Linux 6.1 `arch/x86/kvm/lapic.c`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from softkvm.kvm import cpuid, request
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.irq import LapicIrq
from softkvm.kvm.irqchip.lapic_core import LapicCore
from softkvm.kvm.irqchip.lapic_registers import (
    APIC_BASE_ENABLE,
    BITMAPS,
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
from softkvm.kvm.irqchip.lapic_timer import TSC_DEADLINE
from softkvm.kvm.msr import MsrError
from softkvm.silicon.pmu import LVTPC_PENDING

_U32 = 0xFFFF_FFFF
_PAGE = struct.Struct("<" + "I12x" * 64)
_BITMAP = struct.Struct("<8I")
_TO_MANY = irq.SHORTHAND_MASK | irq.DEST_LOGICAL
"""Bits of the ICR without which the destination is one APIC's id, or a broadcast."""


class Lapic(LapicCore):
    """A local APIC with its registers."""

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
            return self.icr
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
        if writer is None or value & _X2APIC_RESERVED.get(number, _ABOVE_32):
            raise MsrError(index)
        writer(self, value)

    def _read(self, number: int) -> int:
        reader = _READERS.get(number)
        return self.regs[number] if reader is None else reader(self, number)

    def _read_bitmap(self, number: int) -> int:
        bitmap = (self.isr, self.tmr, self.irr)[number - Reg.ISR >> 3]
        return bitmap >> 32 * (number & 7) & _U32

    def _write_id(self, value: int) -> None:
        self.regs[Reg.ID] = value & 0xFF00_0000
        self.vcpu.vm.apic_map.forget()

    def _write_tpr(self, value: int) -> None:
        self.set_tpr(value & 0xFF)

    def _write_eoi(self, _value: int) -> None:
        self.set_eoi()

    def _write_ldr(self, value: int) -> None:
        self.regs[Reg.LDR] = value & 0xFF00_0000

    def _write_dfr(self, value: int) -> None:
        self.regs[Reg.DFR] = value | 0x0FFF_FFFF

    def _write_spiv(self, value: int) -> None:
        self.regs[Reg.SPIV] = value & SPIV_WRITABLE
        if not value & SPIV_ENABLED:
            for entry in LVT_WRITABLE:
                self.regs[entry] |= LVT_MASKED
            self.lvtpc |= LVT_MASKED
        self.vcpu.pmu.choose_interrupts()

    def _write_esr(self, _value: int) -> None:
        """Latches nothing: KVM detects no APIC errors, so the register stays zero."""

    def _write_icr(self, low: int, dest: int) -> None:
        low &= ~ICR_BUSY
        self.icr = low | dest << 32
        dest_id = dest if self.x2apic else dest >> 24
        if not low & _TO_MANY and (target := self.vcpu.vm.apic_map.physical(dest_id)) is not None:
            target.accept(low & irq.DM_MASK, low & 0xFF, bool(low & irq.LEVEL_ASSERT), bool(low & irq.TRIGGER_LEVEL))
            return
        message = LapicIrq(
            vector=low & 0xFF,
            dest_id=dest_id,
            delivery_mode=low & irq.DM_MASK,
            logical=bool(low & irq.DEST_LOGICAL),
            level=bool(low & irq.LEVEL_ASSERT),
            level_triggered=bool(low & irq.TRIGGER_LEVEL),
            shorthand=low & irq.SHORTHAND_MASK,
        )
        irq.deliver(self.vcpu.vm, message, self)

    def icr_written(self) -> None:
        """The guest has written an interrupt command that the silicon leaves to KVM (`kvm_apic_write_nodecode()`)."""
        command = self.icr
        self._write_icr(command & _U32, command >> 32)

    def _write_icr_low(self, value: int) -> None:
        self._write_icr(value, self.regs[Reg.ICR2])

    def _write_icr_high(self, value: int) -> None:
        self.regs[Reg.ICR2] = value & 0xFF00_0000

    def _write_self_ipi(self, value: int) -> None:
        self.accept_vector(value & 0xFF, level=True, level_triggered=False)

    def _write_lvt(self, register: int, value: int) -> None:
        if not self.sw_enabled:
            value |= LVT_MASKED
        was_pic = self.accepts_pic
        self.regs[register] = value & LVT_WRITABLE[register]
        if self.accepts_pic and not was_pic:
            self.vcpu.make_request(request.REQ_EVENT)  # the PIC's output may have been waiting

    def _write_lvt_pmc(self, value: int) -> None:
        if not self.sw_enabled:
            value |= LVT_MASKED
        self.lvtpc = value & LVT_WRITABLE[Reg.LVT_PMC] & ~LVTPC_PENDING

    def _write_lvt_timer(self, value: int) -> None:
        modes = LVT_TIMER_MODE if self.vcpu.cpuid.has(cpuid.TSC_DEADLINE) else LVT_TIMER_PERIODIC
        if not self.sw_enabled:
            value |= LVT_MASKED
        self.regs[Reg.LVT_TIMER] = value & (LVT_COMMON | modes)
        self.apic_timer.set_mode((value & modes) >> 17)

    def _write_initial_count(self, value: int) -> None:
        self.apic_timer.set_initial_count(value)

    def _write_divide(self, value: int) -> None:
        self.regs[Reg.TIMER_DIVIDE] = value & 0xB
        self.apic_timer.set_divide(value)

    # --- TSC deadline -----------------------------------------------------------------------------------------------------------

    @property
    def tsc_deadline(self) -> int:
        """IA32_TSC_DEADLINE: 0 outside TSC-deadline mode."""
        return self.apic_timer.deadline if self.apic_timer.mode == TSC_DEADLINE else 0

    def set_tsc_deadline(self, value: int) -> None:
        """Write of IA32_TSC_DEADLINE; dropped outside TSC-deadline mode."""
        if self.apic_timer.mode == TSC_DEADLINE and self.vcpu.apic_base & APIC_BASE_ENABLE:
            self.apic_timer.set_deadline(value)

    # --- State ------------------------------------------------------------------------------------------------------------------

    def get_state(self) -> bytes:
        """The 1 KiB register page of KVM_GET_LAPIC."""
        with self.lock:
            page = list(self.regs)
            page[Reg.ICR], page[Reg.ICR2] = self.icr & _U32, self.icr >> 32
            for first, bitmap in ((Reg.ISR, self.isr), (Reg.TMR, self.tmr), (Reg.IRR, self.irr)):
                page[first : first + 8] = _BITMAP.unpack(bitmap.to_bytes(32, "little"))
        page[Reg.PPR], page[Reg.LVT_PMC] = self.ppr(), self.lvtpc
        page[Reg.TIMER_INITIAL] = self.apic_timer.initial_count
        page[Reg.TIMER_CURRENT] = self.apic_timer.current_count()
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
        with self.lock:
            self.regs[:] = page
            self.isr, self.tmr, self.irr = bitmaps
            self.icr = page[Reg.ICR] | page[Reg.ICR2] << 32
        self.lvtpc = page[Reg.LVT_PMC] & LVT_WRITABLE[Reg.LVT_PMC]
        self.vcpu.pmu.choose_interrupts()
        self.vcpu.vm.apic_map.forget()
        self.apic_timer.stop()
        self.apic_timer.set_mode((page[Reg.LVT_TIMER] & LVT_TIMER_MODE) >> 17)
        self.apic_timer.set_divide(page[Reg.TIMER_DIVIDE])
        self.apic_timer.restore(initial, current)
        self.set_tpr(page[Reg.TPR])
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


_READERS: dict[int, Callable[[Lapic, int], int]] = {
    **dict.fromkeys(BITMAPS, Lapic._read_bitmap),
    Reg.TIMER_CURRENT: lambda lapic, number: lapic.apic_timer.current_count(),
    Reg.TIMER_INITIAL: lambda lapic, number: lapic.apic_timer.initial_count,
    Reg.PPR: lambda lapic, number: lapic.ppr(),
    Reg.LVT_PMC: lambda lapic, number: lapic.lvtpc,
}
"""Registers that are not kept as such."""
_COMMON_WRITERS: dict[int, Callable[[Lapic, int], None]] = {
    Reg.TPR: Lapic._write_tpr,
    Reg.EOI: Lapic._write_eoi,
    Reg.SPIV: Lapic._write_spiv,
    Reg.ESR: Lapic._write_esr,
    Reg.TIMER_INITIAL: Lapic._write_initial_count,
    Reg.TIMER_DIVIDE: Lapic._write_divide,
    **{register: _lvt_writer(register) for register in LVT_WRITABLE},
    Reg.LVT_TIMER: Lapic._write_lvt_timer,
    Reg.LVT_PMC: Lapic._write_lvt_pmc,
}
_XAPIC_WRITERS = _COMMON_WRITERS | {
    Reg.ID: Lapic._write_id,
    Reg.LDR: Lapic._write_ldr,
    Reg.DFR: Lapic._write_dfr,
    Reg.ICR: Lapic._write_icr_low,
    Reg.ICR2: Lapic._write_icr_high,
}
_ABOVE_32 = ~_U32
_X2APIC_RESERVED = {Reg.ESR: -1, Reg.SELF_IPI: ~0xFF}
"""Bits of x2APIC registers whose setting is #GP, where they are more than the upper half (SDM vol. 3, table 11-6 and 11.12.11)."""
_X2APIC_WRITERS = _COMMON_WRITERS | {Reg.SELF_IPI: Lapic._write_self_ipi}
