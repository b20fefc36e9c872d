"""The dirty ring of a vCPU: pages that it has written, for user space to harvest while the guest runs.

Answers to Linux 6.1 `virt/kvm/dirty_ring.c` and `Documentation/virt/kvm/api.rst` (KVM_CAP_DIRTY_LOG_RING). The entries are memory that user
space shares and may fill with anything: what it hands back is looked up like any other address.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from softkvm.kvm.request import REQ_DIRTY_RING_FULL
from softkvm.uapi.kvm import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, DirtyGfn

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_core import VcpuCore

ENTRY_SIZE = ctypes.sizeof(DirtyGfn)
MAX_ENTRIES = 65536
MAX_SIZE = MAX_ENTRIES * ENTRY_SIZE
RESERVED_ENTRIES = 64
"""Entries left when the vCPU must stop: what one KVM_RUN may log between two checks."""


def check_size(size: int) -> None:
    """OSError EINVAL for a ring size in bytes that cannot be, E2BIG for one that is too large."""
    if size <= 0 or size & (size - 1) or size < max(RESERVED_ENTRIES * ENTRY_SIZE, mmap.PAGESIZE):
        raise OSError(errno.EINVAL, "a ring has a power of two of bytes, at least a page")
    if size > MAX_SIZE:
        raise OSError(errno.E2BIG, "the ring is too large")


class DirtyRing:
    """One ring; the vCPU's thread pushes, whoever calls KVM_RESET_DIRTY_RINGS pops, with the slots lock held."""

    def __init__(self, vcpu: VcpuCore, size: int) -> None:
        """An empty ring of `size` bytes, which `check_size()` has passed."""
        self._vcpu = vcpu
        self._count = size // ENTRY_SIZE
        self._mapping = mmap.mmap(-1, size)
        self.area = memoryview(self._mapping)
        """What mmap(2) of the vCPU maps from page 64 on."""
        self._entries = (DirtyGfn * self._count).from_buffer(self._mapping)
        self._pushed = self._popped = 0

    @property
    def soft_full(self) -> bool:
        """Whether the vCPU must not run before user space has harvested and reset entries."""
        return self._pushed - self._popped >= self._count - RESERVED_ENTRIES

    def push(self, slot: int, page: int) -> None:
        """A page of a slot was written; what does not fit any more is counted, not kept."""
        if self._pushed - self._popped >= self._count:
            self._vcpu.stats["dirty_ring_overflows"] += 1
            return
        entry = self._entries[self._pushed % self._count]
        entry.slot, entry.offset = slot, page
        entry.flags = KVM_DIRTY_GFN_F_DIRTY
        self._pushed += 1
        if self.soft_full:
            self._vcpu.make_request(REQ_DIRTY_RING_FULL)

    def pop_reset(self) -> Iterator[tuple[int, int]]:
        """(slot, page) of the entries that user space is done with, which become free; in order, up to the first that it still has."""
        while self._popped < self._pushed:
            entry = self._entries[self._popped % self._count]
            if not entry.flags & KVM_DIRTY_GFN_F_RESET:
                return
            slot, page = entry.slot, entry.offset
            entry.flags = 0
            self._popped += 1
            yield slot, page
