"""KVM_SET_USER_MEMORY_REGION and the dirty log: the errors measured on Linux (kvm-core reference 4.2)."""

from __future__ import annotations

import errno

import pytest

from softkvm import silicon
from softkvm.kvm import Vm
from softkvm.kvm.mmu import Fault
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
        (region(slot=1 << 16, gpa=MB), errno.EINVAL),
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


def test_dirty_log_tells_each_written_page_once(vm: Vm) -> None:
    memory = silicon.Memory(MB)
    vm.set_user_memory_region(region(hva=memory.address, flags=KVM_MEM_LOG_DIRTY_PAGES))
    assert vm.mmu.fault(0x3123, write=False) is Fault.FIXED
    assert vm.mmu.npt.lookup(0x3000) == (memory.address + 0x3000, silicon.RIGHT_R | silicon.RIGHT_X)
    assert vm.mmu.fault(0x3123, write=True) is Fault.FIXED
    vm.memory.write(0x9FFF, b"ab")
    log = int.from_bytes(vm.get_dirty_log(0), "little")
    assert log == 1 << 3 | 1 << 9 | 1 << 10
    found = vm.mmu.npt.lookup(0x3000)
    assert found is not None
    assert not found[1] & silicon.RIGHT_W
    assert not any(vm.get_dirty_log(0))


def test_faults_map_up_to_two_megabytes_within_slot_and_memory(vm: Vm) -> None:
    memory = silicon.Memory(4 * MB)
    vm.set_user_memory_region(region(gpa=MB, size=3 * MB, hva=memory.address))
    assert vm.mmu.fault(0x12_3456, write=True) is Fault.FIXED
    assert vm.mmu.npt.lookup(MB) == (memory.address, 7)
    assert vm.mmu.npt.lookup(2 * MB - 1) == (memory.address + MB - 1, 7)
    assert vm.mmu.npt.lookup(2 * MB) is None
    assert vm.mmu.npt.lookup(0) is None
    assert vm.mmu.fault(2 * MB, write=False) is Fault.FIXED
    assert vm.mmu.npt.lookup(4 * MB - 1) == (memory.address + 3 * MB - 1, 7)


def test_faults_elsewhere(vm: Vm) -> None:
    vm.set_user_memory_region(region())
    assert vm.mmu.fault(0, write=False) is Fault.UNMAPPED
    assert vm.mmu.fault(MB, write=False) is Fault.MMIO
    memory = silicon.Memory(MB)
    vm.set_user_memory_region(region(slot=1, gpa=MB, hva=memory.address, flags=KVM_MEM_READONLY))
    assert vm.mmu.fault(MB, write=True) is Fault.MMIO
    assert vm.mmu.fault(MB, write=False) is Fault.FIXED
    assert vm.mmu.npt.lookup(MB) == (memory.address, silicon.RIGHT_R | silicon.RIGHT_X)


def test_a_deleted_slot_is_unmapped(vm: Vm) -> None:
    memory = silicon.Memory(MB)
    vm.set_user_memory_region(region(hva=memory.address))
    vm.mmu.fault(0, write=True)
    vm.set_user_memory_region(region(size=0))
    assert vm.mmu.npt.lookup(0) is None
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vm.memory.read(0, 1)
    assert caught.value.errno == errno.EFAULT


def test_memory_access_crosses_slots(vm: Vm) -> None:
    low, high = silicon.Memory(4096), silicon.Memory(4096)
    vm.set_user_memory_region(region(size=4096, hva=low.address))
    vm.set_user_memory_region(region(slot=1, gpa=4096, size=4096, hva=high.address))
    vm.memory.write(4094, b"abcd")
    assert vm.memory.read(4094, 4) == b"abcd"
    assert bytes(memoryview(high)[:2]) == b"cd"
