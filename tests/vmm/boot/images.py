"""Small kernels made for tests: valid as files, with nothing worth running inside."""

from __future__ import annotations

import struct
from typing import Any

from softkvm.vmm.layout import MIB

PAYLOAD = 4096


def bzimage(**changes: Any) -> bytes:
    """A bzImage of two setup sectors and `PAYLOAD` bytes; `changes` are header fields by name."""
    fields = {
        "setup_sects": (0x1F1, "<B", 1),
        "syssize": (0x1F4, "<I", PAYLOAD // 16),
        "boot_flag": (0x1FE, "<H", 0xAA55),
        "jump": (0x200, "<H", 0x6AEB),
        "header": (0x202, "<4s", b"HdrS"),
        "version": (0x206, "<H", 0x020F),
        "loadflags": (0x211, "<B", 1),
        "initrd_addr_max": (0x22C, "<I", 0x7FFFFFFF),
        "kernel_alignment": (0x230, "<I", 2 * MIB),
        "relocatable_kernel": (0x234, "<B", 1),
        "xloadflags": (0x236, "<H", 1),
        "cmdline_size": (0x238, "<I", 2047),
        "pref_address": (0x258, "<Q", 16 * MIB),
        "init_size": (0x260, "<I", 8 * MIB),
    }
    image = bytearray(1024 + PAYLOAD)
    image[1024:] = bytes(range(256)) * (PAYLOAD // 256)
    for name, (offset, code, value) in fields.items():
        struct.pack_into(code, image, offset, changes.pop(name, value))
    assert not changes, f"no such field: {changes}"
    return bytes(image)


def vmlinux(
    machine: int = 62, kind: int = 2, address: int = 16 * MIB, filesz: int = 256, memsz: int = 4 * MIB, entry: int | None = None
) -> bytes:
    """An ELF64 file with one loadable segment of 256 bytes in the file."""
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", kind, machine, 1, address if entry is None else entry, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # fmt: skip
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, 0xFFFFFFFF81000000, address, filesz, memsz, 0x1000)
    return header + segment + bytes(range(256))


def multiboot_header(flags: int) -> bytes:
    """The three words that every multiboot image has."""
    return struct.pack("<3I", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF)


def multiboot(bits: int = 32, flags: int = 0, memsz: int = 8192, entry: int = 4 * MIB + 16) -> bytes:
    """An ELF file of either class with one segment at 4 MB, which begins with a multiboot header."""
    content = multiboot_header(flags) + bytes(244)
    if bits == 32:
        header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\x01\x01\x01", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
        return header + struct.pack("<8I", 1, 84, 4 * MIB, 4 * MIB, len(content), memsz, 7, 4096) + content
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 7, 120, 4 * MIB, 4 * MIB, len(content), memsz, 4096) + content


def pvh(note: bytes | None = None, entry: int = 16 * MIB + 8, **segment: int) -> bytes:
    """A vmlinux with a note behind its segment: by default that of a PVH entry."""
    image = bytearray(vmlinux(**segment))
    note = phys32_entry(entry) if note is None else note
    header = struct.pack("<IIQQQQQQ", 4, 4, 176 + 256, 0, 0, len(note), len(note), 4)
    struct.pack_into("<H", image, 56, 2)
    struct.pack_into("<Q", image, 64 + 8, 176)  # the segment's content is behind the second program header now
    return bytes(image[:120]) + header + bytes(image[120:]) + note


def phys32_entry(entry: int, name: bytes = b"Xen\0", kind: int = 18) -> bytes:
    """An ELF note with a 4-byte descriptor."""
    return struct.pack("<3I", len(name), 4, kind) + name.ljust(-(-len(name) // 4) * 4, b"\0") + struct.pack("<I", entry)


def program(code: bytes) -> bytes:
    """A bzImage whose 64-bit entry point is `code`."""
    image = bytearray(bzimage())
    image[1024 + 0x200 : 1024 + 0x200 + len(code)] = code
    return bytes(image)
