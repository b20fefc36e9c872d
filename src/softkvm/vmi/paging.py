"""Virtual addresses of a guest in long mode, through its own page tables.

Source of truth: Intel SDM volume 3A, chapter 5 (4-level and 5-level paging, page sizes, PCID), December 2024. A walk reads at most five
entries, whatever the guest wrote into them, and physical addresses are cut to 52 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from softkvm.vmi.errors import Corrupt, Unreadable
from softkvm.vmi.memory import PAGE_MASK, PAGE_SIZE, Memory

CR4_LA57 = 1 << 12
PTI_USER_PGTABLE = 1 << 12
"""With page-table isolation a user CR3 is the kernel's with this bit: the user half lies behind the kernel half."""

_PRESENT = 1
_WRITE = 1 << 1
_USER = 1 << 2
_LARGE = 1 << 7
_NO_EXECUTE = 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000
_INDEX = 0x1FF
_CACHE_LIMIT = 65536

_ENTRY_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Mapping:
    """One page: its virtual and physical address, size in bytes, and the rights that all levels of its walk leave."""

    virtual: int
    physical: int
    size: int
    writable: bool
    user: bool
    executable: bool


class _Table(NamedTuple):
    """A table still to be read: where it is, what its first entry maps, and the rights on the way to it."""

    address: int
    level: int
    base: int
    rights: int
    executable: bool


class AddressSpace:
    """The virtual memory under one CR3."""

    def __init__(self, memory: Memory, cr3: int, *, la57: bool = False) -> None:
        """`cr3` may carry a PCID and the no-flush bit. The walk's results are kept until `forget()`."""
        self.memory = memory
        self.root = cr3 & _ADDRESS
        self.levels = 5 if la57 else 4
        self._known: dict[int, Mapping] = {}

    def forget(self) -> None:
        """Walk anew from now on: the guest may have changed its tables."""
        self._known.clear()

    def walk(self, address: int) -> Mapping | None:
        """The page that holds a virtual address; None if there is none."""
        page = address & ~PAGE_MASK
        if (known := self._known.get(page)) is not None:
            return known
        if not self.is_canonical(address):
            return None
        table, rights = self.root, _WRITE | _USER
        executable = True
        for level in range(self.levels, 0, -1):
            shift = 12 + 9 * (level - 1)
            entry = self._entry(table, address >> shift & _INDEX)
            if not entry & _PRESENT:
                return None
            rights &= entry
            executable = executable and not entry & _NO_EXECUTE
            if level == 1 or (level <= 3 and entry & _LARGE):
                return self._found(page, self._leaf(address, entry, shift, rights, executable))
            table = entry & _ADDRESS
        return None

    def _found(self, page: int, mapping: Mapping) -> Mapping:
        if len(self._known) >= _CACHE_LIMIT:
            self._known.clear()
        self._known[page] = mapping
        return mapping

    def _leaf(self, address: int, entry: int, shift: int, rights: int, executable: bool) -> Mapping:
        size = 1 << shift
        return Mapping(address & -size, entry & _ADDRESS & -size, size, bool(rights & _WRITE), bool(rights & _USER), executable)

    def _entry(self, table: int, index: int) -> int:
        try:
            return int.from_bytes(self.memory.read(table + 8 * index, 8), "little")
        except Unreadable:
            return 0

    def is_canonical(self, address: int) -> bool:
        """Whether all bits above the translated ones equal the highest of them."""
        upper = address >> (11 + 9 * self.levels)
        return upper in (0, (1 << (53 - 9 * self.levels)) - 1)

    def translate(self, address: int) -> int:
        """The guest-physical address of a virtual one; Unreadable if it is not mapped."""
        mapping = self.walk(address)
        if mapping is None:
            raise Unreadable(address, "guest-virtual")
        return mapping.physical + (address - mapping.virtual)

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes at a virtual address; Unreadable if a page is not mapped or not RAM."""
        room = PAGE_SIZE - (address & PAGE_MASK)
        if size <= room:
            return self.memory.read(self.translate(address), size)
        pieces = []
        while size > 0:
            mapping = self.walk(address)
            if mapping is None:
                raise Unreadable(address, "guest-virtual")
            offset = address - mapping.virtual
            length = min(size, mapping.size - offset)
            pieces.append(self.memory.read(mapping.physical + offset, length))
            address += length
            size -= length
        return b"".join(pieces)

    def read_available(self, address: int, size: int) -> bytes:
        """As much of `read()` as there is before the first page that is missing."""
        pieces = []
        while size > 0:
            length = min(size, PAGE_SIZE - (address & PAGE_MASK))
            try:
                pieces.append(self.read(address, length))
            except Unreadable:
                break
            address += length
            size -= length
        return b"".join(pieces)

    def mappings(self, start: int, end: int) -> Iterator[Mapping]:
        """The pages from `start` to `end`, in no order; tables are read whole and those that are not there are skipped whole.

        Corrupt if there are more tables and pages than 4 GB of small pages need: somebody tied a knot.
        """
        budget = _ENTRY_LIMIT
        pending = [_Table(self.root, self.levels, 0, _WRITE | _USER, True)]
        while pending:
            for item in self._entries(pending.pop(), start, end):
                if (budget := budget - 1) < 0:
                    raise Corrupt(f"the page tables at {self.root:#x} go round in circles")
                if isinstance(item, _Table):
                    pending.append(item)
                else:
                    yield item

    def _entries(self, table: _Table, start: int, end: int) -> Iterator[Mapping | _Table]:
        shift = 12 + 9 * (table.level - 1)
        try:
            entries = memoryview(self.memory.read(table.address, PAGE_SIZE)).cast("Q")
        except Unreadable:
            return
        for index, entry in enumerate(entries):
            address = table.base + (index << shift)
            if table.level == self.levels and index >= 256:
                address |= -1 << (12 + 9 * self.levels) & (1 << 64) - 1
            if not entry & _PRESENT or address >= end or address + (1 << shift) <= start:
                continue
            rights, runs = table.rights & entry, table.executable and not entry & _NO_EXECUTE
            if table.level == 1 or (table.level <= 3 and entry & _LARGE):
                yield self._leaf(address, entry, shift, rights, runs)
            else:
                yield _Table(entry & _ADDRESS, table.level - 1, address, rights, runs)
