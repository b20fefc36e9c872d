"""`softkvm.kvm.stats`: the file of KVM_GET_STATS_FD, read as Linux's selftest kvm_binary_stats_test reads it."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from softkvm.kvm import Process, System, Vcpu, Vm, dispatch, stats
from softkvm.kvm.stats import StatsFile
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import Script
from tests.kvm.guest import leave, out_of_guest

HEADER, DESCRIPTOR = ctypes.sizeof(uapi.StatsHeader), ctypes.sizeof(uapi.StatsDesc)
TYPES, UNITS, BASES = 0xF, 0xF0, 0xF00


def parse(file: StatsFile) -> tuple[str, dict[str, int]]:
    """The id and the numbers, by nothing but the format."""
    header = uapi.StatsHeader.from_buffer_copy(file.pread(HEADER, 0))
    name = file.pread(header.name_size, header.id_offset).rstrip(b"\0").decode()
    assert header.desc_offset >= HEADER + header.name_size
    assert header.desc_offset + header.num_desc * (DESCRIPTOR + header.name_size) <= header.data_offset
    numbers = {}
    for index in range(header.num_desc):
        at = header.desc_offset + index * (DESCRIPTOR + header.name_size)
        descriptor = uapi.StatsDesc.from_buffer_copy(file.pread(DESCRIPTOR, at))
        label = file.pread(header.name_size, at + DESCRIPTOR)
        assert label.endswith(b"\0")
        seconds = descriptor.flags & UNITS == uapi.KVM_STATS_UNIT_SECONDS
        assert (descriptor.size, descriptor.bucket_size, descriptor.exponent) == (1, 0, -9 if seconds else 0)
        assert descriptor.flags & TYPES in (uapi.KVM_STATS_TYPE_CUMULATIVE, uapi.KVM_STATS_TYPE_INSTANT)
        assert seconds or descriptor.flags & UNITS in (uapi.KVM_STATS_UNIT_NONE, uapi.KVM_STATS_UNIT_BOOLEAN)
        assert not descriptor.flags & BASES
        (numbers[label.rstrip(b"\0").decode()],) = struct.unpack("<Q", file.pread(8, header.data_offset + descriptor.offset))
    assert file.pread(1, header.data_offset + 8 * header.num_desc) == b""
    return name, numbers


def test_a_vcpus_file_counts_what_it_does(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    file = vcpu.get_stats_fd()
    name, before = parse(file)
    assert name == f"kvm-{vm.vm_id}/vcpu-{vcpu.vcpu_id}"
    assert set(before.values()) == {0}
    out_of_guest(vcpu, play, leave(vcpu, "hypercall", 3), leave(vcpu, "cpuid", 2), leave(vcpu, "interrupt"))
    _, after = parse(file)
    assert after["hypercalls"] == 1
    assert after["irq_exits"] >= 1
    assert after["exits"] == sum(vcpu.exit_counts.values()) >= 3
    assert after == vcpu.statistics() == stats.of_vcpu(vcpu)


def test_a_vms_file_counts_its_shoot_downs(vm: Vm, ram: object) -> None:
    file = vm.get_stats_fd()
    name, before = parse(file)
    assert name == f"kvm-{vm.vm_id}"
    vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=0))
    assert parse(file)[1]["remote_tlb_flush"] == before["remote_tlb_flush"] + 1


def test_read_goes_on_where_it_stopped_and_ends_at_the_end(vcpu: Vcpu) -> None:
    file = vcpu.get_stats_fd()
    pieces = []
    while piece := file.read(37):
        pieces.append(piece)
    assert b"".join(pieces) == file.pread(1 << 20, 0)
    assert file.read(100) == b""
    assert file.pread(10, 1 << 40) == b""


def test_the_file_outlives_its_vm_and_not_its_close(vm: Vm, vcpu: Vcpu) -> None:
    opened = [dispatch(vm, uapi.KVM_GET_STATS_FD), dispatch(vcpu, uapi.KVM_GET_STATS_FD)]
    vm.close()
    for file in opened:
        assert isinstance(file, StatsFile)
        parse(file)
        file.close()
        with pytest.raises(OSError, match="closed") as error:
            file.read(1)
        assert error.value.errno == errno.EBADF
        with pytest.raises(OSError, match="closed") as error:
            file.pread(1, 0)
        assert error.value.errno == errno.EBADF


@pytest.mark.parametrize(("length", "offset"), [(-1, 0), (1, -1)])
def test_bad_ranges(vm: Vm, length: int, offset: int) -> None:
    with pytest.raises(OSError, match="negative") as error:
        vm.get_stats_fd().pread(length, offset)
    assert error.value.errno == errno.EINVAL


def test_other_calls_are_those_of_a_read_only_file(vm: Vm) -> None:
    file = vm.get_stats_fd()
    for call, expected in ((lambda: file.mmap(4096), errno.ENODEV), (lambda: dispatch(file, uapi.KVM_RUN), errno.ENOTTY)):
        with pytest.raises(OSError, match=r"mapped|no ioctl") as error:
            call()
        assert error.value.errno == expected
    with pytest.raises(OSError, match="cannot be read") as error:
        vm.read(10)
    assert error.value.errno == errno.EINVAL


def test_reads_cross_like_any_call() -> None:
    """Tracers and filters see them by name."""
    process = Process()
    with System(process=process).create_vm() as vm:
        file = vm.get_stats_fd()
        assert [file.syscall_name(nr, 0) for nr in (0, 17)] == ["read", "pread64"]
        assert file.syscall_handler(17, 0)(file, 4, 0) == file.pread(4, 0) == file.read(4)
