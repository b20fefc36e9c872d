"""The local APIC's register map: SDM vol. 3, 11.4.1 (table 11-1), 11.12.1 and the figures of ch. 11."""

from __future__ import annotations

from softkvm.kvm.irqchip import irq


class Reg:
    """Register numbers: MMIO offset / 16, x2APIC MSR - 800h. Plain integers, for the hot paths index with them."""

    ID, VERSION, TPR, ARBITRATION, PPR, EOI, REMOTE_READ, LDR, DFR, SPIV = 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E, 0x0F
    ISR, TMR, IRR, ESR = 0x10, 0x18, 0x20, 0x28
    LVT_CMCI, ICR, ICR2 = 0x2F, 0x30, 0x31
    LVT_TIMER, LVT_THERMAL, LVT_PMC, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x32, 0x33, 0x34, 0x35, 0x36, 0x37
    TIMER_INITIAL, TIMER_CURRENT, TIMER_DIVIDE, SELF_IPI = 0x38, 0x39, 0x3E, 0x3F


APIC_BASE_DEFAULT = 0xFEE0_0000
APIC_BASE_BSP, APIC_BASE_X2APIC, APIC_BASE_ENABLE = 1 << 8, 1 << 10, 1 << 11
APIC_BASE_RESERVED = 0x2FF
X2APIC_MSR_FIRST, X2APIC_MSR_LAST = 0x800, 0x83F

VERSION = 0x14 | 5 << 16
"""Integrated APIC with six LVT entries."""
SPIV_ENABLED = 1 << 8
SPIV_WRITABLE = 0x3FF
LVT_MASKED = 1 << 16
LVT_TIMER_MODE = 3 << 17
LVT_TIMER_PERIODIC = 1 << 17
DFR_FLAT = 0xFFFF_FFFF
DFR_CLUSTER = 0x0FFF_FFFF
ICR_BUSY = 1 << 12

LVT_COMMON = LVT_MASKED | 1 << 12 | 0xFF  # mask, delivery status, vector
LVT_PIN = LVT_COMMON | irq.DM_MASK | 7 << 13  # polarity, remote IRR, trigger mode
LVT_WRITABLE = {
    Reg.LVT_TIMER: LVT_COMMON,  # and the modes that CPUID offers
    Reg.LVT_THERMAL: LVT_COMMON | irq.DM_MASK,
    Reg.LVT_PMC: LVT_COMMON | irq.DM_MASK,
    Reg.LVT_LINT0: LVT_PIN,
    Reg.LVT_LINT1: LVT_PIN,
    Reg.LVT_ERROR: LVT_COMMON,
}

BITMAPS = range(Reg.ISR, Reg.ESR)
READABLE_X2APIC = frozenset(
    {Reg.ID, Reg.VERSION, Reg.TPR, Reg.PPR, Reg.LDR, Reg.SPIV, Reg.ESR, Reg.ICR, Reg.TIMER_INITIAL, Reg.TIMER_CURRENT, Reg.TIMER_DIVIDE}
) | frozenset([*BITMAPS, *LVT_WRITABLE])
READABLE_XAPIC = READABLE_X2APIC | {Reg.ARBITRATION, Reg.DFR, Reg.ICR2}


def x2apic_ldr(apic_id: int) -> int:
    """The logical id that x2APIC mode derives from the APIC id (SDM vol. 3, 11.12.10.2)."""
    return (apic_id >> 4) << 16 | 1 << (apic_id & 0xF)
