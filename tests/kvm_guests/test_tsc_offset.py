"""KVM_{GET,SET}_TSC_OFFSET and KVM_VCPU_TSC_CTRL, as guest code: what the series' `tsc_offset_test` checks, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.kvm import Vcpu, dispatch
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series
from tests.helpers.long_guest import CODE, DATA, END, Guest

IA32_TSC, IA32_TSC_ADJUST = 0x10, 0x3B
U64 = (1 << 64) - 1
RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\x48\x89\xc3"
"""rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax"""
WRMSR = b"\x0f\x30"
OFFSETS = [0, 1, 1 << 48, -(180 * 10**9) & U64, 1 << 63, U64]


def signed(value: int) -> int:
    return value - (value >> 63 << 64)


@pytest.fixture(params=["cascadelake", "epyc"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest that reads its TSC into RBX."""
    made = Guest(kvm.System(silicon.Model(request.param)), RDTSC + END)
    yield made
    made.close()


def read_tsc(guest: Guest) -> tuple[int, int, int]:
    """The guest's TSC in RBX, and the host's around the run."""
    guest.vcpu.set_regs(uapi.Regs(rip=CODE, rsp=0x30000, rflags=2))
    before = silicon.tsc()
    assert guest.run().event is None
    return before, guest.vcpu.get_regs().rbx, silicon.tsc()


def attribute(guest: Guest, value: int | None = None, attr: int = uapi.KVM_VCPU_TSC_OFFSET, group: int = 0) -> uapi.DeviceAttr:
    """An attribute whose value lies in guest RAM, which is user memory as well."""
    if value is not None:
        guest.ram[DATA : DATA + 8] = value.to_bytes(8, "little")
    return uapi.DeviceAttr(group=group, attr=attr, addr=guest.memory.address + DATA)


@pytest.mark.parametrize("offset", OFFSETS)
def test_offset_reads_back_and_moves_the_guest_by_exactly_it(guest: Guest, offset: int) -> None:
    guest.vcpu.set_tsc_offset(offset)
    assert guest.vcpu.get_tsc_offset() == offset
    before, tsc, after = read_tsc(guest)
    assert (tsc - before - offset) & U64 <= after - before


def test_binary_door(guest: Guest) -> None:
    value = memoryview(bytearray((1 << 48).to_bytes(8, "little")))
    assert dispatch(guest.vcpu, series.KVM_SET_TSC_OFFSET, value) == 0
    answer = memoryview(bytearray(8))
    assert dispatch(guest.vcpu, series.KVM_GET_TSC_OFFSET, answer) == 0
    assert bytes(answer) == bytes(value)
    for number in (series.KVM_GET_TSC_OFFSET, series.KVM_SET_TSC_OFFSET):
        with pytest.raises(OSError, match=r"\[Errno 14\]"):
            dispatch(guest.vcpu, number, 0)
    assert guest.vcpu.get_tsc_offset() == 1 << 48


def test_guest_write_of_zero_is_an_offset_of_minus_the_host_tsc(guest: Guest) -> None:
    guest.ram[CODE : CODE + 3] = WRMSR + END[:1]
    guest.ram[CODE + 2 : CODE + 2 + len(END)] = END
    guest.vcpu.set_regs(uapi.Regs(rip=CODE, rsp=0x30000, rflags=2, rcx=IA32_TSC))
    start = silicon.tsc()
    assert guest.run().event is None
    assert -silicon.tsc() <= signed(guest.vcpu.get_tsc_offset()) <= -start


def test_guest_writes_adjust_by_the_same_amount_and_host_writes_do_not(guest: Guest) -> None:
    before = guest.vcpu.get_tsc_offset()
    guest.ram[CODE : CODE + 4] = WRMSR + END
    guest.vcpu.set_regs(uapi.Regs(rip=CODE, rsp=0x30000, rflags=2, rcx=IA32_TSC_ADJUST, rax=12345))
    assert guest.run().event is None
    assert guest.vcpu.get_tsc_offset() == before + 12345 & U64
    guest.vcpu.set_tsc_offset(777)
    assert guest.vcpu.get_msrs([IA32_TSC_ADJUST]) == [12345]


def test_attribute_is_the_same_offset(guest: Guest) -> None:
    guest.vcpu.has_device_attr(attribute(guest))
    guest.vcpu.set_device_attr(attribute(guest, 1 << 40))
    assert guest.vcpu.get_tsc_offset() == 1 << 40
    guest.vcpu.set_tsc_offset(99)
    guest.vcpu.get_device_attr(attribute(guest))
    assert bytes(guest.ram[DATA : DATA + 8]) == (99).to_bytes(8, "little")


def test_attributes_that_are_not_there_and_bad_addresses(guest: Guest) -> None:
    guest.vcpu.set_tsc_offset(5)
    for unknown in (attribute(guest, attr=1), attribute(guest, group=1)):
        for call in (guest.vcpu.has_device_attr, guest.vcpu.get_device_attr, guest.vcpu.set_device_attr):
            with pytest.raises(OSError, match=r"\[Errno 6\]"):
                call(unknown)
    for call in (guest.vcpu.get_device_attr, guest.vcpu.set_device_attr):
        with pytest.raises(OSError, match=r"\[Errno 14\]"):
            call(uapi.DeviceAttr(addr=8))
    assert guest.vcpu.get_tsc_offset() == 5


def test_capabilities(guest: Guest) -> None:
    assert guest.vm.check_extension(series.KVM_CAP_TSC_OFFSET) == 1
    assert guest.vm.check_extension(uapi.KVM_CAP_VCPU_ATTRIBUTES) == 1


def stable(guest: Guest) -> bool:
    """Whether the VM has its master clock; KVM_SET_CLOCK is where KVM looks."""
    guest.vm.set_clock(guest.vm.get_clock())
    return bool(guest.vm.get_clock().flags & uapi.KVM_CLOCK_TSC_STABLE)


def test_master_clock_follows_the_phase_of_all_vcpus(guest: Guest) -> None:
    vcpus: list[Vcpu] = [guest.vcpu, *(guest.vm.create_vcpu(index) for index in (1, 2, 3))]
    assert stable(guest)
    for number, vcpu in enumerate(vcpus):
        vcpu.set_tsc_offset(1 << 48)
        assert stable(guest) is (number == 3)
    for _ in range(3):  # the same vCPU again counts once (the bug of v2 and v3 of the series)
        vcpus[0].set_tsc_offset(1 << 48)
        assert stable(guest)
    vcpus[2].set_tsc_offset((1 << 48) + 1)
    assert not stable(guest)
    for vcpu in vcpus:
        vcpu.set_tsc_offset(7)
    assert stable(guest)
    assert len({vcpu.get_tsc_offset() for vcpu in vcpus}) == 1


def test_scaled_tsc_takes_its_offset_unscaled(guest: Guest) -> None:
    khz = silicon.tsc_khz()
    guest.vcpu.set_tsc_khz(2 * khz)
    guest.vcpu.set_tsc_offset(1000)
    before, tsc, after = read_tsc(guest)
    assert 2 * before + 1000 <= tsc + 1 <= 2 * after + 1001
    assert guest.vcpu.get_tsc_khz() == 2 * khz
