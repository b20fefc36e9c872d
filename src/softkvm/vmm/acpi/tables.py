"""Headers, checksums and places of the ACPI tables.

Source of truth: ACPI specification 6.5, 5.2.5 to 5.2.8 (RSDP, table header, XSDT).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from softkvm.vmm.acpi import dsdt, fadt, madt
from softkvm.vmm.layout import ACPI_TABLES

_OEM_ID, _OEM_TABLE_ID, _CREATOR_ID = b"SOFTKV", b"SOFTKVM ", b"SKVM"
_OEM_REVISION = _CREATOR_REVISION = 1
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_CHECKSUM_OFFSET = 9
_ALIGNMENT = 64  # FACS asks for it, and it does no harm to the others

FACS_ADDRESS = ACPI_TABLES.base + _ALIGNMENT
"""Behind the RSDP, which is smaller."""

_RSDP_REVISION = 2
_RSDP_SIZE, _RSDP_V1_SIZE = 36, 20
_DSDT_REVISION = 2  # 64-bit integers
_XSDT_REVISION = 1


class Blob(NamedTuple):
    """All tables as bytes, for guest memory at `address`; the RSDP comes first."""

    address: int
    data: bytes


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes 0 modulo 256."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header."""
    size = _HEADER.size + len(body)
    header = _HEADER.pack(signature, size, revision, 0, _OEM_ID, _OEM_TABLE_ID, _OEM_REVISION, _CREATOR_ID, _CREATOR_REVISION)
    data = bytearray(header + body)
    data[_CHECKSUM_OFFSET] = checksum(data)
    return bytes(data)


def rsdp(xsdt_address: int) -> bytes:
    """The root pointer, for guests that know the XSDT; there is no RSDT."""
    first = struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM_ID, _RSDP_REVISION, 0)
    first = first[:8] + bytes((checksum(first),)) + first[9:]
    whole = first + struct.pack("<IQB3x", _RSDP_SIZE, xsdt_address, 0)
    return whole[:32] + bytes((checksum(whole),)) + whole[33:]


class _Placer:
    """Puts tables one after the other."""

    def __init__(self, address: int) -> None:
        self._start = address
        self._data = bytearray()

    def put(self, data: bytes) -> int:
        """Append a table; returns its address."""
        self._data += bytes(-len(self._data) % _ALIGNMENT)
        address = self._start + len(self._data)
        self._data += data
        return address

    def blob(self, root: bytes) -> Blob:
        """All of it, with `root` at the start."""
        self._data[: len(root)] = root
        return Blob(self._start, bytes(self._data))


def build(cpus: int) -> Blob:
    """The tables of a board with `cpus` processors."""
    place = _Placer(ACPI_TABLES.base)
    place.put(bytes(_RSDP_SIZE))
    facs_address = place.put(fadt.facs())
    dsdt_address = place.put(table(b"DSDT", _DSDT_REVISION, dsdt.definition_block(cpus)))
    described = [
        place.put(table(b"FACP", fadt.REVISION, fadt.body(facs_address, dsdt_address))),
        place.put(table(b"APIC", madt.MADT_REVISION, madt.madt_body(cpus))),
        place.put(table(b"MCFG", madt.MCFG_REVISION, madt.mcfg_body())),
    ]
    xsdt_address = place.put(table(b"XSDT", _XSDT_REVISION, struct.pack(f"<{len(described)}Q", *described)))
    return place.blob(rsdp(xsdt_address))
