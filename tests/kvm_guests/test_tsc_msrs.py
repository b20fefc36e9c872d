"""IA32_TSC and IA32_TSC_ADJUST from both sides, and every way in which a guest reads its TSC.

The stages of the kernel's own `tools/testing/selftests/kvm/x86_64/{tsc_msrs_test,tsc_scaling_sync}.c` (Linux 6.1), in exact values where
those round away the time that passes: what a write makes of the offset lies between what it would make at the host's TSC before and after.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm.emulate import FORCED_EMULATION_PREFIX as FEP
from softkvm.kvm.virtual_time import CYCLES_PER_INSTRUCTION
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, END, STACK, Guest

IA32_TSC, IA32_TSC_ADJUST = 0x10, 0x3B
U32, U64 = (1 << 32) - 1, (1 << 64) - 1
STEP = 1 << 30
HOST_STEP = 1 << 40
JOIN = b"\x48\xc1\xe2\x20\x48\x09\xd0\x48\x89\xc3"
"""shl rdx, 32; or rax, rdx; mov rbx, rax"""
RDTSC, RDTSCP, RDMSR, WRMSR = b"\x0f\x31", b"\x0f\x01\xf9", b"\x0f\x32", b"\x0f\x30"
READERS = {"rdtsc": RDTSC, "rdtscp": RDTSCP, "rdmsr": RDMSR, "emulated rdtsc": FEP + RDTSC, "emulated rdtscp": FEP + RDTSCP}


@pytest.fixture(params=["cascadelake", "epyc"])
def system(request: pytest.FixtureRequest) -> kvm.System:
    return kvm.System(silicon.Model(request.param))


class Reader(Guest):
    """A guest that executes one piece of code after the other."""

    def __init__(self, system: kvm.System) -> None:
        super().__init__(system, END)
        self.places = itertools.count(1)


@pytest.fixture
def guest(system: kvm.System) -> Iterator[Reader]:
    made = Reader(system)
    yield made
    made.close()


def execute(guest: Reader, code: bytes, **registers: int) -> int:
    """Let the guest execute `code`; its RBX."""
    start = CODE + 64 * next(guest.places)  # the silicon keeps what it has decoded
    guest.ram[start : start + len(code) + len(END)] = code + END
    guest.vcpu.set_regs(uapi.Regs(**{"rip": start, "rsp": STACK, "rflags": 2} | registers))
    outcome = guest.run()
    assert outcome.event is None, outcome
    return int(guest.vcpu.get_regs().rbx)


def guest_reads(guest: Reader, index: int) -> int:
    return execute(guest, RDMSR + JOIN, rcx=index)


def guest_writes(guest: Reader, index: int, value: int) -> None:
    execute(guest, WRMSR, rcx=index, rax=value & U32, rdx=value >> 32)


class State:
    """The offset of the guest's TSC, which is all there is of it, and TSC_ADJUST."""

    def __init__(self, guest: Guest) -> None:
        self.offset = guest.vcpu.get_tsc_offset()
        (self.adjust,) = guest.vcpu.get_msrs([IA32_TSC_ADJUST])


def offset_after(guest: Reader, tsc: int, before: int) -> None:
    """The TSC was set to `tsc` at some time since the host's was `before`."""
    assert (tsc - before - guest.vcpu.get_tsc_offset()) & U64 <= silicon.tsc() - before


def test_stages_of_tsc_msrs_test(guest: Reader) -> None:
    created = State(guest)
    assert created.adjust == guest_reads(guest, IA32_TSC_ADJUST) == 0

    start = silicon.tsc()  # the guest writes its TSC: TSC_ADJUST moves by as much
    guest_writes(guest, IA32_TSC, STEP)
    offset_after(guest, STEP, start)
    written = State(guest)
    assert written.adjust == written.offset - created.offset & U64

    guest_writes(guest, IA32_TSC_ADJUST, 2 * STEP)  # the guest writes TSC_ADJUST: the TSC moves by the change
    adjusted = State(guest)
    assert (adjusted.adjust, adjusted.offset) == (2 * STEP, written.offset + 2 * STEP - written.adjust & U64)

    start = silicon.tsc()  # the host writes the TSC: TSC_ADJUST stays
    guest.vcpu.set_msrs({IA32_TSC: HOST_STEP})
    offset_after(guest, HOST_STEP, start)
    moved = State(guest)
    assert moved.adjust == guest_reads(guest, IA32_TSC_ADJUST) == 2 * STEP

    guest.vcpu.set_msrs({IA32_TSC_ADJUST: 123456})  # the host writes TSC_ADJUST: the TSC stays
    assert (State(guest).adjust, State(guest).offset) == (guest_reads(guest, IA32_TSC_ADJUST), moved.offset) == (123456, moved.offset)

    start = silicon.tsc()  # both together again
    guest_writes(guest, IA32_TSC, 4 * STEP)
    offset_after(guest, 4 * STEP, start)
    last = State(guest)
    assert last.adjust - 123456 & U64 == last.offset - moved.offset & U64
    guest_writes(guest, IA32_TSC_ADJUST, 0)
    assert State(guest).offset == last.offset - last.adjust & U64


def often(code: bytes) -> bytes:
    """mov esi, 50; 1: code; dec esi; jnz 1b"""
    return b"\xbe\x32\0\0\0" + code + b"\xff\xce\x75" + struct.pack("b", -len(code) - 4)


@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
@pytest.mark.parametrize("tier", ["interpreter", "auto", "translator"])
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("rate", [1, 3])
def test_every_way_to_read_is_host_tsc_times_ratio_plus_offset(cpu: str, tier: str, name: str, rate: int) -> None:
    guest = Reader(kvm.System(silicon.Model(cpu, {}, None, tier)))
    try:
        guest.vcpu.set_tsc_khz(rate * silicon.tsc_khz())
        for offset in (0, 1 << 48, -(1 << 40) & U64):
            guest.vcpu.set_tsc_offset(offset)
            before = silicon.tsc()
            tsc = execute(guest, often(READERS[name] + JOIN), rcx=IA32_TSC)
            assert (tsc - rate * before - offset) & U64 <= rate * (silicon.tsc() - before)
        assert (guest.vcpu.engine_counters()["blocks_translated"] > 0) is (tier != "interpreter")
    finally:
        guest.close()


@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
@pytest.mark.parametrize("tier", ["interpreter", "auto", "translator"])
def test_in_virtual_time_it_is_so_to_the_last_cycle(cpu: str, tier: str) -> None:
    """A deterministic machine's host TSC counts instructions, RDTSC itself among them."""
    clock, rate, offset = VirtualClock(), 3, 1 << 48
    model = silicon.Model(cpu, {}, clock.tsc_khz, tier)
    turns = kvm.Turns(model, clock, seed=1)
    guest = Reader(kvm.System(model, turns=turns))
    try:
        guest.vcpu.set_tsc_khz(rate * clock.tsc_khz)
        guest.vcpu.set_tsc_offset(offset)
        turns.begin()
        with turns.taking(guest.vcpu):
            execute(guest, b"")  # the memory is mapped now
            for code, instructions in ((RDTSC + JOIN, 1), (often(RDTSC + JOIN), 1 + 49 * 6 + 1)):
                before = clock.tsc()
                tsc = execute(guest, code)
                assert tsc == rate * (before + instructions * CYCLES_PER_INSTRUCTION) + offset
    finally:
        guest.close()


def test_vcpus_of_a_rate_of_the_vms_start_together(system: kvm.System) -> None:
    """tsc_scaling_sync: twenty vCPUs of an odd rate, the first of them written to as if to synchronize, never see time go back."""
    vm = system.create_vm()
    vm.set_tsc_khz(2_345_678)
    vcpus = [vm.create_vcpu(0)]
    vcpus[0].set_msrs({IA32_TSC: 200_000_000})
    vcpus += [vm.create_vcpu(number) for number in range(1, 20)]
    assert {vcpu.get_tsc_khz() for vcpu in vcpus} == {2_345_678}
    assert len({vcpu.get_tsc_offset() for vcpu in vcpus}) == 1
    readings = [vcpu.get_msrs([IA32_TSC])[0] for _ in range(3) for vcpu in vcpus]
    assert readings == sorted(readings)
    vm.close()


def test_a_deadline_is_restored_behind_the_tsc(system: kvm.System) -> None:
    """KVM_SET_MSRS in the wrong order: a deadline that is far away by the new TSC has passed by the old one."""
    vm = system.create_vm()
    vm.create_irqchip()
    vcpu = vm.create_vcpu(0)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    lapic = vcpu.get_lapic()
    struct.pack_into("<I", lapic.regs, 0x320, 2 << 17 | 0xEC)
    struct.pack_into("<I", lapic.regs, 0xF0, 0x1FF)
    vcpu.set_lapic(lapic)
    assert vcpu.set_msrs([(IA32_TSC, 1 << 50), (0x6E0, (1 << 50) + (1 << 44))]) == 2
    assert vcpu.get_msrs([0x6E0]) == [(1 << 50) + (1 << 44)]
    vcpu.set_msrs([(0x6E0, 1 << 49)])
    assert vcpu.get_msrs([0x6E0]) == [0], "it has fired"
    vm.close()
