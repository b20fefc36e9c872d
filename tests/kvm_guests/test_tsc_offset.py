"""KVM_{GET,SET}_TSC_OFFSET and KVM_VCPU_TSC_CTRL, as guest code: what the series' `tsc_offset_test` checks, stage by stage."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import kvm, silicon
from softkvm.kvm import Parameters, Vcpu, dispatch
from softkvm.kvm.tsc import FRACTION_BITS
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series
from tests.helpers.long_guest import CODE, DATA, END, Guest

IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE = 0x10, 0x3B, 0x6E0
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
CPUID = b"\x0f\xa2"
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


# Silicon without TSC scaling (kvm_amd.tsc_scaling=0, or a CPU without the feature)


@pytest.fixture(params=["parameter", "silicon"])
def unscaled(request: pytest.FixtureRequest) -> Iterator[Guest]:
    """A guest that leaves for the host and comes back, and then reads its TSC into RBX."""
    has_feature = request.param == "parameter"
    model = silicon.Model("epyc", {"tsc-scale": has_feature})
    made = Guest(kvm.System(model, Parameters(tsc_scaling=not has_feature)), CPUID + RDTSC + END)
    yield made
    made.close()


def test_a_tsc_that_catches_up_is_where_it_should_be_after_an_exit(unscaled: Guest) -> None:
    khz, rate = silicon.tsc_khz(), 3
    assert not unscaled.vm.check_extension(uapi.KVM_CAP_TSC_CONTROL)
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        unscaled.vcpu.set_tsc_khz(khz // 2)
    assert unscaled.vcpu.get_tsc_khz() == khz
    unscaled.vcpu.set_tsc_khz(rate * khz)
    start = silicon.tsc()
    unscaled.vcpu.set_msrs({IA32_TSC: 1 << 50})
    started = silicon.tsc()
    for _ in range(3):
        before, tsc, after = read_tsc(unscaled)
        rounding = rate * khz // 1_000_000 + 1  # of ns to cycles
        assert rate * (before - started) <= tsc - (1 << 50) + rounding
        assert tsc - (1 << 50) <= rate * (after - start) + rounding


def rate_and_ratio(khz: int, host: int, limit: int, scaling: bool) -> tuple[int, int] | None:
    """What Linux 6.1 `kvm_set_tsc_khz()` makes of the argument of KVM_SET_TSC_KHZ, the ratio without its fraction; None for EINVAL."""
    khz = khz & U32 or host
    close = host * (1_000_000 - 250) // 1_000_000 <= khz <= host * (1_000_000 + 250) // 1_000_000
    if khz >= limit if scaling else khz < host and not close:
        return None
    return khz, khz // host if scaling and not close else 1


RATES = st.one_of(
    st.integers(0, U64), st.integers(0, U32), st.integers(-300, 300).map(lambda ppm: silicon.tsc_khz() * (1_000_000 + ppm) // 1_000_000)
)


@pytest.mark.parametrize(("cpu", "scaling"), [("cascadelake", True), ("epyc", True), ("cascadelake", False), ("epyc", False)])
@given(rates=st.lists(RATES, min_size=1, max_size=5))
def test_any_rate_is_taken_or_refused_as_linux_does(cpu: str, scaling: bool, rates: list[int]) -> None:
    host, vm = silicon.tsc_khz(), kvm.System(silicon.Model(cpu), Parameters(tsc_scaling=scaling)).create_vm()
    limit = min(0x7FFF_FFFF, 256 * host - 1) if cpu == "epyc" else 0x7FFF_FFFF
    try:
        vcpu = vm.create_vcpu(0)
        for rate in rates:
            before, expected = (vcpu.tsc.khz, vcpu.tsc.ratio, vcpu.tsc.catchup), rate_and_ratio(rate, host, limit, scaling)
            with nullcontext() if expected is not None else pytest.raises(OSError, match=r"\[Errno 22\]"):
                vcpu.set_tsc_khz(rate)
            assert expected is not None or (vcpu.tsc.khz, vcpu.tsc.ratio, vcpu.tsc.catchup) == before
            assert expected is None or (vcpu.get_tsc_khz(), vcpu.tsc.ratio >> FRACTION_BITS) == expected
            default, refused = vm.get_tsc_khz(), scaling and expected is None
            with nullcontext() if not refused else pytest.raises(OSError, match=r"\[Errno 22\]"):
                vm.set_tsc_khz(rate)
            assert vm.get_tsc_khz() == (default if refused else rate & U32 or host)
    finally:
        vm.close()


# A guest that writes its clocks at random

RANDOM_WRITES = st.lists(st.tuples(st.sampled_from([IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE]), st.integers(0, U64)), max_size=12)


def write_msr(index: int, value: int) -> bytes:
    """mov ecx, index; mov eax, low; mov edx, high; wrmsr"""
    return b"\xb9" + struct.pack("<I", index) + b"\xb8" + struct.pack("<I", value & U32) + b"\xba" + struct.pack("<I", value >> 32) + WRMSR


@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
@given(writes=RANDOM_WRITES)
def test_random_writes_of_a_guest_move_its_own_tsc_only(cpu: str, writes: list[tuple[int, int]]) -> None:
    guest = Guest(kvm.System(silicon.Model(cpu)), b"".join(write_msr(*write) for write in writes) + RDTSC + END)
    try:
        other = guest.vm.create_vcpu(1)
        offset = other.get_tsc_offset()
        assert stable(guest)
        start = silicon.tsc()
        assert guest.run().event is None
        stop = silicon.tsc()
        tsc = guest.vcpu.get_regs().rbx
        moved = (guest.vcpu.get_tsc_offset() - offset) & U64
        assert (tsc - start - guest.vcpu.get_tsc_offset()) & U64 <= stop - start
        assert guest.vcpu.get_msrs([IA32_TSC_ADJUST]) == [moved], "TSC_ADJUST tells how far the guest has moved its TSC"
        assert other.get_tsc_offset() == offset
        assert other.get_msrs([IA32_TSC_ADJUST]) == [0]
        assert stable(guest), "what a guest does to its TSC costs nobody the master clock"
    finally:
        guest.close()
