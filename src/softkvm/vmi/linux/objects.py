"""Structures in the kernel's memory, member by member, with the offsets that the kernel's own types give.

`task.number("mm.map_count")` goes through embedded structures; a pointer is followed by `follow()`. The kernel is hostile here: a value is
whatever its memory holds, and only reading it can fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from softkvm.vmi.errors import Corrupt, UnknownName
from softkvm.vmi.linux.btf import Btf, Kind

LONGEST_LIST = 1 << 20
_LONGEST_TEXT = 4096


class Reader(Protocol):
    """The kernel's virtual memory and its types."""

    @property
    def types(self) -> Btf:
        """The kernel's types."""
        ...

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel-virtual address; raises Unreadable."""
        ...


@dataclass(frozen=True, slots=True)
class Field:
    """Where a member is inside a structure: bytes, for a bit-field also bits from there on, and its type."""

    offset: int
    size: int
    type: int
    signed: bool
    shift: int = 0
    bits: int = 0


@lru_cache(maxsize=4096)
def field(types: Btf, owner: int, path: str) -> Field:
    """The member `path`, such as `se.vruntime`, of the structure type number `owner`; UnknownName if there is none."""
    bits, current, bit_size = 0, owner, 0
    for name in path.split("."):
        found = types.strip(current)
        member = types.layout(found.number).get(name)
        if member is None:
            raise UnknownName(f"struct {found.name or '{...}'} of this kernel has no member {name}")
        bits, current, bit_size = bits + member.bit_offset, member.type, member.bit_size
    size, signed = types.size(current), types.is_signed(current)
    if not bit_size and not bits % 8:
        return Field(bits // 8, size, current, signed)
    size, bit_size = max(size, 1), bit_size or 8 * size
    start = bits // (8 * size) * size
    return Field(start, size, current, signed, bits - 8 * start, bit_size)


class Struct:
    """A structure at an address."""

    __slots__ = ("address", "reader", "type")

    def __init__(self, reader: Reader, number: int, address: int) -> None:
        """`number` is that of the type."""
        self.reader = reader
        self.type = reader.types.strip(number)
        self.address = address & (1 << 64) - 1

    def __repr__(self) -> str:
        return f"struct {self.type.name} at {self.address:#x}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Struct) and (self.address, self.type.number) == (other.address, other.type.number)

    def __hash__(self) -> int:
        return hash((self.address, self.type.number))

    def field(self, path: str) -> Field:
        """Where a member is; UnknownName if there is none."""
        return field(self.reader.types, self.type.number, path)

    def has(self, path: str) -> bool:
        """Whether this kernel's structure has the member."""
        try:
            self.field(path)
        except UnknownName:
            return False
        return True

    def at(self, path: str) -> int:
        """The address of a member."""
        return self.address + self.field(path).offset

    def bytes(self, path: str) -> bytes:
        """The memory of a member."""
        found = self.field(path)
        return self.reader.read(self.address + found.offset, found.size)

    def number(self, path: str) -> int:
        """An integer, enumerator, truth value or pointer."""
        found = self.field(path)
        value = int.from_bytes(self.reader.read(self.address + found.offset, found.size), "little", signed=found.signed and not found.bits)
        if found.bits:
            value = value >> found.shift & (1 << found.bits) - 1
            value -= (value >> (found.bits - 1)) << found.bits if found.signed else 0
        return value

    def numbers(self, path: str) -> list[int]:
        """An array of integers or pointers."""
        types, found = self.reader.types, self.field(path)
        owner = types.strip(found.type)
        if owner.kind is not Kind.ARRAY or not owner.count:
            return []
        size, signed, data = found.size // owner.count, types.is_signed(owner.target), self.bytes(path)
        return [int.from_bytes(data[at : at + size], "little", signed=signed) for at in range(0, len(data), size)]

    def text(self, path: str) -> str:
        """An array of characters, or the text that a pointer leads to."""
        found = self.field(path)
        if self.reader.types.strip(found.type).kind is Kind.POINTER:
            return read_text(self.reader, self.number(path))
        return self.bytes(path).split(b"\0", 1)[0].decode(errors="replace")

    def inside(self, path: str) -> Struct:
        """An embedded structure."""
        found = self.field(path)
        return Struct(self.reader, found.type, self.address + found.offset)

    def follow(self, path: str) -> Struct | None:
        """The structure that a pointer leads to; None for a null pointer."""
        target = self.reader.types.strip(self.field(path).type)
        if target.kind is not Kind.POINTER:
            raise UnknownName(f"{path} of struct {self.type.name} is no pointer")
        address = self.number(path)
        return Struct(self.reader, target.target, address) if address else None

    def container(self, name: str, path: str) -> Struct:
        """The structure `name` whose member `path` this is."""
        number = self.reader.types.find(name).number
        return Struct(self.reader, number, self.address - field(self.reader.types, number, path).offset)

    def members(self) -> Iterator[tuple[str, Field]]:
        """All members by name, those of anonymous parts among them."""
        return ((name, self.field(name)) for name in self.reader.types.layout(self.type.number))


def read_text(reader: Reader, address: int, limit: int = _LONGEST_TEXT) -> str:
    """The text at an address up to its NUL, the end of what can be read, or `limit` bytes; empty for a null pointer."""
    pieces = b""
    while address and len(pieces) < limit:
        size = min(64 - (address & 63), limit - len(pieces))
        piece, found, _ = reader.read(address, size).partition(b"\0")
        pieces += piece
        if found:
            break
        address += size
    return pieces.decode(errors="replace")


def walk_list(reader: Reader, head: int, name: str, path: str) -> Iterator[Struct]:
    """The structures `name` on the list (`struct list_head`) at `head` that are linked by their member `path`.

    Corrupt if the list does not come back to its head.
    """
    number = reader.types.find(name).number
    offset = field(reader.types, number, path).offset
    seen: set[int] = set()
    link = int.from_bytes(reader.read(head, 8), "little")
    while link != head:
        if link in seen or len(seen) >= LONGEST_LIST:
            raise Corrupt(f"the list of struct {name} at {head:#x} does not come back to its head")
        seen.add(link)
        yield Struct(reader, number, link - offset)
        link = int.from_bytes(reader.read(link, 8), "little")
