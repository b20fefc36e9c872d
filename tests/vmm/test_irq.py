"""Interrupt wiring."""

from __future__ import annotations

from softkvm.uapi import kvm as uapi
from softkvm.vmm.irq import Lines, default_routing


def test_a_shared_line_is_asserted_while_any_output_is() -> None:
    calls: list[tuple[int, int]] = []
    lines = Lines(lambda gsi, level: calls.append((gsi, level)))
    first, second, other = lines.connect(4), lines.connect(4), lines.connect(3)
    first(True)
    second(True)
    first(False)
    other(True)
    second(False)
    assert calls == [(4, 1), (3, 1), (4, 0)]


def test_routing_is_the_wiring_of_a_pc() -> None:
    routes = {(entry.gsi, entry.irqchip.irqchip, entry.irqchip.pin) for entry in default_routing()}
    master, slave, ioapic = uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE, uapi.KVM_IRQCHIP_IOAPIC
    assert {(0, master, 0), (0, ioapic, 2), (4, master, 4), (4, ioapic, 4), (8, slave, 0), (9, ioapic, 9), (23, ioapic, 23)} <= routes
    assert not any(gsi == 2 for gsi, _, _ in routes)
    assert len({(chip, pin) for _, chip, pin in routes}) == len(routes)
