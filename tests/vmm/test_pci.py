"""PCI configuration space, BARs and the host bridge."""

from __future__ import annotations

import pytest

from softkvm.vmm import layout, pci
from softkvm.vmm.bus import Bus
from softkvm.vmm.layout import Range
from softkvm.vmm.pci import HostBridge, PciDevice
from tests.vmm.doubles import Ram

SLOT = 3


class Bench:
    def __init__(self) -> None:
        self.ports, self.memory, self.narrow = Bus(), Bus(), Ram(1)
        self.bridge = HostBridge(self.ports, self.memory, self.narrow)
        self.ports.claim(layout.PCI_CONFIG_ADDRESS, self.bridge.address_port, width=4)
        self.ports.claim(layout.PCI_CONFIG_DATA, self.bridge.data_port, width=4)
        self.memory.claim(layout.PCI_ECAM, self.bridge.ecam, width=4)
        self.io, self.registers, self.large = Ram(32), Ram(4096), Ram(1 << 20)
        self.device = PciDevice(0x1AF4, 0x1041, 0x020000, subsystem=(0x1AF4, 1), revision=1, pin=1)
        self.device.add_bar(0, 32, self.io, flags=pci.BAR_IO)
        self.device.add_bar(1, 4096, self.registers)
        self.device.add_bar(4, 1 << 20, self.large, flags=pci.BAR_64 | pci.BAR_PREFETCHABLE)
        self.bridge.add(SLOT, self.device)

    def select(self, register: int, slot: int = SLOT) -> None:
        self.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | register & 0xFC)

    def get(self, register: int, size: int = 4, slot: int = SLOT) -> int:
        self.select(register, slot)
        return self.ports.read(0xCFC + (register & 3), size)

    def put(self, register: int, size: int, value: int) -> None:
        self.select(register)
        self.ports.write(0xCFC + (register & 3), size, value)

    def ecam(self, register: int, slot: int = SLOT) -> int:
        return layout.PCI_ECAM.base + (slot << 15) + register


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_linux_finds_configuration_mechanism_1(bench: Bench) -> None:
    """The probe of `pci_check_type1()`: a byte to 0xCFB must not disturb the address register, and bus 0 has a host bridge."""
    bench.ports.write(0xCFB, 1, 1)
    bench.ports.write(0xCF8, 4, 0x80000000)
    assert bench.ports.read(0xCF8, 4) == 0x80000000
    assert bench.get(0x0A, 2, slot=0) == pci.CLASS_HOST_BRIDGE >> 8


def test_byte_at_cf9_is_another_device(bench: Bench) -> None:
    bench.ports.write(0xCF9, 1, 0x06)
    assert bytes(bench.narrow.bytes) == b"\x06"
    assert bench.ports.read(0xCF9, 1) == 0x06
    assert bench.ports.read(0xCF8, 4) == 0


def test_both_mechanisms_show_the_same_header(bench: Bench) -> None:
    assert bench.get(0) == 0x10411AF4
    assert bench.memory.read(bench.ecam(0), 4) == 0x10411AF4
    assert bench.get(0x09, 1) | bench.get(0x0A, 2) << 8 == 0x020000
    assert bench.get(pci.INTERRUPT_PIN, 1) == 1
    assert bench.get(pci.DEVICE_ID, 2) == 0x1041


def test_absent_functions_and_disabled_address_read_as_all_ones(bench: Bench) -> None:
    assert bench.get(0, slot=9) == 0xFFFFFFFF
    assert bench.memory.read(layout.PCI_ECAM.last - 3, 4) == 0xFFFFFFFF
    bench.ports.write(0xCF8, 4, SLOT << 11)
    assert bench.ports.read(0xCFC, 2) == 0xFFFF


def test_read_only_bytes_keep_their_value(bench: Bench) -> None:
    bench.put(0, 4, 0)
    bench.put(pci.CLASS - 1, 4, 0)
    assert bench.get(0) == 0x10411AF4


@pytest.mark.parametrize(
    ("bar", "sized"), [(0, 0xFFFFFFE1), (1, 0xFFFFF000), (2, 0), (4, 0xFFF0000C), (5, 0xFFFFFFFF)], ids=["io", "mem", "none", "low", "high"]
)
def test_bar_sizing(bench: Bench, bar: int, sized: int) -> None:
    bench.put(pci.BARS + 4 * bar, 4, 0xFFFFFFFF)
    assert bench.get(pci.BARS + 4 * bar) == sized


def test_bars_answer_where_the_guest_put_them_while_decoding_is_on(bench: Bench) -> None:
    bench.put(pci.BARS, 4, 0xC000)
    bench.put(pci.BARS + 4, 4, 0xC0001000)
    bench.put(pci.BARS + 16, 4, 0)
    bench.put(pci.BARS + 20, 4, 0x40)
    assert bench.device.bar_address(1) is None
    bench.put(pci.COMMAND, 2, pci.COMMAND_IO | pci.COMMAND_MEMORY)
    assert [bench.device.bar_address(bar) for bar in (0, 1, 4)] == [0xC000, 0xC0001000, 0x4000000000]
    bench.ports.write(0xC004, 2, 0x1234)
    bench.memory.write(0xC0001008, 4, 0xCAFE)
    bench.memory.write(0x4000000010, 8, 0x1122334455667788)
    assert bench.io.read(4, 2) == 0x1234
    assert bench.registers.read(8, 4) == 0xCAFE
    assert bench.memory.read(0x4000000010, 8) == 0x1122334455667788
    bench.put(pci.COMMAND, 2, 0)
    assert bench.ports.read(0xC004, 2) == 0xFFFF


def test_moved_bar_leaves_its_old_address(bench: Bench) -> None:
    bench.put(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    bench.put(pci.BARS + 4, 4, 0xC0001000)
    bench.put(pci.BARS + 4, 4, 0xC0005000)
    assert bench.memory.free(Range(0xC0001000, 4096, ""))
    assert bench.device.bar_address(1) == 0xC0005000


def test_bar_over_another_device_stays_unmapped(bench: Bench) -> None:
    bench.put(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    bench.put(pci.BARS + 4, 4, layout.PCI_ECAM.base)
    assert bench.device.bar_address(1) is None
    assert bench.memory.read(bench.ecam(0), 4) == 0x10411AF4


def test_capabilities_form_a_list(bench: Bench) -> None:
    first = bench.device.add_capability(0x09, bytes(10))
    second = bench.device.add_capability(0x11, bytes(10), writable=b"\x00\xc0")
    assert bench.get(pci.STATUS, 2) & pci.STATUS_CAPABILITIES
    assert bench.get(pci.CAPABILITIES, 1) == first
    assert bench.get(first, 2) == second << 8 | 0x09
    assert bench.get(second, 2) == 0x11
    bench.put(second + 2, 2, 0xFFFF)
    assert bench.get(second + 2, 2) == 0xC000
    with pytest.raises(ValueError, match="256"):
        bench.device.add_capability(0x09, bytes(250))


@pytest.mark.parametrize("size", [0, 8, 24])
def test_impossible_bar_is_refused(bench: Bench, size: int) -> None:
    with pytest.raises(ValueError, match="BAR"):
        bench.device.add_bar(2, size, Ram(1))


@pytest.mark.parametrize(("slot", "function"), [(SLOT, 0), (0, 0), (32, 0), (1, 8)])
def test_taken_or_impossible_slot_is_refused(bench: Bench, slot: int, function: int) -> None:
    with pytest.raises(ValueError, match="not free"):
        bench.bridge.add(slot, PciDevice(1, 2, 0), function)


def test_restored_bars_are_mapped(bench: Bench) -> None:
    bench.put(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    bench.put(pci.BARS + 4, 4, 0xC0001000)
    other = Bench()
    other.device.restore(bench.device.save())
    assert other.device.bar_address(1) == 0xC0001000
