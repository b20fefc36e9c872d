"""Coalesced MMIO and PIO: guest writes to some registers are only noted in a ring, which user space empties at the next exit.

Answers to Linux 6.1 `virt/kvm/coalesced_mmio.c` and `Documentation/virt/kvm/api.rst` (KVM_REGISTER_COALESCED_MMIO). The ring is shared
with user space, so its indices are checked at every use.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from softkvm.uapi.kvm import CoalescedMmioZone

if TYPE_CHECKING:
    from softkvm.kvm.iobus import IoBus
    from softkvm.kvm.types import Vm

RING_OFFSET, RING_SIZE = 8192, 4096
"""Where user space maps the ring: page 2 of the first vCPU's area."""
_INDICES = struct.Struct("<II")  # first, last: user space reads at `first`, KVM writes at `last`
_ENTRY = struct.Struct("<QIIQ")  # phys_addr, len, pio, data
MAX_ENTRIES = (RING_SIZE - _INDICES.size) // _ENTRY.size


class Zone:
    """A registered range; a device on the MMIO or PIO bus that takes writes and leaves reads to user space."""

    def __init__(self, owner: Coalesced, zone: CoalescedMmioZone) -> None:
        self._owner = owner
        self.start = zone.addr
        self.end = zone.addr + zone.size
        self.pio = bool(zone.pio)

    def read(self, address: int, size: int) -> int | None:
        """Not taken."""
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Note the write, if the ring has room."""
        return address + size <= self.end and self._owner.append(address, size, value, self.pio)


class Coalesced:
    """The ring and the zones of one VM."""

    def __init__(self, vm: Vm) -> None:
        """No zones."""
        self._vm = vm
        self._zones: list[Zone] = []

    def register(self, zone: CoalescedMmioZone) -> None:
        """KVM_REGISTER_COALESCED_MMIO; OSError: EINVAL for a zone that is neither MMIO nor PIO, ENOSPC when the bus is full."""
        self._check(zone)
        with self._vm.lock:
            device = Zone(self, zone)
            self._bus(device.pio).register(zone.addr, zone.size, device)
            self._zones.append(device)

    def unregister(self, zone: CoalescedMmioZone) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: remove every zone that contains the given range; OSError(EINVAL) as above."""
        self._check(zone)
        with self._vm.lock:
            for device in list(self._zones):
                if device.pio == bool(zone.pio) and device.start <= zone.addr and zone.addr + zone.size <= device.end:
                    self._bus(device.pio).unregister(device)
                    self._zones.remove(device)

    def append(self, address: int, size: int, value: int, pio: bool) -> bool:
        """Put a write into the ring; False if there is no room in it."""
        with self._vm.lock:
            ring = self._vm.vcpus[0].mmap_area[RING_OFFSET:]
            first, last = _INDICES.unpack_from(ring)
            if last >= MAX_ENTRIES or (first - last - 1) % MAX_ENTRIES == 0:
                return False
            _ENTRY.pack_into(ring, _INDICES.size + last * _ENTRY.size, address, size, pio, value)
            _INDICES.pack_into(ring, 0, first, (last + 1) % MAX_ENTRIES)
        return True

    def _bus(self, pio: bool) -> IoBus:
        return self._vm.pio_bus if pio else self._vm.mmio_bus

    @staticmethod
    def _check(zone: CoalescedMmioZone) -> None:
        if zone.pio not in (0, 1):
            raise OSError(errno.EINVAL, "a coalesced zone is MMIO or PIO")
