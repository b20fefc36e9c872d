"""Symbols of a running kernel by name and by address, read out of its memory.

`find(memory, cr3)` is all that a tool needs. Decoded tables are kept in a directory of the user's. A file there is named by the digest of
the bytes that it was decoded from, and not by the build id alone, which the guest could take from another kernel together with false
symbols: what one guest says about itself is never believed of another.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from softkvm.vmi.errors import KernelNotFound, UnknownName, Unreadable
from softkvm.vmi.linux import image, kallsyms
from softkvm.vmi.linux.image import KERNEL_MAP, Image
from softkvm.vmi.memory import Memory

_FILES_KEPT = 16
_NOTES_LARGEST = 1 << 16
_NT_GNU_BUILD_ID = 3


class Symbol(NamedTuple):
    """A name of the kernel, its address, and the letter of nm(1) for its kind."""

    name: str
    address: int
    kind: str


class Symbols:
    """The symbol table of one kernel where it runs. Names that several symbols share stand for the first of them."""

    def __init__(self, decoded: kallsyms.Decoded, base: int) -> None:
        """`base` is the relative base of the decoded table."""
        self.base = base
        self._names = decoded.names
        self._addresses = array("Q", [base + value if value >= 0 else -1 - value for value in decoded.offsets])
        self._order = sorted(range(len(self._names)), key=self._addresses.__getitem__)
        self._sorted = [self._addresses[number] for number in self._order]
        self._by_name: dict[str, int] = {}
        for number, name in enumerate(self._names):
            self._by_name.setdefault(name[1:], number)

    def __getitem__(self, name: str) -> int:
        """The address of a symbol, or the offset of a per-CPU one; UnknownName if the kernel has none."""
        number = self._by_name.get(name)
        if number is None:
            raise UnknownName(f"this kernel has no symbol {name}")
        return self._addresses[number]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[Symbol]:
        """All symbols by ascending address."""
        return (self._symbol(number) for number in self._order)

    def _symbol(self, number: int) -> Symbol:
        name = self._names[number]
        return Symbol(name[1:], self._addresses[number], name[0])

    def lookup(self, address: int) -> Symbol | None:
        """The last symbol at or below an address of the kernel image; None for any other address."""
        if not KERNEL_MAP.base <= address < KERNEL_MAP.end or (end := self._by_name.get("_end")) is None or address >= self._addresses[end]:
            return None
        place = bisect_right(self._sorted, address) - 1
        if place < 0 or self._sorted[place] < self.base:
            return None
        while place > 0 and self._sorted[place - 1] == self._sorted[place]:
            place -= 1  # of several names for one place, the table's first
        return self._symbol(self._order[place])

    def size(self, name: str) -> int:
        """Bytes from a symbol to the next address that has one."""
        address = self[name]
        place = bisect_right(self._sorted, address)
        return self._sorted[place] - address if place < len(self._sorted) else 0

    def describe(self, address: int) -> str:
        """`name+0x12` for an address of the kernel image, else the number."""
        symbol = self.lookup(address)
        if symbol is None:
            return f"{address:#x}"
        return symbol.name + (f"+{address - symbol.address:#x}" if address != symbol.address else "")


class Found(NamedTuple):
    """A kernel image and its symbols."""

    image: Image
    symbols: Symbols
    build_id: str
    """In hexadecimal, as file(1) shows it; empty if the kernel has none."""


def find(memory: Memory, cr3: int | None = None, *, la57: bool = False, cache: Path | None = None) -> Found:
    """The kernel in `memory`; KernelNotFound if there is none. `cr3` of any vCPU makes it quick, `cache` is a directory for tables."""
    decode = kallsyms.decode if cache is None else _Cache(cache).decode
    found = image.find(memory, cr3, la57=la57, decode=decode)
    symbols = Symbols(found.symbols, found.base)
    try:
        return Found(found, symbols, _build_id(memory, found, symbols))
    except (UnknownName, Unreadable) as error:
        raise KernelNotFound(f"what looked like a Linux kernel is none: {error}") from error


def _build_id(memory: Memory, found: Image, symbols: Symbols) -> str:
    start = symbols["__start_notes"]
    size = symbols["__stop_notes"] - start
    notes = memory.read(found.physical(start), size) if 0 < size <= _NOTES_LARGEST else b""
    position = 0
    while position + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, position)
        data = position + 12 + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[position + 12 : position + 16] == b"GNU\0":
            return notes[data : data + min(data_size, 64)].hex()
        position = data + (data_size + 3 & ~3)
    return ""


class _Stored(msgspec.Struct, array_like=True):
    """A decoded table on the disk: names between NULs, and offsets of 8 bytes."""

    names: str
    offsets: bytes


class _Cache:
    """Decoded symbol tables; a file that cannot be read, written or believed costs time and nothing else."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def decode(self, data: bytes, tables: kallsyms.Tables) -> kallsyms.Decoded:
        """As `kallsyms.decode()`."""
        digest = hashlib.blake2b(digest_size=20)
        digest.update(data[tables.start : tables.base])
        digest.update(data[tables.base + 8 : tables.end])  # the base moves with every boot
        path = self._directory / f"{digest.hexdigest()}.symbols"
        if (known := _load(path)) is not None:
            return known
        decoded = kallsyms.decode(data, tables)
        with suppress(OSError):
            self._store(path, decoded)
        return decoded

    def _store(self, path: Path, decoded: kallsyms.Decoded) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        old = sorted(self._directory.glob("*.symbols"), key=lambda file: file.stat().st_mtime)
        for file in old[: max(0, len(old) - _FILES_KEPT + 1)]:
            file.unlink(missing_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(msgspec.msgpack.encode(_Stored("\0".join(decoded.names), decoded.offsets.tobytes())))
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _load(path: Path) -> kallsyms.Decoded | None:
    try:
        stored = msgspec.msgpack.decode(path.read_bytes(), type=_Stored)
    except (OSError, msgspec.DecodeError):
        return None
    names, offsets = stored.names.split("\0"), array("q")
    if len(stored.offsets) != offsets.itemsize * len(names):
        return None
    offsets.frombytes(stored.offsets)
    return kallsyms.Decoded(names, offsets)
