"""Multiboot: kernels that ask for 32-bit protected mode and a description of the machine; how kvm-unit-tests and small kernels start.

Source of truth: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state) and 3.3 (boot information). The image is an ELF
file; the address fields of the header, which describe other formats, are not supported, nor is setting a video mode.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softkvm.uapi import kvm as uapi
from softkvm.vmm import acpi, layout
from softkvm.vmm.boot import zero_page
from softkvm.vmm.boot.image import Piece
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import KIB, MIB
from softkvm.vmm.memory import GuestMemory

HEADER_MAGIC = 0x1BADB002
LOADER_MAGIC = 0x2BADB002
"""In EAX at the entry."""

_HEADER_AREA = 8192  # the header lies within these first bytes of the file, on a multiple of 4
_SUPPORTED = 1 << 0 | 1 << 1  # modules on page boundaries, memory information: both are done anyway
_MUST_UNDERSTAND = 0x1FFFF  # the other bits are optional, but for 16: the address fields

_INFO_MEMORY, _INFO_COMMAND_LINE, _INFO_MODULES, _INFO_MAP, _INFO_LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_INFO = struct.Struct("<7I16x2I12xI48x")  # flags, lower, upper, boot device, command line, modules (2); map (2); loader name
_MODULE = struct.Struct("<4I")
_MAP_ENTRY = struct.Struct("<IQQI")
_LOADER_NAME = b"softkvm\0"
_PAGE = 4096

_CODE_SELECTOR, _DATA_SELECTOR = 0x8, 0x10
_CR0_PE, _CR0_ET = 1 << 0, 1 << 4
_RFLAGS_RESERVED = 1 << 1


@dataclass(frozen=True)
class MultibootKernel:
    """An image and its way to start; see `boot.Bootable`."""

    path: Path
    pieces: Sequence[Piece]
    entry: int
    end: int
    """The first byte after its memory, with what the file does not fill."""

    def load(self, memory: GuestMemory, initrd: bytes | None, command_line: bytes, cpus: int) -> None:
        """Put image, module, boot information and ACPI tables into memory; ConfigError if they do not fit."""
        for piece in self.pieces:
            memory.write(piece.address, piece.data)
        modules = []
        if initrd is not None:
            start = max(self.end + -self.end % _PAGE, layout.KERNEL_FLOOR.base)
            if start + len(initrd) > memory.low_end:
                raise ConfigError(f"the module of {len(initrd) / MIB:.1f} MB does not fit into {memory.low_end // MIB} MB of memory")
            memory.write(start, initrd)
            modules.append((start, start + len(initrd)))
        tables = acpi.build(cpus)
        memory.write(tables.address, tables.data)
        line = str(self.path).encode() + b" " + command_line
        memory.write(layout.MULTIBOOT_INFO.base, _information(memory, modules, line, layout.MULTIBOOT_INFO))

    def enter(self, sregs: uapi.Sregs) -> uapi.Regs:
        """Set `sregs` to flat 32-bit protected mode without paging; the general registers at the entry."""
        sregs.cs = _segment(_CODE_SELECTOR, 0xB)
        for name in ("ds", "es", "fs", "gs", "ss"):
            setattr(sregs, name, _segment(_DATA_SELECTOR, 0x3))
        sregs.cr0 = _CR0_PE | _CR0_ET
        return uapi.Regs(rip=self.entry, rax=LOADER_MAGIC, rbx=layout.MULTIBOOT_INFO.base, rflags=_RFLAGS_RESERVED)


def find_header(data: bytes) -> int | None:
    """The flags of the multiboot header in a file; None if it has none."""
    area = data[:_HEADER_AREA]
    position = area.find(struct.pack("<I", HEADER_MAGIC))
    while 0 <= position <= len(area) - 12:
        magic, flags, checksum = struct.unpack_from("<3I", area, position)
        if position % 4 == 0 and (magic + flags + checksum) % (1 << 32) == 0:
            return int(flags)
        position = area.find(struct.pack("<I", HEADER_MAGIC), position + 1)
    return None


def parse(data: bytes, path: Path, ram_end: int) -> MultibootKernel:
    """The image in `data`, which was read from `path` and has a header; ConfigError if it cannot be loaded below `ram_end`."""
    from elftools.common.exceptions import ELFError  # here, because most kernels are bzImages
    from elftools.elf.elffile import ELFFile

    demanded = (find_header(data) or 0) & _MUST_UNDERSTAND & ~_SUPPORTED & ~0xFE00
    if demanded:
        raise ConfigError(f"the multiboot kernel {path} demands what is not supported (flags {demanded:#x})")
    try:
        elf = ELFFile(io.BytesIO(data))
        segments = [segment.header for segment in elf.iter_segments() if segment.header.p_type == "PT_LOAD" and segment.header.p_memsz]
    except (ELFError, struct.error, ValueError) as error:
        raise ConfigError(f"the kernel {path} is a damaged ELF file: {error}") from error
    if any(len(data) < segment.p_offset + segment.p_filesz or segment.p_filesz > segment.p_memsz for segment in segments):
        raise ConfigError(f"the kernel {path} is truncated: its segments lie behind its end")
    if not any(segment.p_paddr <= elf.header.e_entry < segment.p_paddr + segment.p_memsz for segment in segments):
        raise ConfigError(f"the kernel {path} is damaged: its entry point is in none of its segments")
    end = max(segment.p_paddr + segment.p_memsz for segment in segments)
    if end > ram_end:
        raise ConfigError(f"{ram_end // MIB} MB of memory are too small for the kernel {path}, which needs {-(-end // MIB)} MB to start")
    content = memoryview(data)
    pieces = [Piece(segment.p_paddr, content[segment.p_offset : segment.p_offset + segment.p_filesz]) for segment in segments]
    return MultibootKernel(path, pieces, elf.header.e_entry, end)


def _information(memory: GuestMemory, modules: Sequence[tuple[int, int]], line: bytes, place: layout.Range) -> bytes:
    """The information structure for `place`, followed by everything that it points to."""
    entries = zero_page.e820(memory.low_end, memory.size - memory.low_end)
    memory_map = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, entry.base, entry.size, entry.type) for entry in entries)
    module_list = b"".join(_MODULE.pack(start, end, 0, 0) for start, end in modules)
    map_at = place.base + _INFO.size
    modules_at = map_at + len(memory_map)
    loader_at = modules_at + len(module_list)
    line_at = loader_at + len(_LOADER_NAME)
    info = _INFO.pack(
        _INFO_MEMORY | _INFO_COMMAND_LINE | _INFO_MODULES | _INFO_MAP | _INFO_LOADER,
        layout.EBDA.base // KIB,
        (memory.low_end - MIB) // KIB,
        0,
        line_at,
        len(modules),
        modules_at,
        len(memory_map),
        map_at,
        loader_at,
    )
    data = info + memory_map + module_list + _LOADER_NAME + line + b"\0"
    if len(data) > place.size:
        raise ConfigError(f"the kernel command line has {len(line)} bytes, which is {len(data) - place.size} too many")
    return data


def _segment(selector: int, kind: int) -> uapi.Segment:
    return uapi.Segment(selector=selector, limit=0xFFFFFFFF, type=kind, present=1, s=1, db=1, g=1)
