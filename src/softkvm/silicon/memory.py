"""Guest RAM, and the record of which host-virtual addresses are RAM.

A process has one address space; `find()` plays the part of its page tables for the addresses (HVA) that memslots name.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from threading import Lock
from weakref import ref

from softkvm._engine import Memory

_lock = Lock()
_addresses: list[int] = []
_regions: dict[int, ref[Memory]] = {}


def allocate(size: int) -> Memory:
    """`size` bytes of RAM (a multiple of 4096) at some HVA; ValueError for a bad size, OSError(ENOMEM) if there is none."""
    memory = Memory(size)
    with _lock:
        for address in [address for address, region in _regions.items() if region() is None]:
            del _regions[address]
            _addresses.remove(address)
        insort(_addresses, memory.address)
        _regions[memory.address] = ref(memory)
    return memory


def find(hva: int, size: int) -> tuple[Memory, int] | None:
    """The live RAM that holds `size` bytes at `hva`, and the offset in it; None if the range is not (all) RAM."""
    with _lock:
        index = bisect_right(_addresses, hva) - 1
        memory = _regions[_addresses[index]]() if index >= 0 else None
    if memory is None or hva + size > memory.address + memory.size:
        return None
    return memory, hva - memory.address
