"""Guest RAM as the VMM sees it: blocks of host memory at guest-physical addresses.

RAM lies below 3 GB and, what does not fit there, from 4 GB on (`layout.py`). Every block is one KVM memslot.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, Protocol

from softkvm.uapi.kvm import UserspaceMemoryRegion
from softkvm.vmm.layout import RAM_ABOVE_4G, RAM_BELOW_4G

_PAGE = 4096
_ZEROES = bytes(_PAGE)


class HostMemory(Protocol):
    """A block of page-aligned host memory."""

    @property
    def fd(self) -> int:
        """The memory file behind it: its content, from offset 0."""
        ...

    @property
    def address(self) -> int:
        """Host-virtual address of its first byte."""
        ...

    def __buffer__(self, flags: int, /) -> memoryview:
        """The bytes, writable."""
        ...


class Block(NamedTuple):
    """RAM at a guest-physical address."""

    base: int
    host: HostMemory
    view: memoryview

    @property
    def end(self) -> int:
        """The first guest-physical address after the block."""
        return self.base + len(self.view)


def split(size: int) -> tuple[int, int]:
    """How many of `size` bytes of RAM are below and above 4 GB."""
    low = min(size, RAM_BELOW_4G.size)
    return low, size - low


class GuestMemory:
    """All RAM of a machine."""

    def __init__(self, size: int, allocate: Callable[[int], HostMemory]) -> None:
        """`size` bytes, a multiple of the page size, in blocks from `allocate`; raises what that raises."""
        self.size = size
        self.blocks: list[Block] = []
        for base, length in zip((RAM_BELOW_4G.base, RAM_ABOVE_4G.base), split(size), strict=True):
            if length:
                host = allocate(length)
                self.blocks.append(Block(base, host, memoryview(host).cast("B")))

    @property
    def low_end(self) -> int:
        """Where RAM below 4 GB ends."""
        return self.blocks[0].end

    def slots(self) -> Iterator[UserspaceMemoryRegion]:
        """The memslots to register with KVM."""
        for number, block in enumerate(self.blocks):
            yield UserspaceMemoryRegion(
                slot=number,
                flags=0,
                guest_phys_addr=block.base,
                memory_size=len(block.view),
                userspace_addr=block.host.address,
            )

    def view(self, address: int, size: int) -> memoryview:
        """The RAM at a guest-physical range, without copying; IndexError if it is not inside one block."""
        for block in self.blocks:
            if block.base <= address and address + size <= block.end:
                return block.view[address - block.base : address - block.base + size]
        raise IndexError(f"no RAM at {address:#x}..{address + size - 1:#x}")

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes at a guest-physical address; IndexError if that is not RAM."""
        self.view(address, len(data))[:] = data

    def digest(self) -> str:
        """A hash of all RAM. Pages of zeroes count as untouched ones, which are not looked at: that would make the host provide them."""
        found = hashlib.blake2b(digest_size=16)
        for block in self.blocks:
            for start, end in _used(block.host.fd, len(block.view)):
                for offset in range(start, end, _PAGE):
                    if (page := bytes(block.view[offset : offset + _PAGE])) != _ZEROES:
                        found.update((block.base + offset).to_bytes(8, "little") + page)
        return found.hexdigest()

    def close(self) -> None:
        """Give the views back, so that the host memory can go; a view that somebody else still holds keeps its block alive."""
        for block in self.blocks:
            with suppress(BufferError):
                block.view.release()
        self.blocks.clear()


def _used(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a memory file that the host has provided pages for: start and end."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # ENXIO: no more data
                raise
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, min(end, size)
