"""Objects of a slab cache, found through the kernel's array of pages rather than through anything that leads to the objects.

Source of truth: Linux 6.1 `mm/slab.h`, `mm/slub.c`, `include/linux/mm_types.h`. The page array at `vmemmap_base` says of each page of
memory which cache it serves, in the order of the pages' numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

from softkvm.vmi.errors import Corrupt, Unreadable
from softkvm.vmi.linux.kernel import Kernel
from softkvm.vmi.memory import PAGE_SIZE

_VMEMMAP = 0xFFFF_EA00_0000_0000
_PAGES_AT_ONCE = 1 << 15
_LARGEST_SLAB = 1 << 10


def objects(kernel: Kernel, cache_pointer: int) -> Iterator[int]:
    """Addresses of all places for objects, used or free, in the cache whose `struct kmem_cache *` is at `cache_pointer`."""
    address = kernel.number(cache_pointer)
    cache = kernel.struct("kmem_cache", address)
    size, left = cache.number("size"), cache.number("red_left_pad") if cache.has("red_left_pad") else 0
    count = cache.number("oo.x") & 0xFFFF  # objects of a slab; the order of its pages is above them
    if not 0 < size <= PAGE_SIZE * _LARGEST_SLAB or not 0 < count <= PAGE_SIZE:
        raise Corrupt(f"the slab cache at {address:#x} has objects of {size} bytes")
    for frame in _slabs(kernel, address):
        base = kernel.direct_map + frame * PAGE_SIZE
        yield from (base + left + size * number for number in range(count))


def _slabs(kernel: Kernel, cache: int) -> Iterator[int]:
    """Numbers of the first pages of the slabs of a cache."""
    vmemmap = kernel.number(kernel.symbols["vmemmap_base"]) if "vmemmap_base" in kernel.symbols else _VMEMMAP
    page = kernel.types.find("page")
    offset = kernel.struct("slab", 0).at("slab_cache")
    for area in kernel.memory.ranges():
        first, end = area.base // PAGE_SIZE, area.end // PAGE_SIZE
        for start in range(first, end, _PAGES_AT_ONCE):
            pages = min(_PAGES_AT_ONCE, end - start)
            try:
                data = kernel.read(vmemmap + start * page.size, pages * page.size)
            except Unreadable:
                continue  # memory that the kernel does not manage has no pages here
            caches = memoryview(data)[offset : offset + (len(data) - offset) // 8 * 8].cast("Q")[:: page.size // 8]
            yield from (start + number for number, owner in enumerate(caches) if owner == cache)
