"""Memory slots of a VM, and which of their pages the guest has written: a bitmap for each slot, or a ring for each vCPU (`dirty_ring.py`).

Answers to Linux 6.1 `kvm_vm_ioctl_set_memory_region()`, `kvm_get_dirty_log_protect()`, `kvm_clear_dirty_log_protect()` and
`kvm_vm_ioctl_reset_dirty_pages()` in `virt/kvm/kvm_main.c`. A page is logged at its first write after it was write-protected.
KVM_GET_DIRTY_LOG protects all that it reports, unless user space has taken that upon itself (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) and does it
piece by piece with KVM_CLEAR_DIRTY_LOG.
"""

from __future__ import annotations

import errno
from threading import RLock
from typing import TYPE_CHECKING

from softkvm.host import mm
from softkvm.kvm.introspection.ioctls import IntrospectedFile
from softkvm.kvm.ioctl import fields, ioctl, returns_bitmap, takes
from softkvm.kvm.memslots import PAGE_SIZE, USER_MEM_SLOTS, Slot
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.mmu import Mmu
    from softkvm.kvm.vcpu import Vcpu

_WORD = 64


class VmMemory(IntrospectedFile):
    """The part of a VM's file that is about its memory."""

    lock: RLock
    vcpus: list[Vcpu]
    mmu: Mmu
    smm_mmu: Mmu

    def address_space(self, slot_id: int) -> Mmu:
        """The memory that a slot id of user space is about; OSError(EINVAL) for an address space that is not there."""
        space = slot_id >> 16
        if space > 1:
            raise OSError(errno.EINVAL, "no such address space")
        return self.smm_mmu if space else self.mmu

    @ioctl(uapi.KVM_SET_USER_MEMORY_REGION, takes(uapi.UserspaceMemoryRegion))
    def set_user_memory_region(self, region: uapi.UserspaceMemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION; OSError EINVAL for a bad slot, EEXIST for an overlap."""
        self.address_space(region.slot).set_region(region)

    @ioctl(uapi.KVM_GET_DIRTY_LOG, fields(uapi.DirtyLog, "slot"), returns_bitmap)
    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: the slot's bitmap (64-bit words), which starts anew; OSError EINVAL, ENOENT, ENXIO with dirty rings."""
        with self.lock:
            mmu, found, log = self._logged(slot)
            bitmap = bytes(log)
            if not self.mmu.manual_protect:
                log[:] = bytes(len(bitmap))
                if any(bitmap):
                    mmu.write_protect(found.gpa, found.size)
        return bitmap

    @ioctl(uapi.KVM_CLEAR_DIRTY_LOG, takes(uapi.ClearDirtyLog))
    def clear_dirty_log(self, request: uapi.ClearDirtyLog) -> None:
        """KVM_CLEAR_DIRTY_LOG: log the pages in the caller's bitmap again; OSError EINVAL, ENOENT, EFAULT, ENXIO with dirty rings."""
        with self.lock:
            mmu, slot, log = self._logged(request.slot, request.first_page % _WORD != 0)
            pages, first, count = slot.size // PAGE_SIZE, request.first_page, request.num_pages
            if first > pages or count > pages - first or (count < pages - first and count % _WORD):
                raise OSError(errno.EINVAL, "no such range of pages")
            size = (count + _WORD - 1) // _WORD * 8
            wanted = int.from_bytes(mm.copy_from_user(request.dirty_bitmap, size), "little")
            place = slice(first // 8, first // 8 + size)
            cleared = int.from_bytes(log[place], "little") & wanted
            log[place] = (int.from_bytes(log[place], "little") & ~cleared).to_bytes(size, "little")
            _write_protect(mmu, slot, first, cleared)

    @ioctl(uapi.KVM_RESET_DIRTY_RINGS)
    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS: log the harvested pages again; how many they were. OSError(EINVAL) without rings.

        The number was KVM_INTROSPECTION_PREUNHOOK before Linux took it, and is so for a VM with a tool and no rings.
        """
        if not self.mmu.ring_size and self.introspection is not None:
            self.preunhook()
            return 0
        if not self.mmu.ring_size:
            raise OSError(errno.EINVAL, "there are no dirty rings")
        count = 0
        with self.lock:
            for vcpu in self.vcpus:
                for slot_id, page in vcpu.dirty_ring.pop_reset() if vcpu.dirty_ring is not None else ():
                    count += 1
                    self._reset(slot_id, page)
        return count

    def _reset(self, slot_id: int, page: int) -> None:
        if slot_id >> 16 > 1:
            return
        mmu = self.address_space(slot_id)
        slot = mmu.slots.get(slot_id & 0xFFFF)
        if slot is not None and page < slot.size // PAGE_SIZE:
            mmu.write_protect(slot.gpa + page * PAGE_SIZE, PAGE_SIZE)

    def _logged(self, slot_id: int, bad: bool = False) -> tuple[Mmu, Slot, bytearray]:
        """A slot that logs, where it is, and its bitmap; OSError in the kernel's order."""
        if self.mmu.ring_size:
            raise OSError(errno.ENXIO, "the pages are in the dirty rings")
        mmu = self.address_space(slot_id)
        if slot_id & 0xFFFF >= USER_MEM_SLOTS or bad:
            raise OSError(errno.EINVAL, "no such slot, or not at a word of the bitmap")
        slot = mmu.slots.get(slot_id & 0xFFFF)
        if slot is None or slot.dirty is None:
            raise OSError(errno.ENOENT, "the slot does not log dirty pages")
        return mmu, slot, slot.dirty


def _write_protect(mmu: Mmu, slot: Slot, first: int, pages: int) -> None:
    """Take the right to write from the pages whose bits are set, bit 0 being page `first` of the slot; runs of them at once."""
    while pages:
        start = (pages & -pages).bit_length() - 1
        run = (~(pages >> start) & (pages >> start) + 1).bit_length() - 1
        mmu.write_protect(slot.gpa + (first + start) * PAGE_SIZE, run * PAGE_SIZE)
        pages &= ~((1 << run) - 1 << start)
