"""Page walks: sizes, rights, levels, and tables that a hostile guest made."""

from __future__ import annotations

import struct

import pytest

from softkvm.vmi.errors import Corrupt, Unreadable
from softkvm.vmi.memory import BufferMemory
from softkvm.vmi.paging import AddressSpace
from tests.vmi.kernel_image import map_page

ROOT = 0x1000
NX = 1 << 63


def ram() -> bytearray:
    return bytearray(1 << 20)


def space(data: bytearray, cr3: int = ROOT, *, la57: bool = False) -> AddressSpace:
    return AddressSpace(BufferMemory([(0, memoryview(data))]), cr3, la57=la57)


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("virtual", [0x7000_1234_5000, 0xFFFF_8880_0000_0000])
def test_small_page(levels: int, virtual: int) -> None:
    data = ram()
    map_page(data, ROOT, virtual, 0x9000 | 7, iter(range(0x2000, 0x8000, 0x1000)), levels)
    data[0x9010:0x9014] = b"page"
    under = space(data, la57=levels == 5)
    assert under.translate(virtual + 0x10) == 0x9010
    assert under.read(virtual + 0x10, 4) == b"page"
    assert [page.virtual for page in under.mappings(0, 1 << 64)] == [virtual]


def test_pcid_and_no_flush_bit_are_no_address() -> None:
    data = ram()
    map_page(data, ROOT, 0x40_0000, 0x9000 | 1, iter(range(0x2000, 0x8000, 0x1000)))
    assert space(data, 1 << 63 | ROOT | 0xABC).translate(0x40_0000) == 0x9000


@pytest.mark.parametrize(("level", "size"), [(2, 2 << 20), (3, 1 << 30)])
def test_large_pages(level: int, size: int) -> None:
    data = ram()
    struct.pack_into("<Q", data, ROOT, 0x2003)
    struct.pack_into("<Q", data, 0x2000, 0x3003 if level == 2 else 0x83)
    struct.pack_into("<Q", data, 0x3000, 0x83)
    mapping = space(data).walk(0x1234)
    assert mapping is not None
    assert (mapping.physical, mapping.size) == (0, size)


def test_rights_are_those_of_all_levels() -> None:
    data = ram()
    map_page(data, ROOT, 0x40_0000, 0x9000 | 7 | NX, iter(range(0x2000, 0x8000, 0x1000)))
    struct.pack_into("<Q", data, ROOT, 0x2005)
    mapping = space(data).walk(0x40_0000)
    assert mapping is not None
    assert (mapping.writable, mapping.user, mapping.executable) == (False, True, False)


def test_what_is_not_mapped_is_unreadable() -> None:
    under = space(ram())
    with pytest.raises(Unreadable, match="guest-virtual"):
        under.read(0x1000, 8)
    assert under.walk(0x8000_0000_0000) is None


def test_read_available_ends_at_the_hole() -> None:
    data = ram()
    map_page(data, ROOT, 0x40_0000, 0x9000 | 7, iter(range(0x2000, 0x8000, 0x1000)))
    assert len(space(data).read_available(0x40_0FF0, 64)) == 16


def test_knots_in_the_tables_are_corrupt() -> None:
    data = bytearray(0x3000)
    data[0x1000:0x2000] = struct.pack("<Q", 0x1003) * 512
    data[0x2000:0x3000] = bytes(0x1000)
    pages = space(data).mappings(0, 1 << 64)
    with pytest.raises(Corrupt):
        for _ in pages:
            pass
