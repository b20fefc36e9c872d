"""The state of a vCPU before it runs: MSRs, local APIC and, for the boot CPU, the registers at the kernel's entry.

Source of truth: Linux 6.1 `Documentation/x86/boot.rst`, "64-bit boot protocol"; Intel SDM vol. 3A, 11.4 (multiprocessor initialisation:
LINT0 takes the 8259A, LINT1 is NMI).
"""

from __future__ import annotations

import struct

from softkvm.uapi import kvm as uapi
from softkvm.vmm import layout
from softkvm.vmm.boot.linux import CODE_SELECTOR, DATA_SELECTOR, GDT

MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING = 0x1A0, 1 << 0
MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK = 0x2FF, 1 << 11 | 6

_CR0_PE, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_RESERVED = 1 << 1

_APIC_LVT0, _APIC_LVT1 = 0x350, 0x360
_DELIVERY_NMI, _DELIVERY_EXTINT = 4 << 8, 7 << 8


def msrs(misc_enable: int) -> dict[int, int]:
    """What firmware would have set, given the reset value of MISC_ENABLE: fast string operations, and all memory write-back."""
    return {MSR_MISC_ENABLE: misc_enable | MISC_ENABLE_FAST_STRING, MSR_MTRR_DEF_TYPE: MTRR_ENABLE_WRITE_BACK}


def wire_lapic(state: uapi.LapicState, boot_cpu: bool) -> None:
    """LINT0 of the boot CPU takes the 8259A's interrupts, LINT1 of all takes NMI."""
    if boot_cpu:
        struct.pack_into("<I", state.regs, _APIC_LVT0, _DELIVERY_EXTINT)
    struct.pack_into("<I", state.regs, _APIC_LVT1, _DELIVERY_NMI)


def entry_registers(entry: int) -> uapi.Regs:
    """General registers at the entry: RSI points to the zero page, interrupts are off."""
    stack = layout.BOOT_STACK.end
    return uapi.Regs(rip=entry, rsi=layout.ZERO_PAGE.base, rsp=stack, rbp=stack, rflags=_RFLAGS_RESERVED)


def enter_long_mode(sregs: uapi.Sregs) -> None:
    """64-bit mode with flat segments and the identity map of `linux.py`."""
    sregs.cs = _segment(CODE_SELECTOR, 0xB, long=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _segment(DATA_SELECTOR, 0x3, long=0))
    sregs.tr = uapi.Segment(limit=0xFFFF, selector=0, type=0xB, present=1)
    sregs.gdt.base, sregs.gdt.limit = layout.BOOT_GDT.base, len(GDT) - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = _CR0_PE | _CR0_ET | _CR0_NE | _CR0_PG
    sregs.cr3 = layout.BOOT_PAGE_TABLES.base
    sregs.cr4 = _CR4_PAE
    sregs.efer = _EFER_LME | _EFER_LMA


def _segment(selector: int, kind: int, long: int) -> uapi.Segment:
    return uapi.Segment(selector=selector, limit=0xFFFFFFFF, type=kind, present=1, s=1, l=long, db=1 - long, g=1)
