"""Faults into nested page tables, the dirty log, and KVM's own access to guest memory."""

from __future__ import annotations

import errno

import pytest

from softkvm import silicon
from softkvm.kvm import Vm
from softkvm.kvm.mmu import DEVICE_LIMIT, Fault
from softkvm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from tests.kvm.test_memslots import MB, region


@pytest.fixture(params=["cascadelake"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    return silicon.Model(request.param)


def test_dirty_log_tells_each_written_page_once(vm: Vm) -> None:
    memory = silicon.allocate(MB)
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
    memory = silicon.allocate(4 * MB)
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
    memory = silicon.allocate(MB)
    vm.set_user_memory_region(region(slot=1, gpa=MB, hva=memory.address, flags=KVM_MEM_READONLY))
    assert vm.mmu.fault(MB, write=True) is Fault.MMIO
    assert vm.mmu.fault(MB, write=False) is Fault.FIXED
    assert vm.mmu.npt.lookup(MB) == (memory.address, silicon.RIGHT_R | silicon.RIGHT_X)


def test_pages_of_devices_are_known_until_there_is_memory(vm: Vm) -> None:
    assert vm.mmu.fault(MB + 0x10, write=True) is Fault.MMIO
    assert vm.mmu.npt.lookup(MB) == (0, silicon.RIGHT_DEVICE)
    memory = silicon.allocate(MB)
    vm.set_user_memory_region(region(gpa=MB, hva=memory.address))
    assert vm.mmu.npt.lookup(MB) is None
    assert vm.mmu.fault(MB, write=True) is Fault.FIXED


def test_no_more_devices_are_known_than_a_machine_has(vm: Vm) -> None:
    pages = range(0, (DEVICE_LIMIT + 9) * 0x1000, 0x1000)
    assert all(vm.mmu.fault(page, write=False) is Fault.MMIO for page in pages)
    assert sum(vm.mmu.npt.lookup(page) is not None for page in pages) == DEVICE_LIMIT


def test_a_device_whose_accesses_are_tracked_is_not_known(vm: Vm) -> None:
    vm.mmu.restrict({1: silicon.RIGHT_R})
    assert vm.mmu.fault(0x1000, write=True) is Fault.MMIO
    assert vm.mmu.npt.lookup(0x1000) is None


def test_a_deleted_slot_is_unmapped(vm: Vm) -> None:
    memory = silicon.allocate(MB)
    vm.set_user_memory_region(region(hva=memory.address))
    vm.mmu.fault(0, write=True)
    vm.set_user_memory_region(region(size=0))
    assert vm.mmu.npt.lookup(0) is None
    with pytest.raises(OSError) as caught:  # noqa: PT011
        vm.memory.read(0, 1)
    assert caught.value.errno == errno.EFAULT


def test_memory_access_crosses_slots(vm: Vm) -> None:
    low, high = silicon.allocate(4096), silicon.allocate(4096)
    vm.set_user_memory_region(region(size=4096, hva=low.address))
    vm.set_user_memory_region(region(slot=1, gpa=4096, size=4096, hva=high.address))
    vm.memory.write(4094, b"abcd")
    assert vm.memory.read(4094, 4) == b"abcd"
    assert bytes(memoryview(high)[:2]) == b"cd"


def test_a_page_that_another_vcpu_has_mapped_is_left_alone(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = silicon.allocate(MB)
    vm.set_user_memory_region(region(hva=memory.address))
    vm.mmu.fault(0, write=True)
    monkeypatch.setattr(vm.mmu, "_map", None)
    assert vm.mmu.fault(0x3000, write=True) is Fault.FIXED
