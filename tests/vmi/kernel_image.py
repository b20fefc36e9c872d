"""A kernel image for tests: symbol table and types written as the kernel's own build tools write them, in memory with page tables.

It is the inverse of `softkvm.vmi.linux.kallsyms` and `btf`, written from `scripts/kallsyms.c` and `btf.h` of Linux 6.1.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from softkvm.vmi.memory import PAGE_SIZE, BufferMemory

BASE = 0xFFFF_FFFF_8900_0000
PHYSICAL = 0x20_0000
SIZE = 0x10_0000
RODATA = 0x8_0000
"""Offset of the read-only data in the image."""
NOTES = 0x40
BUILD_ID = bytes(range(20))


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def kallsyms(symbols: Sequence[tuple[str, int]], base: int = BASE, *, new_order: bool = False) -> bytes:
    """The tables of `symbols`: names with their type letter, and addresses; below `base`, absolute ones."""
    offsets = b"".join(struct.pack("<i", base - 1 - address if address >= base else address) for _, address in symbols)
    names, markers = b"", b""
    for position, (name, _) in enumerate(symbols):
        if not position % 256:
            markers += struct.pack("<I", len(names))
        length = len(name)
        names += (bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])) + name.encode()
    tokens, index = b"", b""
    for byte in range(256):
        index += struct.pack("<H", len(tokens))
        tokens += (bytes([byte]) if byte else b"?") + b"\0"
    number = _pad(struct.pack("<I", len(symbols)))
    seqs = _pad(bytes(3 * len(symbols)))
    addresses = _pad(offsets) + struct.pack("<Q", base)
    if new_order:
        return number + _pad(names) + _pad(markers) + _pad(tokens) + _pad(index) + addresses + seqs
    return addresses + number + _pad(names) + _pad(markers) + seqs + _pad(tokens) + _pad(index)


class Types:
    """Builds BTF; each method returns the number of the type that it adds."""

    def __init__(self) -> None:
        self._types: list[bytes] = []
        self._strings = b"\0"

    def string(self, text: str) -> int:
        """The offset of a string that is added."""
        offset = len(self._strings) if text else 0
        self._strings += text.encode() + b"\0" if text else b""
        return offset

    def add(self, name: str, kind: int, size: int, tail: bytes = b"", count: int = 0, flag: bool = False) -> int:
        """Any type."""
        self._types.append(struct.pack("<III", self.string(name), flag << 31 | kind << 24 | count, size) + tail)
        return len(self._types)

    def integer(self, name: str, size: int, encoding: int = 0) -> int:
        """An integer; encoding 1 is signed, 2 char, 4 bool."""
        return self.add(name, 1, size, struct.pack("<I", encoding << 24 | 8 * size))

    def pointer(self, target: int) -> int:
        """A pointer."""
        return self.add("", 2, target)

    def array(self, target: int, count: int) -> int:
        """An array."""
        return self.add("", 3, 0, struct.pack("<III", target, target, count))

    def structure(self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = 4) -> int:
        """A structure: name, type and byte offset of each member."""
        tail = b"".join(struct.pack("<III", self.string(member), target, 8 * offset) for member, target, offset in members)
        return self.add(name, kind, size, tail, len(members))

    def blob(self) -> bytes:
        """All of it."""
        types = b"".join(self._types)
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(self._strings)) + types + self._strings


def build(symbols: Mapping[str, int], types: bytes, *, base: int = BASE, new_order: bool = False) -> bytes:
    """An image of SIZE bytes: the symbols given (name with type letter to offset in the image), and those that every kernel has."""
    note = struct.pack("<III", 4, len(BUILD_ID), 3) + b"GNU\0" + BUILD_ID
    filler = {f"tfiller_{number}": 0x1000 + 16 * number for number in range(700)}
    tables_at = RODATA + 0x100
    placed = {
        "T_text": 0,
        **filler,
        **symbols,
        "D_end": SIZE,
        "R__start_notes": RODATA + NOTES,
        "R__stop_notes": RODATA + NOTES + len(note),
    }
    size = len(kallsyms([("R__start_BTF", base), *((name, base) for name in placed)], base, new_order=new_order))
    btf_at = tables_at + size + 64
    entries = [(name, base + offset) for name, offset in {**placed, "R__start_BTF": btf_at}.items()] + [("Acpu_number", 0x1234)]
    tables = kallsyms(entries, base, new_order=new_order)
    image = bytearray(SIZE)
    image[RODATA + NOTES : RODATA + NOTES + len(note)] = note
    image[tables_at : tables_at + len(tables)] = tables
    image[btf_at : btf_at + len(types)] = types
    return bytes(image)


def memory(image: bytes, base: int = BASE) -> tuple[BufferMemory, bytearray, int]:
    """RAM with the image at PHYSICAL, page tables that map it at `base` (4 KiB pages, read-only from RODATA on), and their CR3."""
    ram = bytearray(PHYSICAL + SIZE + 0x10_0000)
    ram[PHYSICAL : PHYSICAL + len(image)] = image
    tables = iter(range(PHYSICAL + SIZE, len(ram), PAGE_SIZE))
    root = next(tables)
    for page in range(0, SIZE, PAGE_SIZE):
        flags = 1 | 1 << 63 if page >= RODATA else 1
        map_page(ram, root, base + page, PHYSICAL + page | flags, tables)
    return BufferMemory([(0, memoryview(ram))]), ram, root


def map_page(ram: bytearray, root: int, virtual: int, entry: int, tables: object, levels: int = 4) -> None:
    """Enter a 4 KiB page into the tables at `root`; new tables come from the iterator `tables`."""
    table = root
    for level in range(levels, 1, -1):
        place = table + 8 * (virtual >> (12 + 9 * (level - 1)) & 0x1FF)
        (known,) = struct.unpack_from("<Q", ram, place)
        if not known & 1:
            known = next(tables) | 7  # type: ignore[call-overload]
            struct.pack_into("<Q", ram, place, known)
        table = known & 0x000F_FFFF_FFFF_F000
    struct.pack_into("<Q", ram, table + 8 * (virtual >> 12 & 0x1FF), entry)
