"""bzImage: the compressed kernel as distributions ship it.

Source of truth: Linux 6.1 `Documentation/x86/boot.rst` (protocol 2.15) and `arch/x86/include/uapi/asm/bootparam.h`. The file is a boot
sector and real-mode code, which a 64-bit boot does not run, and then the protected-mode part, whose 64-bit entry is at offset 0x200.
"""

from __future__ import annotations

import struct
from pathlib import Path

from softkvm.vmm.boot.image import Kernel, Piece
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.layout import COMMAND_LINE, KERNEL_FLOOR, MIB

SETUP_HEADER = 0x1F1
"""Offset of `struct setup_header` in the image and in the zero page."""

_SECTOR = 512
_DEFAULT_SETUP_SECTORS = 4
_PARAGRAPH = 16
_ENTRY_64 = 0x200
_BOOT_FLAG = 0xAA55
_MAGIC = b"HdrS"
_OLDEST_VERSION = 0x020C  # the first with xloadflags
_LOADED_HIGH = 1 << 0
_XLF_KERNEL_64 = 1 << 0
_HEADER_END = 0x264  # after init_size


def parse(data: bytes, path: Path, ram_end: int) -> Kernel:
    """The kernel in `data`, which was read from `path`; ConfigError if it is none, or none that a 64-bit boot can start."""
    if len(data) < _HEADER_END or struct.unpack_from("<H", data, 0x1FE)[0] != _BOOT_FLAG or data[0x202:0x206] != _MAGIC:
        raise ConfigError(f"{path} is not a Linux kernel (neither a bzImage nor an ELF file)")
    version: int = struct.unpack_from("<H", data, 0x206)[0]
    loadflags, xloadflags = data[0x211], data[0x236]
    if version < _OLDEST_VERSION:
        raise ConfigError(
            f"the kernel {path} speaks boot protocol {version >> 8}.{version & 0xFF:02}, and 2.12 (Linux 3.8) is the oldest supported"
        )
    if not loadflags & _LOADED_HIGH or not xloadflags & _XLF_KERNEL_64:
        raise ConfigError(f"the kernel {path} has no 64-bit entry point; an x86-64 kernel is needed")
    sectors = data[SETUP_HEADER] or _DEFAULT_SETUP_SECTORS
    payload_start = (sectors + 1) * _SECTOR
    payload_size = struct.unpack_from("<I", data, 0x1F4)[0] * _PARAGRAPH
    if len(data) < payload_start + payload_size:
        raise ConfigError(f"the kernel {path} is truncated: {len(data)} bytes of {payload_start + payload_size}")
    if payload_size <= _ENTRY_64:
        raise ConfigError(f"the kernel {path} is damaged: its 64-bit entry point lies behind its end")
    start, end = _place(data, path, ram_end, payload_size)
    return Kernel(
        pieces=(Piece(start, memoryview(data)[payload_start : payload_start + payload_size]),),
        entry=start + _ENTRY_64,
        start=start,
        end=end,
        setup_header=data[SETUP_HEADER : 0x202 + data[0x201]],
        initrd_limit=struct.unpack_from("<I", data, 0x22C)[0] + 1,
        command_line_limit=min(struct.unpack_from("<I", data, 0x238)[0], COMMAND_LINE.size - 1),
    )


def _place(data: bytes, path: Path, ram_end: int, payload_size: int) -> tuple[int, int]:
    """Where the kernel goes and where the memory ends that it needs until it knows the memory map."""
    alignment, relocatable = struct.unpack_from("<I", data, 0x230)[0], data[0x234]
    preferred, init_size = struct.unpack_from("<QI", data, 0x258)
    size = max(init_size, payload_size)
    if alignment == 0 or alignment & (alignment - 1) or preferred < KERNEL_FLOOR.base:
        raise ConfigError(f"the kernel {path} is damaged: it asks for address {preferred:#x} with an alignment of {alignment:#x}")
    start: int = preferred
    if preferred + size > ram_end and relocatable:
        start = -(-KERNEL_FLOOR.base // alignment) * alignment
    if start + size > ram_end:
        raise ConfigError(
            f"{ram_end // MIB} MB of memory are too small for the kernel {path}, which needs {-(-(start + size) // MIB)} MB to start"
        )
    return start, start + size
