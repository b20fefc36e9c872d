"""`softkvm.kvm.coalesced`: which writes are noted, and what the ring survives."""

from __future__ import annotations

import struct

import pytest

from softkvm.kvm.coalesced import MAX_ENTRIES, Coalesced
from softkvm.uapi.kvm import CoalescedMmioZone
from tests.kvm.fakes import FakeVcpu, FakeVm


def ring(vm: FakeVm) -> memoryview:
    return vm.vcpus[0].mmap_area[8192:]


def coalesced(size: int = 0x100, pio: int = 0) -> tuple[FakeVm, Coalesced]:
    vm = FakeVm(irqchip=False)
    FakeVcpu(vm, lapic=False)
    zones = Coalesced(vm)
    zones.register(CoalescedMmioZone(addr=0x2000, size=size, pio=pio))
    return vm, zones


@pytest.mark.parametrize("pio", [0, 1])
def test_writes_are_noted_in_order(pio: int) -> None:
    vm, _ = coalesced(pio=pio)
    bus = vm.pio_bus if pio else vm.mmio_bus
    assert bus.write(0x2004, 4, 0x11223344)
    assert bus.write(0x20FF, 1, 0x55)
    assert not bus.write(0x20FE, 4, 0)  # sticks out of the zone
    assert bus.read(0x2004, 4) is None
    assert struct.unpack_from("<II", ring(vm)) == (0, 2)
    assert struct.unpack_from("<QIIQ", ring(vm), 8) == (0x2004, 4, pio, 0x11223344)
    assert struct.unpack_from("<QIIQ", ring(vm), 32) == (0x20FF, 1, pio, 0x55)


def test_a_full_ring_leaves_the_write_to_user_space() -> None:
    vm, _ = coalesced()
    taken = sum(vm.mmio_bus.write(0x2000, 1, 0) for _ in range(MAX_ENTRIES + 5))
    assert taken == MAX_ENTRIES - 1
    struct.pack_into("<I", ring(vm), 0, 10)
    assert vm.mmio_bus.write(0x2000, 1, 0)


@pytest.mark.parametrize("first", [0, 1, 0xFFFF_FFFF])
@pytest.mark.parametrize("last", [MAX_ENTRIES, 0xFFFF_FFFF])
def test_indices_that_user_space_broke_are_not_followed(first: int, last: int) -> None:
    vm, _ = coalesced()
    struct.pack_into("<II", ring(vm), 0, first, last)
    assert not vm.mmio_bus.write(0x2000, 8, 0)


def test_zones_are_removed_by_any_range_inside() -> None:
    vm, zones = coalesced()
    zones.unregister(CoalescedMmioZone(addr=0x2000, size=0x101))
    assert vm.mmio_bus.write(0x2000, 1, 0)
    zones.unregister(CoalescedMmioZone(addr=0x2010, size=4))
    assert not vm.mmio_bus.write(0x2000, 1, 0)
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        zones.register(CoalescedMmioZone(addr=0, size=1, pio=2))
