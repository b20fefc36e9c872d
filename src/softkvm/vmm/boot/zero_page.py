"""The zero page (`struct boot_params`): what the boot loader tells the kernel.

Source of truth: Linux 6.1 `Documentation/x86/zero-page.rst` and `arch/x86/include/uapi/asm/bootparam.h`.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from softkvm.vmm import layout
from softkvm.vmm.boot.bzimage import SETUP_HEADER

E820_RAM, E820_RESERVED = 1, 2

_ACPI_RSDP_ADDR = 0x070
_EXT_RAMDISK_IMAGE, _EXT_RAMDISK_SIZE, _EXT_CMD_LINE_PTR = 0x0C0, 0x0C4, 0x0C8
_E820_ENTRIES = 0x1E8
_VID_MODE = 0x1FA
_TYPE_OF_LOADER = 0x210
_RAMDISK_IMAGE, _RAMDISK_SIZE = 0x218, 0x21C
_CMD_LINE_PTR = 0x228
_E820_TABLE = 0x2D0

_LOADER_UNDEFINED = 0xFF
_VID_MODE_NORMAL = 0xFFFF


class E820Entry(NamedTuple):
    """A range of the memory map."""

    base: int
    size: int
    type: int


def e820(low_end: int, high_size: int) -> list[E820Entry]:
    """The memory map of a machine with RAM up to `low_end` and `high_size` bytes of it above 4 GB."""
    reserved = (layout.EBDA, layout.ACPI_TABLES, layout.PCI_ECAM, layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
    entries = [E820Entry(0, layout.EBDA.base, E820_RAM)]
    entries += [E820Entry(place.base, place.size, E820_RESERVED) for place in reserved]
    entries.append(E820Entry(layout.KERNEL_FLOOR.base, low_end - layout.KERNEL_FLOOR.base, E820_RAM))
    if high_size:
        entries.append(E820Entry(layout.RAM_ABOVE_4G.base, high_size, E820_RAM))
    return sorted(entries)


def build(setup_header: bytes, memory_map: list[E820Entry], initrd: layout.Range | None, rsdp: int) -> bytes:
    """The zero page for a kernel with this header, whose command line is at its place in `layout.py`."""
    page = bytearray(layout.ZERO_PAGE.size)
    page[SETUP_HEADER : SETUP_HEADER + len(setup_header)] = setup_header
    page[_TYPE_OF_LOADER] = _LOADER_UNDEFINED
    struct.pack_into("<H", page, _VID_MODE, _VID_MODE_NORMAL)
    struct.pack_into("<Q", page, _ACPI_RSDP_ADDR, rsdp)
    _split(page, _CMD_LINE_PTR, _EXT_CMD_LINE_PTR, layout.COMMAND_LINE.base)
    if initrd is not None:
        _split(page, _RAMDISK_IMAGE, _EXT_RAMDISK_IMAGE, initrd.base)
        _split(page, _RAMDISK_SIZE, _EXT_RAMDISK_SIZE, initrd.size)
    page[_E820_ENTRIES] = len(memory_map)
    for index, entry in enumerate(memory_map):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * index, *entry)
    return bytes(page)


def _split(page: bytearray, low: int, high: int, value: int) -> None:
    """Store a 64-bit value in the two halves where the protocol keeps it."""
    struct.pack_into("<I", page, low, value & 0xFFFFFFFF)
    struct.pack_into("<I", page, high, value >> 32)
