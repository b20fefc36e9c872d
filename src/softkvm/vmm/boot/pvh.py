"""PVH: ELF kernels that name a 32-bit entry in a note; how Xen, and after it QEMU and Firecracker, start Linux, FreeBSD and others.

Source of truth: Xen `docs/misc/pvh.pandoc` (state of the CPU at the entry), `xen/include/public/arch-x86/hvm/start_info.h` (what EBX points
to) and `xen/include/public/elfnote.h` (XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from softkvm.uapi import kvm as uapi
from softkvm.vmm import acpi, layout
from softkvm.vmm.boot import linux, vmlinux, zero_page
from softkvm.vmm.boot.image import Kernel
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.memory import GuestMemory

_MAGIC, _VERSION = 0x336EC578, 1
_START_INFO = struct.Struct("<4I4Q2I")  # magic, version, flags, modules; their list, command line, RSDP, memory map; its entries, reserved
_MODULE = struct.Struct("<4Q")  # address, size, command line, reserved
_MAP_ENTRY = struct.Struct("<QQII")

_ELF_64 = b"\x7fELF\x02"
_PROGRAM_HEADERS = struct.Struct("<32xQ14xHH")  # of the ELF header: where they are, how large, how many
_PROGRAM_HEADER = struct.Struct("<I4xQ16xQ")  # type, offset, size in the file
_PT_NOTE = 4
_NOTE = struct.Struct("<3I")  # sizes of name and descriptor, type
_XEN, _PHYS32_ENTRY = b"Xen\0", 18

_CODE_SELECTOR, _DATA_SELECTOR, _TSS_SELECTOR = 0x8, 0x10, 0x18
_CR0_PE, _CR0_ET = 1 << 0, 1 << 4
_RFLAGS_RESERVED = 1 << 1


@dataclass(frozen=True)
class PvhKernel:
    """An image and its way to start; see `boot.Bootable`."""

    kernel: Kernel
    entry: int

    def load(self, memory: GuestMemory, initrd: bytes | None, command_line: bytes, cpus: int) -> None:
        """As `Bootable`; the initrd is the one module. A command line that names no console gets the first serial port."""
        kernel, line = self.kernel, linux.with_console(command_line)
        if len(line) > kernel.command_line_limit:
            raise ConfigError(f"the kernel command line has {len(line)} bytes, and this kernel takes {kernel.command_line_limit}")
        modules = []
        if initrd is not None:
            place = linux.place_initrd(len(initrd), kernel, memory.low_end)
            memory.write(place.base, initrd)
            modules.append(place)
        for piece in kernel.pieces:
            memory.write(piece.address, piece.data)
        tables = acpi.build(cpus)
        memory.write(tables.address, tables.data)
        memory.write(layout.COMMAND_LINE.base, line + b"\0")
        memory.write(layout.PVH_INFO.base, _start_info(memory, modules, tables.address, layout.PVH_INFO.base))

    def enter(self, sregs: uapi.Sregs) -> uapi.Regs:
        """Set `sregs` to flat 32-bit protected mode without paging; the general registers at the entry."""
        sregs.cs = uapi.Segment(selector=_CODE_SELECTOR, limit=0xFFFFFFFF, type=0xB, present=1, s=1, db=1, g=1)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, uapi.Segment(selector=_DATA_SELECTOR, limit=0xFFFFFFFF, type=0x3, present=1, s=1, db=1, g=1))
        sregs.tr = uapi.Segment(selector=_TSS_SELECTOR, limit=0x67, type=0xB, present=1)
        sregs.cr0 = _CR0_PE | _CR0_ET
        return uapi.Regs(rip=self.entry, rbx=layout.PVH_INFO.base, rflags=_RFLAGS_RESERVED)


def _start_info(memory: GuestMemory, modules: Sequence[layout.Range], rsdp: int, address: int) -> bytes:
    """`struct hvm_start_info` for `address`, followed by everything that it points to but the command line."""
    entries = zero_page.e820(memory.low_end, memory.size - memory.low_end)
    modules_at = address + _START_INFO.size
    map_at = modules_at + len(modules) * _MODULE.size
    info = _START_INFO.pack(
        _MAGIC, _VERSION, 0, len(modules), modules_at, layout.COMMAND_LINE.base, rsdp, map_at, len(entries), 0
    )  # fmt: skip
    module_list = b"".join(_MODULE.pack(place.base, place.size, 0, 0) for place in modules)
    return info + module_list + b"".join(_MAP_ENTRY.pack(entry.base, entry.size, entry.type, 0) for entry in entries)


def find_entry(data: bytes) -> int | None:
    """The entry that the note of a 64-bit ELF file names; None if there is no such note."""
    if not data.startswith(_ELF_64) or len(data) < _PROGRAM_HEADERS.size:
        return None
    start, size, count = _PROGRAM_HEADERS.unpack_from(data)
    for number in range(count):
        at = start + number * size
        if at + _PROGRAM_HEADER.size + 8 > len(data):
            return None
        kind, offset, length = _PROGRAM_HEADER.unpack_from(data, at)
        for name, note, descriptor in _notes(data[offset : offset + length]) if kind == _PT_NOTE else ():
            if name == _XEN and note == _PHYS32_ENTRY and len(descriptor) in (4, 8):
                return int.from_bytes(descriptor, "little")
    return None


def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """Name, type and descriptor of each note of a segment, as far as they are whole."""
    at = 0
    while at + _NOTE.size <= len(data):
        name_size, size, kind = _NOTE.unpack_from(data, at)
        name_at = at + _NOTE.size
        start = name_at + (name_size + 3 & ~3)
        if start + size > len(data):
            return
        yield data[name_at : name_at + name_size], kind, data[start : start + size]
        at = start + (size + 3 & ~3)


def parse(data: bytes, path: Path, ram_end: int) -> PvhKernel:
    """The image in `data`, which was read from `path` and has an entry; ConfigError if it cannot be loaded below `ram_end`."""
    kernel, entry = vmlinux.parse(data, path, ram_end), find_entry(data)
    if entry is None or not kernel.start <= entry < kernel.end:
        raise ConfigError(f"the kernel {path} is damaged: its PVH entry point is in none of its segments")
    return PvhKernel(kernel, entry)
