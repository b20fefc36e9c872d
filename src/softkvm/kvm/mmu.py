"""The VM's memory management: nested page tables filled on faults from the memslots, and KVM's own access to guest memory.

Answers to Linux 6.1 `arch/x86/kvm/mmu/mmu.c` (`direct_page_fault()`), `mmu/tdp_mmu.c` and `kvm_{read,write}_guest()`. Pages are mapped
2 MB at a time where slot and user memory allow; a slot with a dirty log is mapped page by page, writable once the page is logged.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum
from threading import RLock

from softkvm import silicon
from softkvm.host import mm
from softkvm.kvm.memslots import PAGE_SIZE, Memslots, Slot
from softkvm.silicon import RIGHT_R, RIGHT_W, RIGHT_X
from softkvm.uapi.kvm import KVM_DIRTY_LOG_INITIALLY_SET, UserspaceMemoryRegion

LARGE_PAGE = 2 << 20


class Fault(Enum):
    """What a nested page fault turned out to be."""

    FIXED = "mapped: run the guest again"
    MMIO = "no memory there: emulate the access"
    UNMAPPED = "a slot without user memory behind it: EFAULT"


class Mmu:
    """Guest-physical memory of one VM."""

    def __init__(self, lock: RLock, max_gpa: int) -> None:
        """No memory yet; `lock` is the VM's slots lock, `max_gpa` the first address that the guest cannot have."""
        self._lock = lock
        self.slots = Memslots(max_gpa)
        self.npt = silicon.NestedPageTable()
        self.manual_protect = 0
        """KVM_DIRTY_LOG_*: user space protects pages itself, by KVM_CLEAR_DIRTY_LOG."""
        self.ring_size = 0
        """Bytes of each vCPU's dirty ring; 0 = slots have bitmaps."""
        self.push_dirty: Callable[[int, int], None] | None = None
        """Takes (slot, page) of a write when there are rings."""

    def set_region(self, region: UserspaceMemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION; OSError as `Memslots.check()`."""
        with self._lock:
            old, new = self.slots.check(region)
            if old is new:
                return
            if new is not None:
                new.push = self.push_dirty if self.ring_size else None
                if self.manual_protect & KVM_DIRTY_LOG_INITIALLY_SET and (old is None or old.dirty is None):
                    new.mark_all_dirty()
            self.slots.install(old, new)
            if old is not None:
                self.npt.unmap(old.gpa, old.size)

    def write_protect(self, gpa: int, size: int) -> None:
        """Make the next write to each of these pages fault, so that it is logged; the lock is held."""
        self.npt.protect(gpa, size, RIGHT_R | RIGHT_X)

    def fault(self, gpa: int, write: bool) -> Fault:
        """Resolve a guest access that the nested page tables refused."""
        if self.slots.find(gpa) is None:
            return Fault.MMIO
        with self._lock:
            slot = self.slots.find(gpa)
            if slot is None or (write and slot.readonly):
                return Fault.MMIO
            if self._allowed(gpa, write):
                return Fault.FIXED  # another vCPU was faster
            page = gpa & -PAGE_SIZE
            backing = mm.mapped(slot.hva + page - slot.gpa)
            if backing is None:
                return Fault.UNMAPPED
            self._map(slot, page, write, *backing)
        return Fault.FIXED

    def _allowed(self, gpa: int, write: bool) -> bool:
        found = self.npt.lookup(gpa)
        return found is not None and bool(found[1] & (RIGHT_W if write else RIGHT_R))

    def _map(self, slot: Slot, page: int, write: bool, memory: silicon.Memory, offset: int) -> None:
        if slot.dirty is not None:
            if write:
                slot.mark_dirty(page)
            self.npt.map(page, PAGE_SIZE, memory, offset, RIGHT_R | RIGHT_X | (RIGHT_W if write else 0))
            return
        rights = RIGHT_R | RIGHT_X | (0 if slot.readonly else RIGHT_W)
        large = page & -LARGE_PAGE
        start = max(large, slot.gpa, page - offset)
        end = min(large + LARGE_PAGE, slot.end, page - offset + memory.size)
        self.npt.map(start, end - start, memory, offset - (page - start), rights)

    def read(self, gpa: int, size: int) -> bytes:
        """`kvm_read_guest()`: OSError(EFAULT) where there is no memory."""
        data = b""
        while len(data) < size:
            slot = self._slot(gpa + len(data))
            count = min(size - len(data), slot.end - gpa - len(data))
            data += mm.copy_from_user(slot.hva + gpa + len(data) - slot.gpa, count)
        return data

    def write(self, gpa: int, data: bytes) -> None:
        """`kvm_write_guest()`, logged as dirty; OSError(EFAULT) where there is no memory that may be written."""
        while data:
            slot = self._slot(gpa)
            if slot.readonly:
                raise OSError(errno.EFAULT, f"read-only slot at {gpa:#x}")
            count = min(len(data), slot.end - gpa)
            mm.copy_to_user(slot.hva + gpa - slot.gpa, data[:count])
            with self._lock:
                slot.mark_dirty(gpa, count)
            self.npt.wrote(gpa, count)
            gpa, data = gpa + count, data[count:]

    def _slot(self, gpa: int) -> Slot:
        slot = self.slots.find(gpa)
        if slot is None:
            raise OSError(errno.EFAULT, f"no slot at guest-physical {gpa:#x}")
        return slot
