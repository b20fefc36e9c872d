"""KVM_SET_USER_MEMORY_REGION and the dirty log: the errors measured on Linux."""

from __future__ import annotations

import errno

import pytest

from softkvm import silicon
from softkvm.kvm import Vm
from softkvm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, UserspaceMemoryRegion

MB = 1 << 20
HVA = 0x7000_0000_0000


def region(slot: int = 0, gpa: int = 0, size: int = MB, hva: int = HVA, flags: int = 0) -> UserspaceMemoryRegion:
    return UserspaceMemoryRegion(slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva)


@pytest.fixture(params=["cascadelake"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    return silicon.Model(request.param)


def test_what_linux_allows(vm: Vm) -> None:
    vm.set_user_memory_region(region())  # unmapped user memory faults later
    vm.set_user_memory_region(region())
    vm.set_user_memory_region(region(flags=KVM_MEM_LOG_DIRTY_PAGES))
    vm.set_user_memory_region(region(gpa=2 * MB, flags=KVM_MEM_LOG_DIRTY_PAGES))
    vm.set_user_memory_region(region(slot=1))
    vm.set_user_memory_region(region(size=0))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (region(size=2 * MB), errno.EINVAL),
        (region(hva=HVA + MB), errno.EINVAL),
        (region(flags=KVM_MEM_READONLY), errno.EINVAL),
        (region(slot=1, gpa=MB - 4096), errno.EEXIST),
        (region(slot=32764, gpa=MB), errno.EINVAL),
        (region(slot=1, size=0), errno.EINVAL),
        (region(slot=1, gpa=MB, size=MB + 1), errno.EINVAL),
        (region(slot=1, gpa=MB + 1), errno.EINVAL),
        (region(slot=1, gpa=MB, hva=HVA + 1), errno.EINVAL),
        (region(slot=1, gpa=(1 << 64) - 4096), errno.EINVAL),
        (region(slot=1, gpa=1 << 60), errno.EINVAL),
        (region(slot=2 << 16, gpa=MB), errno.EINVAL),
        (region(slot=1, gpa=MB, hva=1 << 47), errno.EINVAL),
        (region(slot=1, gpa=MB, flags=4), errno.EINVAL),
    ],
)
def test_what_linux_refuses_changes_nothing(vm: Vm, bad: UserspaceMemoryRegion, error: int) -> None:
    vm.set_user_memory_region(region())
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the assertion
        vm.set_user_memory_region(bad)
    assert caught.value.errno == error
    slot = vm.mmu.slots.find(MB - 1)
    assert slot is not None
    assert (slot.id, slot.size, slot.hva, vm.mmu.slots.find(MB)) == (0, MB, HVA, None)


def test_dirty_log_needs_a_logging_slot(vm: Vm) -> None:
    for slot in (0, 1):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            vm.get_dirty_log(slot)
        assert caught.value.errno == errno.ENOENT
        vm.set_user_memory_region(region())
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vm.get_dirty_log(32764)
    assert caught.value.errno == errno.EINVAL
