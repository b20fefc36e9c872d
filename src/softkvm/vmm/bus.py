"""Address decoding: which device answers a port or a memory address.

One `Bus` is the I/O port space and another one the memory space outside RAM. As on a PC, an address that nobody claims reads as all ones
and swallows writes. An access that is wider than a device, or not aligned to its own size, becomes several smaller ones.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple, Protocol

from softkvm.vmm.layout import Range


class Device(Protocol):
    """Registers behind a range of addresses."""

    def read(self, offset: int, size: int) -> int:
        """The `size` bytes at `offset` from the start of the range, as a little-endian number."""
        ...

    def write(self, offset: int, size: int, value: int) -> None:
        """Store `size` bytes at `offset`; `value` has no more than `8 * size` bits."""
        ...


class _Claim(NamedTuple):
    base: int
    end: int
    width: int
    device: Device


class Bus:
    """An address space of devices. Its owner serialises the calls."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._claims: list[_Claim] = []

    def claim(self, place: Range, device: Device, width: int = 1) -> None:
        """Let `device` answer `place`; accesses wider than `width` bytes are split. ValueError if the range is taken."""
        if self._overlaps(place.base, place.end):
            raise ValueError(f"addresses {place.base:#x}..{place.last:#x} are claimed already")
        index = bisect_right(self._bases, place.base)
        self._bases.insert(index, place.base)
        self._claims.insert(index, _Claim(place.base, place.end, width, device))

    def release(self, base: int) -> None:
        """Take back the claim that starts at `base`; KeyError if there is none."""
        index = bisect_right(self._bases, base) - 1
        if index < 0 or self._bases[index] != base:
            raise KeyError(f"no claim at {base:#x}")
        del self._bases[index], self._claims[index]

    def free(self, place: Range) -> bool:
        """True if nothing in the range is claimed."""
        return not self._overlaps(place.base, place.end)

    def read(self, address: int, size: int) -> int:
        """What the guest reads: `size` bytes at `address`."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            base, end, width, device = self._claims[index]
            if address + size <= end and size <= width and address % size == 0:
                return device.read(address - base, size)
        if not self._overlaps(address, address + size):
            return (1 << 8 * size) - 1
        low = size >> 1  # of more than one byte, because a byte that is claimed has been read
        return self.read(address, low) | self.read(address + low, size - low) << (8 * low)

    def write(self, address: int, size: int, value: int) -> None:
        """Carry a guest's write of `size` bytes to whoever is at `address`."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            base, end, width, device = self._claims[index]
            if address + size <= end and size <= width and address % size == 0:
                device.write(address - base, size, value)
                return
        if self._overlaps(address, address + size):
            low = size >> 1
            self.write(address, low, value & ((1 << (8 * low)) - 1))
            self.write(address + low, size - low, value >> (8 * low))

    def _overlaps(self, base: int, end: int) -> bool:
        index = bisect_right(self._bases, base)
        before = index > 0 and self._claims[index - 1].end > base
        after = index < len(self._bases) and self._bases[index] < end
        return before or after
