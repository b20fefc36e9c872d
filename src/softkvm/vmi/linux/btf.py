"""The kernel's types, from the BTF in its memory.

Source of truth: Linux 6.1 `include/uapi/linux/btf.h` and `Documentation/bpf/btf.rst`. The bytes are hostile: type numbers are checked where
they are followed, chains of modifiers and nests of anonymous members are cut at a depth that no compiler reaches.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from softkvm.vmi.errors import Corrupt, UnknownName

MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_MOST_TYPES = 1 << 22
_DEEPEST = 64


class Kind(IntEnum):
    """What a type is; VOID is type number 0."""

    VOID = 0
    INT = 1
    POINTER = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FORWARD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNCTION = 12
    PROTOTYPE = 13
    VARIABLE = 14
    DATA_SECTION = 15
    FLOAT = 16
    DECLARATION_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_FIXED_TAIL = {Kind.INT: 4, Kind.ARRAY: 12, Kind.VARIABLE: 4, Kind.DECLARATION_TAG: 4}
_ITEM_SIZE = {Kind.STRUCT: 12, Kind.UNION: 12, Kind.ENUM: 8, Kind.PROTOTYPE: 8, Kind.DATA_SECTION: 12, Kind.ENUM64: 12}
_TAIL = [(_FIXED_TAIL.get(Kind(kind), 0), _ITEM_SIZE.get(Kind(kind), 0)) for kind in range(len(Kind))]
_MODIFIERS = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_COMPOSITE = frozenset({Kind.STRUCT, Kind.UNION})
_ENUMS = frozenset({Kind.ENUM, Kind.ENUM64})
_INT_SIGNED, _INT_CHAR, _INT_BOOL = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a structure: where it is in bits, how many bits if it is a bit-field, else 0, and its type."""

    name: str
    bit_offset: int
    bit_size: int
    type: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type. `size` is in bytes, or for modifiers, pointers and functions `target` is the type they refer to."""

    number: int
    kind: Kind
    name: str
    size: int
    target: int
    count: int
    """Members, enumerators, parameters, or elements of an array."""
    position: int
    flag: bool


class Btf:
    """All types of a kernel, each decoded when it is asked for."""

    def __init__(self, data: bytes) -> None:
        """`data` is the whole BTF blob; Corrupt if it contradicts itself."""
        if len(data) < _HEADER.size:
            raise Corrupt("the kernel's type information is too short")
        magic, _, _, header, type_start, type_size, string_start, string_size = _HEADER.unpack_from(data)
        self._types_end = header + type_start + type_size
        self._strings = header + string_start
        self._strings_end = self._strings + string_size
        if magic != MAGIC or max(self._types_end, self._strings_end) > len(data):
            raise Corrupt("the kernel's type information has no valid header")
        self.data = data
        self._positions = self._index(header + type_start)
        self._by_name: dict[int, list[int]] | None = None
        self.type = cache(self._type)
        self.members = cache(self._members)
        self.layout = cache(self._layout)
        self.find = cache(self._find)

    def __len__(self) -> int:
        return len(self._positions)

    def _index(self, position: int) -> list[int]:
        """Where each type begins; number 0 is void and has no place."""
        positions, data, end, tail = [-1], self.data, self._types_end, _TAIL
        unpack = struct.Struct("<I").unpack_from
        while position + _TYPE.size <= end:
            positions.append(position)
            (info,) = unpack(data, position + 4)
            kind = info >> 24 & 0x1F
            if not 0 < kind < len(tail) or len(positions) > _MOST_TYPES:
                raise Corrupt(f"the kernel's type information has no kind {kind}")
            fixed, item = tail[kind]
            position += 12 + fixed + item * (info & 0xFFFF)
        if position != end:
            raise Corrupt("the kernel's type information ends inside a type")
        return positions

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        end = self.data.find(0, start, self._strings_end)
        if not self._strings <= start < self._strings_end or end < 0:
            raise Corrupt("the kernel's type information names a string that it does not have")
        return self.data[start:end].decode("latin-1")

    def _type(self, number: int) -> Type:
        if number == 0:
            return Type(0, Kind.VOID, "void", 0, 0, 0, 0, False)
        if not 0 < number < len(self._positions):
            raise Corrupt(f"the kernel's type information has no type {number}")
        position = self._positions[number]
        name, info, size = _TYPE.unpack_from(self.data, position)
        kind, count = Kind(info >> 24 & 0x1F), info & 0xFFFF
        target = 0
        if kind in (Kind.POINTER, Kind.FUNCTION, Kind.PROTOTYPE, Kind.VARIABLE, Kind.DECLARATION_TAG) or kind in _MODIFIERS:
            target, size = size, 8 if kind is Kind.POINTER else 0
        elif kind is Kind.ARRAY:
            target, _, count = _MEMBER.unpack_from(self.data, position + 12)
            size = 0
        return Type(number, kind, self._string(name), size, target, count, position + 12, bool(info >> 31))

    def __iter__(self) -> Iterator[Type]:
        """All types but void, by number."""
        return (self.type(number) for number in range(1, len(self)))

    def _find(self, name: str, kinds: frozenset[Kind] = _COMPOSITE) -> Type:
        """The first complete type of this name; UnknownName if the kernel has none."""
        if self._by_name is None:
            self._by_name = {}
            unpack = struct.Struct("<I").unpack_from
            for number, position in enumerate(self._positions):
                if number:
                    self._by_name.setdefault(unpack(self.data, position)[0], []).append(number)
        for number in self._named(name):
            if (found := self.type(number)).kind in kinds:
                return found
        raise UnknownName(f"this kernel has no type {name}")

    def _named(self, name: str) -> list[int]:
        """Numbers of all types of a name: the string may end another one, so that each place where it stands is looked at."""
        assert self._by_name is not None
        wanted, numbers = name.encode("latin-1", "replace") + b"\0", []
        at = self.data.find(wanted, self._strings, self._strings_end)
        while at >= 0:
            numbers += self._by_name.get(at - self._strings, [])
            at = self.data.find(wanted, at + 1, self._strings_end)
        return sorted(numbers)

    def _members(self, number: int) -> tuple[Member, ...]:
        """The members of a structure or union as they are declared, anonymous ones with an empty name."""
        owner = self.type(number)
        if owner.kind not in _COMPOSITE:
            return ()
        members = []
        for index in range(owner.count):
            name, target, offset = _MEMBER.unpack_from(self.data, owner.position + 12 * index)
            bits = offset >> 24 if owner.flag else 0
            members.append(Member(self._string(name), offset & 0xFF_FFFF if owner.flag else offset, bits, target))
        return tuple(members)

    def _layout(self, number: int) -> dict[str, Member]:
        """The members by name, those of anonymous structures and unions among them, as C sees them."""
        found: dict[str, Member] = {}
        self._flatten(number, 0, found, _DEEPEST)
        return found

    def _flatten(self, number: int, bits: int, found: dict[str, Member], depth: int) -> None:
        if not depth:
            raise Corrupt("the kernel's type information nests anonymous structures without end")
        for member in self.members(number):
            offset = bits + member.bit_offset
            if member.name:
                found.setdefault(member.name, Member(member.name, offset, member.bit_size, member.type))
            elif (inner := self.strip(member.type)).kind in _COMPOSITE:
                self._flatten(inner.number, offset, found, depth - 1)

    def strip(self, number: int) -> Type:
        """The type behind typedefs and qualifiers."""
        for _ in range(_DEEPEST):
            found = self.type(number)
            if found.kind not in _MODIFIERS:
                return found
            number = found.target
        raise Corrupt("the kernel's type information defines a type by itself")

    def size(self, number: int) -> int:
        """Bytes that a value of the type takes."""
        factor = 1
        for _ in range(_DEEPEST):
            found = self.strip(number)
            if found.kind is not Kind.ARRAY:
                return factor * found.size
            factor *= found.count
            number = found.target
        raise Corrupt("the kernel's type information nests arrays without end")

    def is_signed(self, number: int) -> bool:
        """Whether values of the integer or enumeration are signed."""
        found = self.strip(number)
        if found.kind is Kind.INT:
            return bool(self._encoding(found) & _INT_SIGNED)
        return found.kind in _ENUMS and found.flag

    def is_bool(self, number: int) -> bool:
        """Whether the type is `_Bool`."""
        found = self.strip(number)
        return found.kind is Kind.INT and bool(self._encoding(found) & _INT_BOOL)

    def is_char(self, number: int) -> bool:
        """Whether the type is a character: what arrays of are text."""
        found = self.strip(number)
        return found.kind is Kind.INT and found.size == 1 and found.name in ("char", "unsigned char", "signed char")

    def _encoding(self, found: Type) -> int:
        return int.from_bytes(self.data[found.position : found.position + 4], "little") >> 24 & 0xF

    def enumerators(self, number: int) -> dict[str, int]:
        """The names and values of an enumeration."""
        owner = self.type(number)
        values = {}
        for index in range(owner.count if owner.kind in _ENUMS else 0):
            if owner.kind is Kind.ENUM:
                name, value = struct.unpack_from("<Ii" if owner.flag else "<II", self.data, owner.position + 8 * index)
            else:
                name, low, high = _MEMBER.unpack_from(self.data, owner.position + 12 * index)
                value = high << 32 | low
                value -= (value >> 63) << 64 if owner.flag else 0
            values[self._string(name)] = value
        return values

    def parameters(self, number: int) -> tuple[tuple[str, int], ...]:
        """Names and types of a function's parameters, from the function or its prototype."""
        owner = self.type(number)
        owner = self.type(owner.target) if owner.kind is Kind.FUNCTION else owner
        count = owner.count if owner.kind is Kind.PROTOTYPE else 0
        pairs = [struct.unpack_from("<II", self.data, owner.position + 8 * index) for index in range(count)]
        return tuple((self._string(name), target) for name, target in pairs)

    def spell(self, number: int) -> str:
        """The type as C writes it, such as `const char *`."""
        words: list[str] = []
        for _ in range(_DEEPEST):
            found = self.type(number)
            if found.kind is Kind.POINTER:
                words.insert(0, "*")
            elif found.kind in (Kind.CONST, Kind.VOLATILE, Kind.RESTRICT):
                words.insert(0, found.kind.name.lower())
            elif found.kind is Kind.ARRAY:
                words.append(f"[{found.count}]")
            elif found.kind is not Kind.TYPE_TAG:
                return " ".join([_spell_name(found), *words])
            number = found.target
        raise Corrupt("the kernel's type information defines a type by itself")


def _spell_name(found: Type) -> str:
    prefix = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.ENUM: "enum ", Kind.ENUM64: "enum "}.get(found.kind, "")
    if found.kind is Kind.FORWARD:
        prefix = "union " if found.flag else "struct "
    if found.kind is Kind.PROTOTYPE:
        return "function"
    return prefix + (found.name or "{...}")
