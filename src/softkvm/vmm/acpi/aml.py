"""AML, the byte code of ACPI: as much of it as describes a board without power management of its own.

Source of truth: ACPI specification 6.5, chapter 20 (AML encoding) and 6.4 (resource descriptors). Every function returns encoded bytes,
so a table is written as nested calls that look like ASL.
"""

from __future__ import annotations

import struct
import uuid

_ZERO, _ONE, _BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x00, 0x01, 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_NAME, _SCOPE, _BUFFER, _PACKAGE, _METHOD, _EXTENDED, _DEVICE = 0x08, 0x10, 0x11, 0x12, 0x14, 0x5B, 0x82
_ROOT, _DUAL, _MULTI = 0x5C, 0x2E, 0x2F
_ARG0, _OR, _CREATE_DWORD_FIELD, _EQUAL, _IF, _RETURN = 0x68, 0x7D, 0x8A, 0x93, 0xA0, 0xA4

_END_TAG = bytes((0x79, 0))


def _sized(body: bytes) -> bytes:
    """`body` behind its PkgLength, which counts its own bytes too."""
    if len(body) + 1 < 0x40:
        return bytes((len(body) + 1,)) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes((extra << 6 | total & 0x0F,)) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError("an AML package cannot be larger than 256 MB")


def path(name: str) -> bytes:
    """A name path such as `\\_SB.PCI0`; segments are padded with underscores."""
    root = bytes((_ROOT,)) if name.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode("ascii") for segment in name.removeprefix("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    prefix = bytes((_DUAL,)) if len(segments) == 2 else bytes((_MULTI, len(segments)))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """An integer constant in its shortest form."""
    if value in (0, 1):
        return bytes((_ONE if value else _ZERO,))
    for opcode, code in ((_BYTE, "<BB"), (_WORD, "<BH"), (_DWORD, "<BI"), (_QWORD, "<BQ")):
        if value < 1 << 8 * (struct.calcsize(code) - 1):
            return struct.pack(code, opcode, value)
    raise ValueError("an AML integer has at most 64 bits")


def string(text: str) -> bytes:
    """A string constant."""
    return bytes((_STRING,)) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed EISA id such as `PNP0A08`."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    return struct.pack("<B", _DWORD) + struct.pack(">HH", letters, int(text[3:], 16))


def buffer(data: bytes) -> bytes:
    """A buffer of constant bytes."""
    return bytes((_BUFFER,)) + _sized(integer(len(data)) + data)


def uuid_buffer(text: str) -> bytes:
    """What ASL's ToUUID gives."""
    return buffer(uuid.UUID(text).bytes_le)


def package(*elements: bytes) -> bytes:
    """A package of up to 255 elements."""
    return bytes((_PACKAGE,)) + _sized(bytes((len(elements),)) + b"".join(elements))


def name(label: str, value: bytes) -> bytes:
    """A named object."""
    return bytes((_NAME,)) + path(label) + value


def scope(label: str, *terms: bytes) -> bytes:
    """Terms inside an existing scope."""
    return bytes((_SCOPE,)) + _sized(path(label) + b"".join(terms))


def device(label: str, *terms: bytes) -> bytes:
    """A device and what is inside."""
    return bytes((_EXTENDED, _DEVICE)) + _sized(path(label) + b"".join(terms))


def method(label: str, arguments: int, *terms: bytes) -> bytes:
    """A control method, not serialised."""
    return bytes((_METHOD,)) + _sized(path(label) + bytes((arguments,)) + b"".join(terms))


def argument(index: int) -> bytes:
    """Arg0 .. Arg6."""
    return bytes((_ARG0 + index,))


def create_dword_field(source: bytes, offset: int, label: str) -> bytes:
    """A name for four bytes inside a buffer."""
    return bytes((_CREATE_DWORD_FIELD,)) + source + integer(offset) + path(label)


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """Terms under a condition."""
    return bytes((_IF,)) + _sized(bytes((_EQUAL,)) + left + right + b"".join(terms))


def or_into(label: str, value: int) -> bytes:
    """`label |= value`."""
    return bytes((_OR,)) + path(label) + integer(value) + path(label)


def returns(value: bytes) -> bytes:
    """Return from a method."""
    return bytes((_RETURN,)) + value


# Resource descriptors: arguments of `resources()`


def resources(*descriptors: bytes) -> bytes:
    """A resource template."""
    return buffer(b"".join(descriptors) + _END_TAG)


def io_ports(base: int, size: int) -> bytes:
    """Fixed I/O ports, 16-bit decode."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def isa_irq(line: int) -> bytes:
    """An ISA interrupt: edge, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << line)


def fixed_memory(base: int, size: int) -> bytes:
    """A fixed range below 4 GB, writable."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


_FIXED_PRODUCER = 0x0C  # minimum and maximum fixed, positive decode, resource producer
_MEMORY, _IO, _BUS = 0, 1, 2
_READ_WRITE, _ENTIRE_RANGE = 0x01, 0x03


def _window(tag: int, code: str, kind: int, type_flags: int, base: int, size: int) -> bytes:
    body = struct.pack("<BBB" + 5 * code, kind, _FIXED_PRODUCER, type_flags, 0, base, base + size - 1, 0, size)
    return struct.pack("<BH", tag, len(body)) + body


def bus_numbers(first: int, count: int) -> bytes:
    """The PCI buses behind a host bridge."""
    return _window(0x88, "H", _BUS, 0, first, count)


def io_window(base: int, size: int) -> bytes:
    """Ports that a host bridge passes on; below 64 K, so at most 0xFFFF of them."""
    return _window(0x88, "H", _IO, _ENTIRE_RANGE, base, size)


def memory_window_32(base: int, size: int) -> bytes:
    """Addresses below 4 GB that a host bridge passes on."""
    return _window(0x87, "I", _MEMORY, _READ_WRITE, base, size)


def memory_window_64(base: int, size: int) -> bytes:
    """Addresses that a host bridge passes on."""
    return _window(0x8A, "Q", _MEMORY, _READ_WRITE, base, size)
