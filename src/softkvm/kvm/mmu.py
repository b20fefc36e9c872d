"""The VM's memory management: nested page tables filled on faults from the memslots, and KVM's own access to guest memory.

Answers to Linux 6.1 `arch/x86/kvm/mmu/mmu.c` (`direct_page_fault()`), `mmu/tdp_mmu.c` and `kvm_{read,write}_guest()`. Pages are mapped
2 MB at a time where slot and user memory allow; a slot with a dirty log is mapped page by page, writable once the page is logged.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from enum import Enum
from threading import RLock

from softkvm import silicon
from softkvm.host import mm
from softkvm.kvm.memslots import PAGE_SHIFT, PAGE_SIZE, Memslots, Slot
from softkvm.kvm.page_track import ALL, PageTrack, runs
from softkvm.silicon import RIGHT_R, RIGHT_W, RIGHT_X
from softkvm.uapi.kvm import KVM_DIRTY_LOG_INITIALLY_SET, UserspaceMemoryRegion

LARGE_PAGE = 2 << 20
DEVICE_LIMIT = 64
"""Pages that the nested page table knows as a device's; the others are found by their slot each time."""


class Fault(Enum):
    """What a nested page fault turned out to be."""

    FIXED = "mapped: run the guest again"
    MMIO = "no memory there: emulate the access"
    UNMAPPED = "a slot without user memory behind it: EFAULT"


class Mmu:
    """Guest-physical memory of one VM."""

    def __init__(self, lock: RLock, max_gpa: int, address_space: int = 0) -> None:
        """No memory yet; `lock` is the VM's slots lock, `max_gpa` the first address that no guest has. Address space 1 is SMM's."""
        self._lock = lock
        self.slots = Memslots(max_gpa, address_space)
        self.npt = silicon.NestedPageTable()
        self.track = PageTrack()
        self._devices: set[int] = set()
        """Pages without a slot that the nested page table says so of."""
        self.manual_protect = 0
        """KVM_DIRTY_LOG_*: user space protects pages itself, by KVM_CLEAR_DIRTY_LOG."""
        self.ring_size = 0
        """Bytes of each vCPU's dirty ring; 0 = slots have bitmaps."""
        self.push_dirty: Callable[[int, int], None] | None = None
        """Takes (slot, page) of a write when there are rings."""
        self.remote_tlb_flushes: int = 0
        """How often all cores had to drop what they knew of some pages."""

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
            if new is not None:
                self._forget_devices(new)
            if old is not None:
                self._unmap(old.gpa, old.size)

    def _unmap(self, gpa: int, size: int) -> None:
        self.npt.unmap(gpa, size)
        self.remote_tlb_flushes += 1

    def _protect(self, gpa: int, size: int, rights: int) -> None:
        self.npt.protect(gpa, size, rights)
        self.remote_tlb_flushes += 1

    def write_protect(self, gpa: int, size: int) -> None:
        """Make the next write to each of these pages fault, so that it is logged; the lock is held."""
        for start, length, tracked in self.track.pieces(gpa, gpa + size):
            self._protect(start, length, (RIGHT_R | RIGHT_X) & tracked)

    def fault(self, gpa: int, write: bool) -> Fault:
        """Resolve a guest access that the nested page tables refused."""
        if self.slots.find(gpa) is None:
            if gpa & -PAGE_SIZE not in self._devices:
                self._note_device(gpa & -PAGE_SIZE)
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

    def _note_device(self, page: int) -> None:
        """`mark_mmio_spte()`: the next access there comes as one to a device, and not as a violation. A guest may touch any address."""
        with self._lock:
            if self.slots.find(page) is None and len(self._devices) < DEVICE_LIMIT and self.track.rights(page >> PAGE_SHIFT) == ALL:
                self._devices.add(page)
                self.npt.map_device(page, PAGE_SIZE)

    def _forget_devices(self, slot: Slot) -> None:
        """Memory is there now (`kvm_mmu_invalidate_mmio_sptes()`)."""
        for page in [page for page in self._devices if slot.gpa <= page < slot.end]:
            self._devices.remove(page)
            self.npt.unmap(page, PAGE_SIZE)

    def _allowed(self, gpa: int, write: bool) -> bool:
        """Whether the page is mapped and only tracking, if anything, is in the way of the access."""
        found = self.npt.lookup(gpa)
        if found is None:
            return False
        tracked_away = ALL & ~self.track.rights(gpa >> PAGE_SHIFT)
        return bool((found[1] | tracked_away) & (RIGHT_W if write else RIGHT_R))

    def _map(self, slot: Slot, page: int, write: bool, memory: silicon.Memory, offset: int) -> None:
        if slot.dirty is not None:
            if write:
                slot.mark_dirty(page)
            rights = RIGHT_R | RIGHT_X | (RIGHT_W if write else 0)
            self.npt.map(page, PAGE_SIZE, memory, offset, self.track.limit(rights, self.track.rights(page >> PAGE_SHIFT)))
            return
        rights = RIGHT_R | RIGHT_X | (0 if slot.readonly else RIGHT_W)
        large = page & -LARGE_PAGE
        start = max(large, slot.gpa, page - offset)
        end = min(large + LARGE_PAGE, slot.end, page - offset + memory.size)
        for gpa, size, tracked in self.track.pieces(start, end):
            self.npt.map(gpa, size, memory, offset - (page - gpa), self.track.limit(rights, tracked))

    def restrict(self, pages: Mapping[int, int]) -> None:
        """Give the guest these rights to pages, by gfn, until other ones are given; in force on every core when the call returns.

        A page may be without memory: the rights count for what will be there.
        """
        with self._lock:
            changed = [(gfn, rights) for gfn, rights in pages.items() if self.track.rights(gfn) != rights]
            for gfn, rights in changed:
                self.track.set(gfn, rights)
            for gpa, size, rights in runs(changed):
                if rights == ALL:
                    self._unmap(gpa, size)  # the next access maps it with what the slot allows
                else:
                    self._limit(gpa, size, rights)

    def pass_same_stores(self, on: bool) -> None:
        """See `PageTrack.passes_same_stores`; in force on every core when the call returns."""
        with self._lock:
            if self.track.passes_same_stores != on:
                self.track.passes_same_stores = on
                for gpa, size, rights in runs((gfn, self.track.rights(gfn)) for gfn in self.track.pages):
                    self._limit(gpa, size, rights)

    def _limit(self, gpa: int, size: int, rights: int) -> None:
        slot = self.slots.find(gpa)
        if slot is None or slot.end < gpa + size or slot.readonly or slot.dirty is not None:
            self._unmap(gpa, size)
        else:
            self._protect(gpa, size, self.track.limit(ALL, rights))

    def log_write(self, gpa: int, size: int = 1) -> None:
        """Note a write of the guest that the nested page tables did not see as one."""
        with self._lock:
            slot = self.slots.find(gpa)
            if slot is not None:
                slot.mark_dirty(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        """`kvm_read_guest()`: OSError(EFAULT) where there is no memory."""
        data = b""
        while len(data) < size:
            slot = self._slot(gpa + len(data))
            count = min(size - len(data), slot.end - gpa - len(data))
            data += mm.copy_from_user(slot.hva + gpa + len(data) - slot.gpa, count)
        return data

    def page(self, gfn: int) -> memoryview:
        """A page of guest memory in place; OSError(EFAULT) where there is none."""
        gpa = gfn << PAGE_SHIFT
        slot = self._slot(gpa)
        return mm.view(slot.hva + gpa - slot.gpa, PAGE_SIZE)

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
