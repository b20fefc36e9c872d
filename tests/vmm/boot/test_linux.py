"""What lies in memory when the kernel is entered."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from softkvm.vmm import layout
from softkvm.vmm.boot import Kernel, linux, zero_page
from softkvm.vmm.boot.bzimage import parse
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import GIB, MIB
from softkvm.vmm.memory import GuestMemory
from tests.vmm.boot import images
from tests.vmm.doubles import HostBlock

LINE = b"console=ttyS0 quiet"


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(64 * MIB, HostBlock)


def kernel_for(memory: GuestMemory, **changes: int) -> Kernel:
    return parse(images.bzimage(**changes), Path("vmlinuz"), memory.low_end)


def u32(page: memoryview, offset: int) -> int:
    value: int = struct.unpack_from("<I", page, offset)[0]
    return value


def entries(page: memoryview) -> list[tuple[int, int, int]]:
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


def test_zero_page_tells_where_everything_is(memory: GuestMemory) -> None:
    initrd = bytes(range(256)) * 64
    kernel = kernel_for(memory)
    linux.load(memory, kernel, initrd, LINE, cpus=1)
    page = memory.view(layout.ZERO_PAGE.base, 4096)
    assert bytes(page[0x202:0x206]) == b"HdrS"
    assert page[0x210] == 0xFF
    command_line = memory.view(u32(page, 0x228) | u32(page, 0x0C8) << 32, len(LINE) + 1)
    assert bytes(command_line) == LINE + b"\0"
    address, size = u32(page, 0x218) | u32(page, 0x0C0) << 32, u32(page, 0x21C) | u32(page, 0x0C4) << 32
    assert bytes(memory.view(address, size)) == initrd
    assert address % 4096 == 0
    rsdp = struct.unpack_from("<Q", page, 0x70)[0]
    assert bytes(memory.view(rsdp, 8)) == b"RSD PTR "
    assert bytes(memory.view(kernel.start, images.PAYLOAD)) == bytes(range(256)) * 16


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (b"", b"console=ttyS0"),
        (b"quiet panic=-1", b"console=ttyS0 quiet panic=-1"),
        (b"console=ttyS1 quiet", b"console=ttyS1 quiet"),
        (b"quiet console=ttyS0,115200", b"quiet console=ttyS0,115200"),
    ],
)
def test_command_line_names_a_console(given: bytes, line: bytes) -> None:
    assert linux.with_console(given) == line


def test_without_initrd_the_fields_are_zero(memory: GuestMemory) -> None:
    linux.load(memory, kernel_for(memory), None, LINE, cpus=1)
    page = memory.view(layout.ZERO_PAGE.base, 4096)
    assert (u32(page, 0x218), u32(page, 0x21C)) == (0, 0)


def test_e820_covers_exactly_the_ram_and_reserves_what_devices_use(memory: GuestMemory) -> None:
    linux.load(memory, kernel_for(memory), None, LINE, cpus=1)
    table = entries(memory.view(layout.ZERO_PAGE.base, 4096))
    ram = [(base, base + size) for base, size, kind in table if kind == zero_page.E820_RAM]
    assert ram == [(0, 0x9FC00), (0x100000, 64 * MIB)]
    reserved = {base for base, _, kind in table if kind == zero_page.E820_RESERVED}
    assert {layout.ACPI_TABLES.base, layout.PCI_ECAM.base} <= reserved


def test_e820_of_large_memory_goes_on_above_4_gb() -> None:
    table = zero_page.e820(3 * GIB, 2 * GIB)
    assert zero_page.E820Entry(4 * GIB, 2 * GIB, zero_page.E820_RAM) in table
    ends = [entry.base + entry.size for entry in table]
    assert all(end <= entry.base for end, entry in zip(ends, table[1:], strict=False))


def test_initrd_is_as_high_as_the_kernel_allows(memory: GuestMemory) -> None:
    assert linux.place_initrd(5000, kernel_for(memory), 64 * MIB).base == 64 * MIB - 2 * 4096
    assert linux.place_initrd(4096, kernel_for(memory, initrd_addr_max=0x1FFFFFF), 64 * MIB).base == 32 * MIB - 4096


@pytest.mark.parametrize("size", [40 * MIB + 1, 64 * MIB, 4 * GIB])
def test_initrd_that_does_not_fit_beside_the_kernel(memory: GuestMemory, size: int) -> None:
    with pytest.raises(ConfigError, match=r"initrd of .* MB does not fit into 64 MB"):
        linux.place_initrd(size, kernel_for(memory), 64 * MIB)


def test_command_line_that_the_kernel_would_cut(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError, match="has 2048 bytes, and this kernel takes 2047"):
        linux.load(memory, kernel_for(memory), None, b"x" * 2048, cpus=1)


def test_nothing_is_written_when_something_does_not_fit(memory: GuestMemory) -> None:
    with pytest.raises(ConfigError):
        linux.load(memory, kernel_for(memory), bytes(48 * MIB), LINE, cpus=1)
    assert not any(memory.view(layout.ZERO_PAGE.base, 4096))


def test_page_tables_map_the_first_4_gb_to_themselves(memory: GuestMemory) -> None:
    linux.load(memory, kernel_for(memory), None, LINE, cpus=1)

    def walk(address: int) -> int:
        table = layout.BOOT_PAGE_TABLES.base
        for shift in (39, 30):
            entry = struct.unpack("<Q", memory.view(table + (address >> shift & 511) * 8, 8))[0]
            assert entry & 3 == 3
            table = entry & ~0xFFF
        entry = struct.unpack("<Q", memory.view(table + (address >> 21 & 511) * 8, 8))[0]
        assert entry & 0x83 == 0x83
        result: int = (entry & ~0x1FFFFF) | address & 0x1FFFFF
        return result

    for address in (0, 0x7000, 16 * MIB, 0x7FFFFFFF, 0xFFFFFFFF):
        assert walk(address) == address
