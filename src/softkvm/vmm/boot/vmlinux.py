"""vmlinux: an uncompressed kernel as an ELF file, started at its 64-bit entry without a decompressor.

Source of truth: System V ABI, chapter 5 (program headers), Linux 6.1 `arch/x86/kernel/vmlinux.lds.S` (the entry is `phys_startup_64`) and
`Documentation/x86/boot.rst`, which fixes the registers at that entry.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

from softkvm.vmm.boot.image import Kernel, Piece
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import COMMAND_LINE, KERNEL_FLOOR, MIB, RAM_BELOW_4G

_COMMAND_LINE_SIZE = 2048  # COMMAND_LINE_SIZE of Linux on x86
_INITRD_LIMIT = RAM_BELOW_4G.end
_PROTOCOL = 0x020F
_JUMP = 0x6A  # the header ends at 0x202 + this: the size of protocol 2.15


def _setup_header() -> bytes:
    """The part of `struct setup_header` that a kernel reads from the zero page to recognise a boot loader."""
    header = bytearray(0x202 + _JUMP - 0x1F1)
    for offset, layout, value in ((0x1FE, "<H", 0xAA55), (0x201, "<B", _JUMP), (0x202, "<4s", b"HdrS"), (0x206, "<H", _PROTOCOL)):
        struct.pack_into(layout, header, offset - 0x1F1, value)
    header[0x211 - 0x1F1] = 1  # LOADED_HIGH
    return bytes(header)


def parse(data: bytes, path: Path, ram_end: int) -> Kernel:
    """The kernel in `data`, which was read from `path`; ConfigError if it is not an x86-64 executable that fits."""
    from elftools.common.exceptions import ELFError  # here, because most kernels are bzImages
    from elftools.elf.elffile import ELFFile

    try:
        elf = ELFFile(io.BytesIO(data))
        segments = [segment.header for segment in elf.iter_segments() if segment.header.p_type == "PT_LOAD" and segment.header.p_memsz]
    except (ELFError, struct.error, ValueError) as error:
        raise ConfigError(f"the kernel {path} is a damaged ELF file: {error}") from error
    if elf.header.e_machine != "EM_X86_64" or elf.header.e_type != "ET_EXEC" or not segments:
        raise ConfigError(f"{path} is an ELF file, but not an x86-64 kernel")
    if any(len(data) < segment.p_offset + segment.p_filesz for segment in segments):
        raise ConfigError(f"the kernel {path} is truncated: its segments lie behind its end")
    start = min(segment.p_paddr for segment in segments)
    end = max(segment.p_paddr + segment.p_memsz for segment in segments)
    if not start <= elf.header.e_entry < end or any(segment.p_filesz > segment.p_memsz for segment in segments):
        raise ConfigError(f"the kernel {path} is damaged: its entry point or its segments do not fit together")
    if start < KERNEL_FLOOR.base:
        raise ConfigError(f"the kernel {path} wants to be at {start:#x}, below 1 MB")
    if end > ram_end:
        raise ConfigError(f"{ram_end // MIB} MB of memory are too small for the kernel {path}, which needs {-(-end // MIB)} MB to start")
    content = memoryview(data)
    return Kernel(
        pieces=[Piece(segment.p_paddr, content[segment.p_offset : segment.p_offset + segment.p_filesz]) for segment in segments],
        entry=elf.header.e_entry,
        start=start,
        end=end,
        setup_header=_setup_header(),
        initrd_limit=_INITRD_LIMIT,
        command_line_limit=min(_COMMAND_LINE_SIZE - 1, COMMAND_LINE.size - 1),
    )
