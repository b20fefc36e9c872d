"""Written pages of a guest: KVM_GET_DIRTY_LOG, manual protection with KVM_CLEAR_DIRTY_LOG, and dirty rings (api.rst 4.8, 4.117, 8.29)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.kvm import dirty_ring
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import DATA, END, RAM_SIZE, STACK, Guest

PAGES = RAM_SIZE // 4096
RING_OFFSET = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * 4096
WRITER = b"\xc6\x07\x01\x48\x81\xc7\x00\x10\x00\x00\xff\xc9\x75\xf2" + END
"""Writes a byte to RCX pages from RDI on: 1: mov byte [rdi], 1; add rdi, 4096; dec ecx; jnz 1b."""
MANUAL = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests that write `count` pages from DATA on, under capabilities."""
    guests: list[Guest] = []

    def make(count: int, *caps: tuple[int, int]) -> Guest:
        kind = type("GuestWithCaps", (Guest,), {"caps": caps})
        guest: Guest = kind(kvm.System(silicon.Model(request.param)), WRITER, rdi=DATA, rcx=count)
        guests.append(guest)
        return guest

    yield make
    for guest in guests:
        guest.close()


def log_pages(guest: Guest) -> None:
    guest.vm.set_user_memory_region(
        uapi.UserspaceMemoryRegion(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES, memory_size=RAM_SIZE, userspace_addr=guest.memory.address)
    )


def again(guest: Guest, count: int) -> None:
    guest.vcpu.set_regs(uapi.Regs(rip=0x10000, rsp=STACK, rflags=2, rdi=DATA, rcx=count))
    assert guest.run().event is None


def data_pages(bitmap: bytes) -> set[int]:
    bits = int.from_bytes(bitmap, "little")
    return {page - DATA // 4096 for page in range(DATA // 4096, PAGES) if bits >> page & 1}


def clear(guest: Guest, first: int, count: int, bitmap: bytes) -> None:
    memory = kvm.allocate_memory(4096)
    memoryview(memory)[: len(bitmap)] = bitmap
    guest.vm.clear_dirty_log(uapi.ClearDirtyLog(first_page=first, num_pages=count, dirty_bitmap=memory.address))


def test_reading_the_log_starts_it_anew(boot: Boot) -> None:
    guest = boot(3)
    log_pages(guest)
    guest.run()
    assert data_pages(guest.vm.get_dirty_log(0)) == {0, 1, 2}
    assert data_pages(guest.vm.get_dirty_log(0)) == set()
    again(guest, 2)
    assert data_pages(guest.vm.get_dirty_log(0)) == {0, 1}


def test_with_manual_protection_only_what_is_cleared_is_logged_again(boot: Boot) -> None:
    guest = boot(5, (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL))
    log_pages(guest)
    guest.run()
    assert data_pages(guest.vm.get_dirty_log(0)) == {0, 1, 2, 3, 4}
    assert data_pages(guest.vm.get_dirty_log(0)) == {0, 1, 2, 3, 4}
    first = DATA // 4096 // 64 * 64
    wanted = 0b1011 << DATA // 4096 - first
    clear(guest, first, 64, wanted.to_bytes(8, "little"))
    assert data_pages(guest.vm.get_dirty_log(0)) == {2, 4}
    again(guest, 2)
    assert data_pages(guest.vm.get_dirty_log(0)) == {0, 1, 2, 4}


def test_a_log_that_begins_with_all_pages(boot: Boot) -> None:
    guest = boot(1, (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, MANUAL | uapi.KVM_DIRTY_LOG_INITIALLY_SET))
    log_pages(guest)
    assert guest.vm.get_dirty_log(0) == b"\xff" * (PAGES // 8)
    clear(guest, 0, PAGES, b"\xff" * (PAGES // 8))
    guest.run()
    assert data_pages(guest.vm.get_dirty_log(0)) == {0}


def ring(guest: Guest, size: int) -> memoryview:
    return guest.vcpu.mmap(size, RING_OFFSET)


def harvest(area: memoryview) -> list[tuple[int, int]]:
    """What user space does: take entries that are dirty, hand them back."""
    found = []
    for position in range(0, len(area), dirty_ring.ENTRY_SIZE):
        entry = uapi.DirtyGfn.from_buffer(area, position)
        if entry.flags == uapi.KVM_DIRTY_GFN_F_DIRTY:
            found.append((entry.slot, entry.offset))
            entry.flags |= uapi.KVM_DIRTY_GFN_F_RESET
    return found


def test_a_ring_is_harvested_reset_and_filled_again(boot: Boot) -> None:
    guest = boot(3, (uapi.KVM_CAP_DIRTY_LOG_RING, 4096))
    area = ring(guest, 4096)
    log_pages(guest)
    guest.run()
    pages = [page for slot, page in harvest(area) if slot == 0 and page >= DATA // 4096]
    assert pages == [DATA // 4096 + page for page in range(3)]
    again(guest, 3)
    assert harvest(area) == []  # not reset yet: the pages can still be written
    assert guest.vm.reset_dirty_rings() >= 3
    assert guest.vm.reset_dirty_rings() == 0
    again(guest, 2)
    assert [page for _, page in harvest(area)] == [DATA // 4096, DATA // 4096 + 1]


def test_a_full_ring_stops_the_vcpu_until_it_is_reset(boot: Boot) -> None:
    entries = 4096 // dirty_ring.ENTRY_SIZE
    guest = boot(entries, (uapi.KVM_CAP_DIRTY_LOG_RING, 4096))
    area = ring(guest, 4096)
    log_pages(guest)
    shared, seen = guest.vcpu.kvm_run, set()
    guest.vcpu.run()
    while shared.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL:
        guest.vcpu.run()
        assert shared.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL  # nothing was done about it
        new = {page for _, page in harvest(area)}
        assert len(new) >= entries - dirty_ring.RESERVED_ENTRIES
        seen |= new
        guest.vm.reset_dirty_rings()
        guest.vcpu.run()
    seen |= {page for _, page in harvest(area)}
    assert shared.exit_reason == uapi.KVM_EXIT_IO
    assert {DATA // 4096 + page for page in range(entries)} <= seen
    assert guest.vcpu.stats["dirty_ring_overflows"] == 0


def test_what_user_space_writes_into_the_ring_is_not_believed(boot: Boot) -> None:
    guest = boot(2, (uapi.KVM_CAP_DIRTY_LOG_RING, 4096))
    area = ring(guest, 4096)
    log_pages(guest)
    guest.run()
    for position in range(0, len(area), dirty_ring.ENTRY_SIZE):
        entry = uapi.DirtyGfn.from_buffer(area, position)
        entry.flags, entry.slot, entry.offset = 0xFFFF_FFFF, 0xFFFF_FFFF, (1 << 64) - 1
    assert guest.vm.reset_dirty_rings() >= 2
    again(guest, 2)


@pytest.mark.parametrize(
    ("cap", "value", "error"),
    [
        (uapi.KVM_CAP_DIRTY_LOG_RING, 0, errno.EINVAL),
        (uapi.KVM_CAP_DIRTY_LOG_RING, 4097, errno.EINVAL),
        (uapi.KVM_CAP_DIRTY_LOG_RING, 1024, errno.EINVAL),
        (uapi.KVM_CAP_DIRTY_LOG_RING, 1 << 21, errno.E2BIG),
        (uapi.KVM_CAP_DIRTY_LOG_RING, 4096, errno.EINVAL),  # there are vCPUs
        (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, uapi.KVM_DIRTY_LOG_INITIALLY_SET, errno.EINVAL),
        (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 4, errno.EINVAL),
    ],
)
def test_bad_capabilities(boot: Boot, cap: int, value: int, error: int) -> None:
    guest = boot(1)
    with pytest.raises(OSError, match=r".") as caught:
        guest.vm.enable_cap(uapi.EnableCap(cap=cap, args=(value, 0, 0, 0)))
    assert caught.value.errno == error
    assert (guest.vm.mmu.ring_size, guest.vm.mmu.manual_protect) == (0, 0)


@pytest.mark.parametrize(
    ("slot", "first", "count", "error"),
    [
        (0, 1, 63, errno.EINVAL),
        (0, 0, 63, errno.EINVAL),
        (0, PAGES + 64, 0, errno.EINVAL),
        (0, 64, PAGES, errno.EINVAL),
        (2 << 16, 0, 64, errno.EINVAL),
        (7, 0, 64, errno.ENOENT),
        (0, 0, 64, errno.EFAULT),
    ],
)
def test_bad_clears(boot: Boot, slot: int, first: int, count: int, error: int) -> None:
    guest = boot(1)
    log_pages(guest)
    with pytest.raises(OSError, match=r".") as caught:
        guest.vm.clear_dirty_log(uapi.ClearDirtyLog(slot=slot, first_page=first, num_pages=count, dirty_bitmap=0x1000))
    assert caught.value.errno == error


def test_logs_and_rings_exclude_each_other(boot: Boot) -> None:
    guest = boot(1, (uapi.KVM_CAP_DIRTY_LOG_RING, 4096))
    log_pages(guest)
    for call in (lambda: guest.vm.get_dirty_log(0), lambda: guest.vm.clear_dirty_log(uapi.ClearDirtyLog())):
        with pytest.raises(OSError, match="rings") as caught:
            call()
        assert caught.value.errno == errno.ENXIO
    with pytest.raises(OSError, match="no dirty rings") as caught:
        boot(1).vm.reset_dirty_rings()
    assert caught.value.errno == errno.EINVAL
