"""Everything that lies in guest memory when a Linux kernel is entered: kernel, initrd, command line, zero page, page tables, GDT, ACPI."""

from __future__ import annotations

import struct

from softkvm.vmm import acpi, layout
from softkvm.vmm.boot import zero_page
from softkvm.vmm.boot.image import Kernel
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import MIB, Range
from softkvm.vmm.memory import GuestMemory

CODE_SELECTOR, DATA_SELECTOR = 0x10, 0x18  # __BOOT_CS and __BOOT_DS
_CODE_64 = 0x00AF9B000000FFFF  # present, ring 0, execute/read, long, accessed
_DATA = 0x00CF93000000FFFF  # present, ring 0, read/write, 4 GB, accessed
GDT = struct.pack("<4Q", 0, 0, _CODE_64, _DATA)

_PRESENT, _WRITABLE, _LARGE = 1 << 0, 1 << 1, 1 << 7
_TABLE = 0x1000
_DIRECTORIES = 4  # of 1 GB each
_PAGE = 4096

DEFAULT_PARAMETERS = b"console=ttyS0"
"""Goes before a command line that names no console."""


def with_console(command_line: bytes) -> bytes:
    """The command line, behind the default console unless it names one."""
    if any(word.startswith(b"console=") for word in command_line.split()):
        return command_line
    return b" ".join([DEFAULT_PARAMETERS, command_line]).rstrip()


def load(memory: GuestMemory, kernel: Kernel, initrd: bytes | None, command_line: bytes, cpus: int) -> None:
    """Put it all into memory; ConfigError if the initrd or the command line do not fit."""
    if len(command_line) > kernel.command_line_limit:
        raise ConfigError(f"the kernel command line has {len(command_line)} bytes, and this kernel takes {kernel.command_line_limit}")
    place = None if initrd is None else place_initrd(len(initrd), kernel, memory.low_end)
    tables = acpi.build(cpus)
    memory_map = zero_page.e820(memory.low_end, memory.size - memory.low_end)
    for piece in kernel.pieces:
        memory.write(piece.address, piece.data)
    if initrd is not None and place is not None:
        memory.write(place.base, initrd)
    memory.write(layout.COMMAND_LINE.base, command_line + b"\0")
    memory.write(layout.ZERO_PAGE.base, zero_page.build(kernel.setup_header, memory_map, place, tables.address))
    memory.write(tables.address, tables.data)
    memory.write(layout.BOOT_GDT.base, GDT)
    memory.write(layout.BOOT_PAGE_TABLES.base, identity_map(layout.BOOT_PAGE_TABLES.base))


def place_initrd(size: int, kernel: Kernel, ram_end: int) -> Range:
    """The highest place for an initrd of `size` bytes that the kernel can reach and does not overwrite."""
    base = (min(kernel.initrd_limit, ram_end) - size) & -_PAGE
    if base < kernel.end:
        raise ConfigError(f"the initrd of {size / MIB:.1f} MB does not fit into {ram_end // MIB} MB of memory beside the kernel")
    return Range(base, size, "initrd")


def identity_map(address: int) -> bytes:
    """Page tables at `address` that map the first 4 GB to themselves by 2 MB pages."""
    pdpt, directories = address + _TABLE, address + 2 * _TABLE
    pml4 = [pdpt | _PRESENT | _WRITABLE]
    pointers = [directories + _TABLE * index | _PRESENT | _WRITABLE for index in range(_DIRECTORIES)]
    pages = [index * 2 * MIB | _PRESENT | _WRITABLE | _LARGE for index in range(512 * _DIRECTORIES)]
    return b"".join(struct.pack(f"<{len(entries)}Q", *entries).ljust(_TABLE, b"\0") for entries in (pml4, pointers, pages))
