"""Memory slots: guest-physical ranges, the user memory behind them, and the log of pages that were written.

Answers to Linux 6.1 `__kvm_set_memory_region()`, `kvm_get_dirty_log()` in `virt/kvm/kvm_main.c` and to `Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator

from softkvm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, UserspaceMemoryRegion

PAGE_SIZE = 4096
PAGE_SHIFT = 12
USER_MEM_SLOTS = 32764
MAX_NR_PAGES = (1 << 31) - 1
USER_ADDRESS_LIMIT = (1 << 47) - PAGE_SIZE


class Slot:
    """One slot: immutable but for its flags and dirty bitmap."""

    __slots__ = ("dirty", "flags", "gpa", "hva", "id", "push", "size")

    def __init__(self, region: UserspaceMemoryRegion) -> None:
        self.id = region.slot
        self.flags = region.flags
        self.gpa = region.guest_phys_addr
        self.size = region.memory_size
        self.hva = region.userspace_addr
        self.dirty: bytearray | None = bytearray(self.bitmap_size) if region.flags & KVM_MEM_LOG_DIRTY_PAGES else None
        self.push: Callable[[int, int], None] | None = None
        """With dirty rings: where (slot, page) of a logged write goes in place of the bitmap."""

    @property
    def bitmap_size(self) -> int:
        """Bytes of the dirty bitmap: whole 64-bit words."""
        return (self.size // PAGE_SIZE + 63) // 64 * 8

    @property
    def end(self) -> int:
        """The first address behind the slot."""
        return self.gpa + self.size

    @property
    def readonly(self) -> bool:
        """Whether guest writes are MMIO."""
        return bool(self.flags & KVM_MEM_READONLY)

    def mark_dirty(self, gpa: int, size: int = 1) -> None:
        """Log the pages of a write."""
        if self.dirty is None:
            return
        for page in range((gpa - self.gpa) >> PAGE_SHIFT, ((gpa + size - 1 - self.gpa) >> PAGE_SHIFT) + 1):
            if self.push is not None:
                self.push(self.id, page)
            else:
                self.dirty[page >> 3] |= 1 << (page & 7)

    def mark_all_dirty(self) -> None:
        """KVM_DIRTY_LOG_INITIALLY_SET."""
        if self.dirty is not None:
            pages = self.size // PAGE_SIZE
            self.dirty[: pages // 8] = b"\xff" * (pages // 8)
            if pages % 8:
                self.dirty[pages // 8] = (1 << pages % 8) - 1


class Memslots:
    """The slots of a VM, by id and by address; the VM's lock is held by whoever changes them.

    Readers need no lock: `_sorted`, start addresses and slots, is one pair that is replaced and never changed.
    """

    def __init__(self, max_gpa: int, address_space: int = 0) -> None:
        """No slots; addresses must be below `max_gpa` (MAXPHYADDR). Slot ids have the number of the address space in bits 31..16."""
        self._max_gpa = max_gpa
        self._address_space = address_space
        self._by_id: dict[int, Slot] = {}
        self._sorted: tuple[list[int], list[Slot]] = ([], [])

    def __iter__(self) -> Iterator[Slot]:
        """The slots in order of their addresses."""
        return iter(self._sorted[1])

    def find(self, gpa: int) -> Slot | None:
        """The slot that holds `gpa`."""
        starts, slots = self._sorted
        index = bisect_right(starts, gpa) - 1
        if index >= 0 and gpa < slots[index].end:
            return slots[index]
        return None

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """First address and end of each slot, ascending."""
        starts, slots = self._sorted
        return [(start, slot.end) for start, slot in zip(starts, slots, strict=True)]

    def get(self, slot_id: int) -> Slot | None:
        """The slot with that id."""
        return self._by_id.get(slot_id)

    def check(self, region: UserspaceMemoryRegion) -> tuple[Slot | None, Slot | None]:
        """What KVM_SET_USER_MEMORY_REGION would replace and install: (old, new), None where there is none; one slot twice = no change.

        OSError(EINVAL or EEXIST) in the kernel's order of checks; nothing is changed.
        """
        self._check_fields(region)
        old = self._by_id.get(region.slot & 0xFFFF)
        if region.memory_size == 0:
            if old is None:
                raise OSError(errno.EINVAL, "no such slot to delete")
            return old, None
        if old is not None:
            if region.memory_size != old.size or region.userspace_addr != old.hva or (region.flags ^ old.flags) & KVM_MEM_READONLY:
                raise OSError(errno.EINVAL, "a slot's size, memory and READONLY flag cannot change")
            if region.guest_phys_addr == old.gpa and region.flags == old.flags:
                return old, old
        if old is None or region.guest_phys_addr != old.gpa:
            self._check_overlap(region)
        new = Slot(region)
        if old is not None and old.dirty is not None and new.dirty is not None:
            new.dirty = old.dirty
        return old, new

    def _check_fields(self, region: UserspaceMemoryRegion) -> None:
        gpa, size, hva = region.guest_phys_addr, region.memory_size, region.userspace_addr
        bad = (
            region.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY)
            or (gpa | size | hva) % PAGE_SIZE
            or hva + size > USER_ADDRESS_LIMIT
            or region.slot >> 16 != self._address_space
            or region.slot & 0xFFFF >= USER_MEM_SLOTS
            or gpa + size > self._max_gpa
            or size // PAGE_SIZE > MAX_NR_PAGES
        )
        if bad:
            raise OSError(errno.EINVAL, "bad memory slot")

    def _check_overlap(self, region: UserspaceMemoryRegion) -> None:
        end = region.guest_phys_addr + region.memory_size
        for slot in self._by_id.values():
            if slot.id != region.slot and slot.gpa < end and region.guest_phys_addr < slot.end:
                raise OSError(errno.EEXIST, f"overlaps slot {slot.id}")

    def install(self, old: Slot | None, new: Slot | None) -> None:
        """Make the change that `check()` allowed."""
        if old is not None:
            del self._by_id[old.id & 0xFFFF]
        if new is not None:
            self._by_id[new.id & 0xFFFF] = new
        slots = sorted(self._by_id.values(), key=lambda slot: slot.gpa)
        self._sorted = ([slot.gpa for slot in slots], slots)
