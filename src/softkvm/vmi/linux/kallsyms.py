"""The kernel's own symbol table, found and decoded in its memory.

Source of truth: Linux 6.1 `kernel/kallsyms.c` and `scripts/kallsyms.c`. Names are compressed with 256 tokens; the index of the tokens
checks the tokens, and the markers (the position of every 256th name) check the names, so nothing that merely looks like the tables is
taken for them. Two orders of the tables exist: addresses before the names (to 6.3), and behind the tokens (from 6.4 on).
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from softkvm.vmi.errors import KernelNotFound

_DIGITS = b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\000"
_TOKENS = 256
_INDEX_SIZE = 2 * _TOKENS
_LONGEST_TOKENS = 8192
_LONGEST_NAMES = 1 << 25
_LONGEST_NAME = 1024
_FEWEST, _MOST = 256, 1 << 21
_PER_MARKER = 256
_KERNEL_START, _KERNEL_END = 0xFFFF_FFFF_8000_0000, 0xFFFF_FFFF_C000_0000


@dataclass(frozen=True, slots=True)
class Tables:
    """Where the parts are, as offsets into the bytes that were searched."""

    count: int
    names: int
    tokens: int
    index: int
    offsets: int
    base: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """All symbols in the table's order: names with their type letter in front, and for each its distance from the table's relative base.

    A negative number n stands for the absolute address -1 - n, which is how per-CPU symbols are kept.
    """

    names: list[str]
    offsets: array[int]


def _align(position: int) -> int:
    return position + 7 & ~7


def locate(data: bytes) -> Tables:
    """Find the tables in a piece of the kernel's read-only data, taken from an address that is a multiple of 8; else KernelNotFound."""
    position = data.find(_DIGITS)
    while position >= 0:
        for tokens, index in _token_tables(data, position):
            if (tables := _names_before(data, tokens, index)) is not None:
                return tables
        position = data.find(_DIGITS, position + 1)
    raise KernelNotFound("there is no kernel symbol table (CONFIG_KALLSYMS) in this memory")


def _token_tables(data: bytes, digits: int) -> Iterator[tuple[int, int]]:
    """Token table and index whose token number "0" is at `digits`, if the index agrees with every token."""
    for start in range(digits & ~7, max(-1, (digits & ~7) - _LONGEST_TOKENS), -8):
        if data.count(0, start, digits) != ord("0"):
            continue
        offsets, position = [], start
        for _ in range(_TOKENS):
            offsets.append(position - start)
            position = data.find(0, position, start + _LONGEST_TOKENS) + 1
            if position == 0:
                break
        index = _align(position)
        if len(offsets) == _TOKENS and data[index : index + _INDEX_SIZE] == struct.pack(f"<{_TOKENS}H", *offsets):
            yield start, index


def _names_before(data: bytes, tokens: int, index: int) -> Tables | None:
    """Search backward from the tokens for a number that counts names and is confirmed by their markers."""
    low = _align(max(0, tokens - _LONGEST_NAMES))
    words = memoryview(data)[low:tokens].cast("Q")  # the number is padded to 8 bytes, and little else there is as small
    candidates = [(low + 8 * number, word) for number, word in enumerate(words) if _FEWEST <= word <= _MOST]
    for position, count in reversed(candidates):
        if _markers_agree(data, position + 8, count, tokens):
            return _addresses(data, position, count, tokens, index)
    return None


def _markers_agree(data: bytes, names: int, count: int, limit: int) -> bool:
    """Whether `count` names lie one behind the other from `names` on, and the markers follow them."""
    marks, position = array("I"), names
    for number in range(count):
        if not number % _PER_MARKER:
            marks.append(position - names)
        if position >= limit - 1:
            return False
        length, size = _length(data, position)
        if not length:
            return False
        position += size + length
    position = _align(position)
    expected = marks.tobytes()
    return position + len(expected) <= limit and data[position : position + len(expected)] == expected


def _length(data: bytes, position: int) -> tuple[int, int]:
    """Length of a compressed name, and of the field that says so: two bytes for a "big symbol"."""
    first = data[position]
    return (first & 0x7F | data[position + 1] << 7, 2) if first & 0x80 else (first, 1)


def _addresses(data: bytes, number: int, count: int, tokens: int, index: int) -> Tables | None:
    """Complete the tables with the offsets: in front of the number of symbols, or behind the index of the tokens."""
    size = _align(4 * count)
    after = _align(index + _INDEX_SIZE)
    for offsets, base in ((number - 8 - size, number - 8), (after, after + size)):
        if offsets < 0 or base + 8 > len(data):
            continue
        (value,) = struct.unpack_from("<Q", data, base)
        if _KERNEL_START <= value < _KERNEL_END:
            return Tables(count, number + 8, tokens, index, offsets, base, min(offsets, number), max(after, base + 8))
    return None


def _read_tokens(data: bytes, tables: Tables) -> list[str]:
    words = struct.unpack_from(f"<{_TOKENS}H", data, tables.index)
    return [data[tables.tokens + at : data.index(0, tables.tokens + at)].decode("latin-1") for at in words]


def decode(data: bytes, tables: Tables) -> Decoded:
    """All names and addresses. KernelNotFound if a name is longer than the kernel's longest, which no kernel writes."""
    tokens = _read_tokens(data, tables)
    names, position = [], tables.names
    for _ in range(tables.count):
        length, size = _length(data, position)
        position += size
        name = "".join([tokens[byte] for byte in data[position : position + length]])
        if not name or len(name) > _LONGEST_NAME:
            raise KernelNotFound("the kernel symbol table holds a name that is too long")
        names.append(name)
        position += length
    return Decoded(names, _decode_offsets(data, tables))


def _decode_offsets(data: bytes, tables: Tables) -> array[int]:
    """Where per-CPU symbols are absolute (to 6.14), those are the values from 0 on, and all others are -1 - distance from the base."""
    raw = array("i")
    raw.frombytes(data[tables.offsets : tables.offsets + 4 * tables.count])
    if 2 * sum(1 for value in raw if value < 0) > len(raw):
        return array("q", [-1 - value for value in raw])
    return array("q", [value & 0xFFFF_FFFF for value in raw])
