"""MADT: processors and interrupt controllers. MCFG: where PCI Express configuration space is.

Source of truth: ACPI specification 6.5, 5.2.12; PCI Firmware specification 3.3, 4.1.2.
"""

from __future__ import annotations

import struct

from softkvm.vmm import layout

MADT_REVISION, MCFG_REVISION = 5, 1

PCAT_COMPAT = 1 << 0  # the machine has a pair of 8259A
_LOCAL_APIC, _IO_APIC, _SOURCE_OVERRIDE, _LOCAL_APIC_NMI = 0, 1, 2, 4
_ENABLED = 1 << 0
_CONFORMING = 0
_ACTIVE_HIGH_LEVEL = 0b1101
_ALL_PROCESSORS = 0xFF
_LINT1 = 1


def madt_body(cpus: int) -> bytes:
    """What follows the header: processor n has APIC id n; the I/O APIC gets the id after the last one."""
    entries = [struct.pack("<II", layout.LOCAL_APIC.base, PCAT_COMPAT)]
    entries += [struct.pack("<BBBBI", _LOCAL_APIC, 8, index, index, _ENABLED) for index in range(cpus)]
    entries += [
        struct.pack("<BBBBII", _IO_APIC, 12, cpus, 0, layout.IOAPIC.base, 0),
        struct.pack("<BBBBIH", _SOURCE_OVERRIDE, 10, 0, layout.IRQ_TIMER.gsi, layout.TIMER_PIN, _CONFORMING),
        struct.pack("<BBBBIH", _SOURCE_OVERRIDE, 10, 0, layout.IRQ_SCI.gsi, layout.IRQ_SCI.gsi, _ACTIVE_HIGH_LEVEL),
        struct.pack("<BBBHB", _LOCAL_APIC_NMI, 6, _ALL_PROCESSORS, _CONFORMING, _LINT1),
    ]
    return b"".join(entries)


def mcfg_body() -> bytes:
    """What follows the header: segment 0, all buses."""
    return struct.pack("<8xQHBB4x", layout.PCI_ECAM.base, 0, 0, layout.PCI_BUSES - 1)
