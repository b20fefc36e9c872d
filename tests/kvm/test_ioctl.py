"""The binary door: numbers and structures reach the same methods, with Linux's errno."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from softkvm import silicon
from softkvm.host import trace
from softkvm.kvm import System, Vcpu, Vm, dispatch
from softkvm.kvm.ioctl import Argument, KvmFile
from softkvm.uapi import kvm as uapi
from tests.fake_engine import as_bytes


def failure(file: KvmFile, number: int, argument: Argument = 0) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the result
        dispatch(file, number, argument)
    return caught.value.errno


def test_unknown_numbers(system: System, vm: Vm, vcpu: Vcpu) -> None:
    number = uapi._io(0xFA)
    assert [failure(file, number) for file in (system, vm, vcpu)] == [errno.EINVAL, errno.ENOTTY, errno.EINVAL]


def test_every_ioctl_of_the_abi_has_a_method() -> None:
    numbers = {
        name: value
        for name, value in vars(uapi).items()
        if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == 0xAE
    }
    known = {number for file in (System, Vm, Vcpu) for number in file.operations}
    assert {name for name, number in numbers.items() if number not in known} == set()
    assert len(numbers) > 60


def test_calls_without_an_argument_refuse_one(system: System, vcpu: Vcpu) -> None:
    assert dispatch(system, uapi.KVM_GET_API_VERSION) == 12
    assert dispatch(system, uapi.KVM_GET_VCPU_MMAP_SIZE) == 12288
    for file, number in ((system, uapi.KVM_GET_API_VERSION), (system, uapi.KVM_GET_VCPU_MMAP_SIZE), (vcpu, uapi.KVM_RUN)):
        assert failure(file, number, 1) == errno.EINVAL


def test_only_the_low_32_bits_of_the_number_count(vcpu: Vcpu) -> None:
    buffer = memoryview(bytearray(ctypes.sizeof(uapi.Regs)))
    sign_extended = uapi.KVM_GET_REGS | 0xFFFF_FFFF_0000_0000
    assert dispatch(vcpu, sign_extended, buffer) == 0
    assert uapi.Regs.from_buffer_copy(buffer).rip == 0xFFF0


def test_creating_calls_return_the_file(system: System) -> None:
    vm = dispatch(system, uapi.KVM_CREATE_VM)
    assert isinstance(vm, Vm)
    assert dispatch(vm, uapi.KVM_CREATE_IRQCHIP, 0xC) == 0  # kvmtool passes garbage
    assert isinstance(dispatch(vm, uapi.KVM_CREATE_VCPU, 0), Vcpu)
    assert failure(system, uapi.KVM_CREATE_VM, 1) == errno.EINVAL
    vm.close()


def test_structures_go_both_ways(vcpu: Vcpu) -> None:
    regs = uapi.Regs(rax=5, rip=0x1234)
    assert dispatch(vcpu, uapi.KVM_SET_REGS, memoryview(bytearray(bytes(regs)))) == 0
    assert vcpu.get_regs().rax == 5
    assert failure(vcpu, uapi.KVM_SET_REGS, 0) == errno.EFAULT
    assert failure(vcpu, uapi.KVM_GET_REGS, memoryview(bytearray(8))) == errno.EFAULT


def test_supported_cpuid_needs_room(system: System) -> None:
    count = len(system.get_supported_cpuid())
    buffer = memoryview(bytearray(8 + 40 * 256))
    struct.pack_into("<I", buffer, 0, count - 1)
    assert failure(system, uapi.KVM_GET_SUPPORTED_CPUID, buffer) == errno.E2BIG
    assert struct.unpack_from("<I", buffer)[0] == count - 1  # left alone
    struct.pack_into("<I", buffer, 0, 256)
    assert dispatch(system, uapi.KVM_GET_SUPPORTED_CPUID, buffer) == 0
    assert struct.unpack_from("<I", buffer)[0] == count


def test_msr_list_tells_the_room_it_needs(system: System) -> None:
    buffer = memoryview(bytearray(4 + 4 * 1024))
    assert failure(system, uapi.KVM_GET_MSR_INDEX_LIST, buffer) == errno.E2BIG
    count = struct.unpack_from("<I", buffer)[0]
    assert dispatch(system, uapi.KVM_GET_MSR_INDEX_LIST, buffer) == 0
    assert list(struct.unpack_from(f"<{count}I", buffer, 4)) == system.get_msr_index_list()


def test_msrs_stop_at_the_first_bad_one(vcpu: Vcpu) -> None:
    buffer = memoryview(bytearray(8 + 16 * 3))
    star, bad = 0xC000_0081, 0x1234_5678
    struct.pack_into("<II" + "IIQ" * 3, buffer, 0, 3, 0, star, 0, 7, bad, 0, 8, star, 0, 9)
    assert dispatch(vcpu, uapi.KVM_SET_MSRS, buffer) == 1
    struct.pack_into("<Q", buffer, 16, 0)
    assert dispatch(vcpu, uapi.KVM_GET_MSRS, buffer) == 1
    assert struct.unpack_from("<Q", buffer, 16)[0] == 7
    struct.pack_into("<I", buffer, 0, 256)
    assert failure(vcpu, uapi.KVM_GET_MSRS, buffer) == errno.E2BIG


def test_cpuid_of_a_vcpu(vcpu: Vcpu) -> None:
    buffer = memoryview(bytearray(8 + 40 * 257))
    struct.pack_into("<I", buffer, 0, 257)
    assert failure(vcpu, uapi.KVM_SET_CPUID2, buffer) == errno.E2BIG
    struct.pack_into("<I", buffer, 0, 1)
    assert failure(vcpu, uapi.KVM_GET_CPUID2, buffer) == errno.E2BIG


def test_irq_line_status_comes_back_in_place(vm: Vm) -> None:
    vm.create_irqchip()
    buffer = memoryview(bytearray(struct.pack("<II", 200, 1)))
    assert dispatch(vm, uapi.KVM_IRQ_LINE_STATUS, buffer) == 0
    assert struct.unpack("<iI", buffer) == (-1, 1)  # nothing listens on GSI 200


def test_signal_mask(vcpu: Vcpu) -> None:
    buffer = memoryview(bytearray(struct.pack("<IQ", 8, 1 << 9 | 1)))
    assert dispatch(vcpu, uapi.KVM_SET_SIGNAL_MASK, buffer) == 0
    assert vcpu.signal_mask == frozenset((1, 10))
    assert dispatch(vcpu, uapi.KVM_SET_SIGNAL_MASK, 0) == 0
    assert vcpu.signal_mask is None
    struct.pack_into("<I", buffer, 0, 4)
    assert failure(vcpu, uapi.KVM_SET_SIGNAL_MASK, buffer) == errno.EINVAL


def test_dirty_log_goes_to_the_callers_memory(vm: Vm) -> None:
    ram, bitmap = silicon.allocate(4096 * 4), silicon.allocate(4096)
    vm.set_user_memory_region(
        uapi.UserspaceMemoryRegion(memory_size=ram.size, userspace_addr=ram.address, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    )
    vm.memory.write(0x2000, b"x")
    log = uapi.DirtyLog(slot=0, dirty_bitmap=bitmap.address)
    assert dispatch(vm, uapi.KVM_GET_DIRTY_LOG, memoryview(bytearray(bytes(log)))) == 0
    assert bytes(as_bytes(bitmap)[:8]) == (1 << 2).to_bytes(8, "little")
    log.dirty_bitmap = 8
    assert failure(vm, uapi.KVM_GET_DIRTY_LOG, memoryview(bytearray(bytes(log)))) == errno.EFAULT


def test_both_doors_cross_the_entry_code(vcpu: Vcpu) -> None:
    seen: list[int] = []

    def probe(nr: int, args: tuple[int, ...]) -> None:
        seen.append(args[1])

    trace.sys_enter.register(probe)
    try:
        vcpu.get_regs()
        dispatch(vcpu, uapi.KVM_NMI)
    finally:
        trace.sys_enter.unregister(probe)
    assert seen == [uapi.KVM_GET_REGS, uapi.KVM_NMI]
