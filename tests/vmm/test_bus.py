"""Address decoding."""

from __future__ import annotations

import pytest

from softkvm.vmm.bus import Bus
from softkvm.vmm.layout import Range
from tests.vmm.doubles import Ram


@pytest.fixture
def bus() -> Bus:
    return Bus()


def test_unclaimed_addresses_read_as_all_ones_and_swallow_writes(bus: Bus) -> None:
    bus.write(0x80, 4, 0x12345678)
    assert [bus.read(0x80, size) for size in (1, 2, 4, 8)] == [0xFF, 0xFFFF, 0xFFFFFFFF, (1 << 64) - 1]


def test_access_reaches_the_device_at_its_offset(bus: Bus) -> None:
    ram = Ram(8)
    bus.claim(Range(0x100, 8, ""), ram, width=8)
    bus.write(0x104, 4, 0xCAFEBABE)
    assert bus.read(0x104, 4) == 0xCAFEBABE
    assert ram.log == [("w", 4, 4), ("r", 4, 4)]


def test_wide_access_is_split_to_the_width_of_the_device(bus: Bus) -> None:
    ram = Ram(4)
    bus.claim(Range(0x70, 4, ""), ram, width=1)
    bus.write(0x70, 4, 0x04030201)
    assert bytes(ram.bytes) == b"\1\2\3\4"
    assert bus.read(0x70, 4) == 0x04030201
    assert {size for _, _, size in ram.log} == {1}


def test_unaligned_access_is_split(bus: Bus) -> None:
    ram = Ram(8)
    ram.bytes[:] = bytes(range(8))
    bus.claim(Range(0x100, 8, ""), ram, width=4)
    assert bus.read(0x101, 4) == 0x04030201
    assert ("r", 1, 4) not in ram.log


def test_access_across_the_end_of_a_claim_meets_its_neighbour(bus: Bus) -> None:
    first, second = Ram(2), Ram(2)
    first.bytes[:], second.bytes[:] = b"\x11\x22", b"\x33\x44"
    bus.claim(Range(0x100, 2, ""), first, width=4)
    bus.claim(Range(0x102, 2, ""), second, width=4)
    assert bus.read(0x100, 4) == 0x44332211
    assert bus.read(0x102, 4) == 0xFFFF4433


@pytest.mark.parametrize("base", [0x0F9, 0x100, 0x103, 0x107])
def test_overlapping_claim_is_refused(bus: Bus, base: int) -> None:
    bus.claim(Range(0x100, 8, ""), Ram(8))
    with pytest.raises(ValueError, match="claimed"):
        bus.claim(Range(base, 8, ""), Ram(8))


def test_released_claim_is_free_again(bus: Bus) -> None:
    bus.claim(Range(0x100, 8, ""), Ram(8))
    assert not bus.free(Range(0x104, 1, ""))
    bus.release(0x100)
    assert bus.free(Range(0x100, 8, ""))
    assert bus.read(0x100, 1) == 0xFF
    with pytest.raises(KeyError):
        bus.release(0x100)


def test_odd_sizes_of_page_crossing_accesses_work(bus: Bus) -> None:
    ram = Ram(8)
    bus.claim(Range(0x1000, 8, ""), ram, width=8)
    bus.write(0x1000, 3, 0x030201)
    assert bus.read(0x1000, 3) == 0x030201
    assert bus.read(0x1000, 7) == 0x030201
