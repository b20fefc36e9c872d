"""Guest-physical memory as the tools see it, whatever carries it: a mapping of the VM's RAM, a file, or commands over a socket."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from softkvm.vmi.errors import Unreadable

PAGE_SIZE = 4096
PAGE_MASK = PAGE_SIZE - 1


class Range(NamedTuple):
    """Guest-physical addresses `base` to `end`, the latter exclusive."""

    base: int
    end: int


class Memory(Protocol):
    """Reads guest-physical memory; what is read may change meanwhile, as the guest runs."""

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes; Unreadable where any of them is not RAM."""
        ...

    def ranges(self) -> Sequence[Range]:
        """Where RAM is, ascending; may have holes inside that are found by reading."""
        ...


class BufferMemory:
    """RAM that lies in buffers of this process."""

    def __init__(self, blocks: Iterable[tuple[int, memoryview]]) -> None:
        """Each block is RAM from a guest-physical address on."""
        self._blocks = sorted(((base, view) for base, view in blocks), key=lambda block: block[0])
        self._bases = [base for base, _ in self._blocks]

    def read(self, address: int, size: int) -> bytes:
        """As `Memory.read()`."""
        number = bisect_right(self._bases, address) - 1
        if number >= 0:
            base, view = self._blocks[number]
            start = address - base
            if start + size <= len(view):
                return bytes(view[start : start + size])
            if start < len(view) and address + size > base + len(view):
                head = len(view) - start
                return bytes(view[start:]) + self.read(address + head, size - head)
        raise Unreadable(address)

    def ranges(self) -> Sequence[Range]:
        """As `Memory.ranges()`."""
        return [Range(base, base + len(view)) for base, view in self._blocks]


class PageCache:
    """Reads each page of a slow memory once, until `forget()`: for a guest that stands still, or a look at one moment."""

    LIMIT = 16384
    """Pages kept."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pages: dict[int, bytes] = {}

    def read(self, address: int, size: int) -> bytes:
        """As `Memory.read()`; long reads pass the cache by."""
        offset = address & PAGE_MASK
        if offset + size <= PAGE_SIZE:
            return self._page(address - offset)[offset : offset + size]
        if size > 4 * PAGE_SIZE:
            return self._memory.read(address, size)
        head = PAGE_SIZE - offset
        return self._page(address - offset)[offset:] + self.read(address + head, size - head)

    def ranges(self) -> Sequence[Range]:
        """As `Memory.ranges()`."""
        return self._memory.ranges()

    def forget(self) -> None:
        """Read everything anew from now on."""
        self._pages.clear()

    def _page(self, address: int) -> bytes:
        page = self._pages.get(address)
        if page is None:
            if len(self._pages) >= self.LIMIT:
                self._pages.clear()
            page = self._pages[address] = self._memory.read(address, PAGE_SIZE)
        return page
