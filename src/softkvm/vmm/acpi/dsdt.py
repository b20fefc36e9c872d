"""DSDT: the devices that cannot be found by probing, and the sleep states.

Source of truth: ACPI specification 6.5, 5.2.11.1, 6 (device configuration) and 7.4.2 (\\_S3, \\_S5); PCI Firmware specification 3.3, 4.5
(_OSC).
"""

from __future__ import annotations

from softkvm.vmm import layout
from softkvm.vmm.acpi import aml
from softkvm.vmm.devices.acpi_pm import SLP_TYP_S3, SLP_TYP_S5

_PCI_OSC_UUID = "33db4d5b-1ff7-401c-9657-7441c03dd766"
_OSC_UNRECOGNISED_UUID = 1 << 2
_INTERRUPT_PINS = 4
_PCI_SLOTS = 32
_LOW_IO = layout.Range(0, layout.PCI_CONFIG_ADDRESS.base, "ports below the configuration registers")
_HIGH_IO = layout.Range(0xD00, 0x10000 - 0xD00, "ports above them")


def definition_block(cpus: int) -> bytes:
    """The AML of a board with `cpus` processors."""
    return b"".join(
        (
            aml.scope("\\_SB", _pci_root(), _motherboard(), *(_processor(index) for index in range(cpus))),
            _sleep_state("\\_S3", SLP_TYP_S3),
            _sleep_state("\\_S5", SLP_TYP_S5),
        )
    )


def _sleep_state(name: str, sleep_type: int) -> bytes:
    """What to write to SLP_TYP of PM1a (and of PM1b, which is not there)."""
    return aml.name(name, aml.package(aml.integer(sleep_type), aml.integer(sleep_type), aml.integer(0), aml.integer(0)))


def _pci_root() -> bytes:
    windows = aml.resources(
        aml.bus_numbers(0, layout.PCI_BUSES),
        aml.io_ports(layout.PCI_CONFIG_ADDRESS.base, layout.PCI_CONFIG_ADDRESS.size + layout.PCI_CONFIG_DATA.size),
        aml.io_window(_LOW_IO.base, _LOW_IO.size),
        aml.io_window(_HIGH_IO.base, _HIGH_IO.size),
        aml.memory_window_32(layout.PCI_MMIO_32.base, layout.PCI_MMIO_32.size),
        aml.memory_window_64(layout.PCI_MMIO_64.base, layout.PCI_MMIO_64.size),
    )
    serial_ports = (_serial(index) for index in range(len(layout.SERIAL_PORTS)))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_CRS", windows),
        aml.name("_PRT", _interrupt_routing()),
        _operating_system_capabilities(),
        *serial_ports,
        _rtc(),
    )


def _interrupt_routing() -> bytes:
    """INTx of each slot of bus 0, wired to the I/O APIC. Slot 0 is the bridge, which has none."""
    return aml.package(
        *(
            aml.package(aml.integer(slot << 16 | 0xFFFF), aml.integer(pin), aml.integer(0), aml.integer(layout.pci_line(slot, pin)))
            for slot in range(1, _PCI_SLOTS)
            for pin in range(_INTERRUPT_PINS)
        )
    )


def _operating_system_capabilities() -> bytes:
    """_OSC grants every PCI Express feature that the guest asks for: no firmware competes for any of them."""
    capabilities = aml.argument(3)
    return aml.method(
        "_OSC",
        4,
        aml.if_equal(aml.argument(0), aml.uuid_buffer(_PCI_OSC_UUID), aml.returns(capabilities)),
        aml.create_dword_field(capabilities, 0, "CDW1"),
        aml.or_into("CDW1", _OSC_UNRECOGNISED_UUID),
        aml.returns(capabilities),
    )


def _serial(index: int) -> bytes:
    ports, line = layout.SERIAL_PORTS[index], layout.SERIAL_LINES[index]
    return aml.device(
        f"COM{index + 1}",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(index + 1)),
        aml.name("_CRS", aml.resources(aml.io_ports(ports.base, ports.size), aml.isa_irq(line.gsi))),
    )


def _rtc() -> bytes:
    resources = aml.resources(aml.io_ports(layout.RTC.base, layout.RTC.size), aml.isa_irq(layout.IRQ_RTC.gsi))
    return aml.device("RTC", aml.name("_HID", aml.eisa_id("PNP0B00")), aml.name("_CRS", resources))


def _motherboard() -> bytes:
    """Addresses that are taken although no driver asks for them."""
    resources = aml.resources(
        aml.io_ports(layout.PM1A_EVENT.base, layout.PM_TIMER.end - layout.PM1A_EVENT.base),
        aml.fixed_memory(layout.PCI_ECAM.base, layout.PCI_ECAM.size),
    )
    return aml.device("MB", aml.name("_HID", aml.eisa_id("PNP0C02")), aml.name("_CRS", resources))


def _processor(index: int) -> bytes:
    return aml.device(f"C{index:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(index)))
