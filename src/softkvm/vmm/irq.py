"""Interrupt wiring between devices and KVM: lines that several devices share, and the routing table.

Answers to the PC's wiring as the MADT describes it (`acpi/madt.py`) and to KVM_SET_GSI_ROUTING of the KVM API document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from softkvm.uapi import kvm as uapi
from softkvm.vmm import layout

SetLevel = Callable[[bool], None]
"""What a device gets to drive its interrupt output: True is asserted."""


class SharedLine:
    """One line into the interrupt controllers, asserted while any of the devices on it asserts its output."""

    def __init__(self, drive: Callable[[int, int], object], gsi: int) -> None:
        """`drive(gsi, level)` is KVM_IRQ_LINE."""
        self._drive = drive
        self._gsi = gsi
        self._outputs = 0
        self._asserting = 0

    def connect(self) -> SetLevel:
        """A new output on the line, for one device."""
        bit = 1 << self._outputs
        self._outputs += 1

        def set_level(level: bool) -> None:
            before = self._asserting
            self._asserting = before | bit if level else before & ~bit
            if bool(before) != bool(self._asserting):
                self._drive(self._gsi, int(level))

        return set_level

    def assert_again(self) -> None:
        """Tell interrupt controllers that were reset of a line that is asserted."""
        if self._asserting:
            self._drive(self._gsi, 1)


class Lines:
    """All lines of the board, made when a device first connects."""

    def __init__(self, drive: Callable[[int, int], object]) -> None:
        self._drive = drive
        self._lines: dict[int, SharedLine] = {}

    def connect(self, gsi: int) -> SetLevel:
        """An output on the line `gsi`."""
        if gsi not in self._lines:
            self._lines[gsi] = SharedLine(self._drive, gsi)
        return self._lines[gsi].connect()

    def assert_again(self) -> None:
        """Tell interrupt controllers that were reset of all lines that are asserted."""
        for line in self._lines.values():
            line.assert_again()


def _route(gsi: int, chip: int, pin: int) -> uapi.IrqRoutingEntry:
    entry = uapi.IrqRoutingEntry(gsi=gsi, type=uapi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.irqchip.irqchip = chip
    entry.irqchip.pin = pin
    return entry


def default_routing() -> Iterator[uapi.IrqRoutingEntry]:
    """GSI 0..15 to both the 8259A pair and the I/O APIC, 16..23 to the I/O APIC; the timer goes to pin 2 of the latter."""
    for irq in range(16):
        if irq != layout.IRQ_CASCADE.gsi:
            chip = uapi.KVM_IRQCHIP_PIC_MASTER if irq < 8 else uapi.KVM_IRQCHIP_PIC_SLAVE
            yield _route(irq, chip, irq % 8)
    for gsi in range(layout.IOAPIC_PINS):
        if gsi == layout.IRQ_TIMER.gsi:
            yield _route(gsi, uapi.KVM_IRQCHIP_IOAPIC, layout.TIMER_PIN)
        elif gsi != layout.IRQ_CASCADE.gsi:
            yield _route(gsi, uapi.KVM_IRQCHIP_IOAPIC, gsi)
