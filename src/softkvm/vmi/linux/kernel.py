"""A running Linux kernel: its symbols, its types and its virtual memory in one object.

Source of truth: Linux 6.1 `Documentation/x86/x86_64/mm.rst` for the areas of virtual memory, `include/linux/{list,xarray,percpu-defs}.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from softkvm.vmi.errors import Corrupt, KernelNotFound, UnknownName, Unreadable
from softkvm.vmi.linux import objects, symbols
from softkvm.vmi.linux.btf import Btf, Kind
from softkvm.vmi.linux.objects import Struct
from softkvm.vmi.memory import PAGE_SIZE, Memory
from softkvm.vmi.paging import AddressSpace

_DIRECT_MAP = 0xFFFF_8880_0000_0000
_DIRECT_MAP_LA57 = 0xFF11_0000_0000_0000
_KERNEL_END = 1 << 64
_MOST_CPUS = 8192
_MOST_ENTRIES = 1 << 22
_LONGEST_BANNER = 512
_LONGEST_VMCOREINFO = 1 << 16


class Kernel:
    """The kernel that runs in some memory. What it says is read anew each time."""

    def __init__(self, memory: Memory, found: symbols.Found, *, la57: bool = False) -> None:
        """See `find()`, which most callers want."""
        self.memory = memory
        self.image = found.image
        self.symbols = found.symbols
        self.build_id = found.build_id
        self.types = Btf(found.image.btf)
        self.la57 = la57
        self.space = AddressSpace(memory, self.image.physical(self.symbols["init_top_pgt"]), la57=la57)
        self._image_end = self.symbols["_end"]
        self.direct_map = _KERNEL_END
        self._ram_end = max((area.end for area in memory.ranges()), default=0)
        self.banner = self._read_banner()
        self.direct_map = self._find_direct_map()
        """Where all physical memory is mapped one to one."""

    def _read_banner(self) -> str:
        banner = objects.read_text(self, self.symbols["linux_banner"], _LONGEST_BANNER)
        if not banner.startswith("Linux version "):
            raise KernelNotFound("what looked like a Linux kernel has no banner")
        return banner

    def _find_direct_map(self) -> int:
        if "page_offset_base" in self.symbols:
            return self.number(self.symbols["page_offset_base"])
        return _DIRECT_MAP_LA57 if self.la57 else _DIRECT_MAP

    @property
    def release(self) -> str:
        """What `uname -r` prints."""
        return self.banner.split()[2]

    @property
    def is_booted(self) -> bool:
        """Whether it has started its first process (`system_state`)."""
        states = self.types.enumerators(self.types.find("system_states", frozenset({Kind.ENUM})).number)
        return self.number(self.symbols["system_state"], 4) >= states["SYSTEM_RUNNING"]

    def forget(self) -> None:
        """The guest has run: walk its page tables anew."""
        self.space.forget()

    # Memory

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel-virtual address; raises Unreadable."""
        if self.symbols.base <= address and address + size <= self._image_end:
            return self.memory.read(self.image.physical(address), size)
        if 0 <= (physical := address - self.direct_map) < self._ram_end:
            return self.memory.read(physical, size)
        return self.space.read(address, size)

    def number(self, address: int, size: int = 8) -> int:
        """An unsigned number at a kernel-virtual address."""
        return int.from_bytes(self.read(address, size), "little")

    def physical(self, address: int) -> int:
        """The guest-physical address of a kernel-virtual one; raises Unreadable."""
        if self.symbols.base <= address < self._image_end:
            return self.image.physical(address)
        return self.space.translate(address)

    def user_space(self, pgd: int) -> AddressSpace:
        """The address space of a process, by the kernel-virtual address of its top page table (`mm.pgd`)."""
        return AddressSpace(self.memory, self.physical(pgd), la57=self.la57)

    # Structures

    def struct(self, name: str, address: int) -> Struct:
        """The structure `name` at an address."""
        return Struct(self, self.types.find(name).number, address)

    def walk(self, head: int, name: str, path: str) -> Iterator[Struct]:
        """See `objects.walk_list()`."""
        return objects.walk_list(self, head, name, path)

    def text(self, address: int, limit: int = 4096) -> str:
        """See `objects.read_text()`."""
        return objects.read_text(self, address, limit)

    @cached_property
    def cpus(self) -> list[int]:
        """The numbers of all possible CPUs."""
        count = min(self.number(self.symbols["nr_cpu_ids"], 4), _MOST_CPUS)
        mask = int.from_bytes(self.read(self.symbols["__cpu_possible_mask"], (count + 63) // 64 * 8), "little")
        return [cpu for cpu in range(count) if mask >> cpu & 1]

    def percpu(self, name: str, cpu: int) -> int:
        """The address of a CPU's copy of a per-CPU variable."""
        return self.symbols[name] + self.number(self.symbols["__per_cpu_offset"] + 8 * cpu) & (1 << 64) - 1

    def vmcoreinfo(self) -> bytes:
        """What the kernel tells crash tools of itself (Documentation/admin-guide/kdump/vmcoreinfo.rst); empty if it does not."""
        if "vmcoreinfo_data" not in self.symbols or "vmcoreinfo_size" not in self.symbols:
            return b""
        data, size = self.number(self.symbols["vmcoreinfo_data"]), self.number(self.symbols["vmcoreinfo_size"])
        return self.read(data, size) if data and 0 < size <= _LONGEST_VMCOREINFO else b""

    def xarray(self, address: int) -> Iterator[tuple[int, int]]:
        """Index and pointer of each entry of the `struct xarray` (or IDR's radix tree) at an address."""
        head = self.struct("xarray", address).number("xa_head")
        node_type = self.types.find("xa_node")
        slots = objects.field(self.types, node_type.number, "slots")
        count = slots.size // 8
        pending, budget = [(head, 0)], _MOST_ENTRIES
        while pending and budget:
            entry, index = pending.pop()
            budget -= 1
            if entry & 3 != 2 or entry < PAGE_SIZE:
                if entry and entry & 3 == 0:
                    yield index, entry
                continue
            node = Struct(self, node_type.number, entry & ~3)
            shift = node.number("shift")
            if shift > 60:
                continue
            for slot, value in enumerate(struct.unpack(f"<{count}Q", node.bytes("slots"))):
                child = value & 3 == 2 and value >= PAGE_SIZE
                if value and (child == bool(shift)):
                    pending.append((value, index + (slot << shift)))


def find(memory: Memory, cr3: int | None = None, *, la57: bool = False, cache: Path | None = None) -> Kernel:
    """The kernel in `memory`; KernelNotFound if there is none, or none that is far enough to be looked at.

    `cr3` of any vCPU makes it quick, `la57` is its CR4.LA57; decoded symbols are kept in the directory `cache`.
    """
    found = symbols.find(memory, cr3, la57=la57, cache=cache)
    try:
        return Kernel(memory, found, la57=la57)
    except (UnknownName, Unreadable, Corrupt) as error:
        raise KernelNotFound(f"what looked like a Linux kernel is none: {error}") from error
