"""CPUID as the VMM completes it."""

from __future__ import annotations

import pytest

from softkvm.uapi import kvm as uapi
from softkvm.vmm import cpuid
from softkvm.vmm.cpuid import Identity

HYPERVISOR, TSC_DEADLINE, HTT = 1 << 31, 1 << 24, 1 << 28


def leaf(function: int, index: int = 0, **registers: int) -> uapi.CpuidEntry2:
    return uapi.CpuidEntry2(function=function, index=index, **registers)


INTEL = [
    leaf(0, eax=0x16),
    leaf(1, eax=0x50657, ebx=0x07100800, ecx=0x1, edx=HTT | 1),
    leaf(4, 0, eax=0xFC004121),
    leaf(4, 3, eax=0xFC01C163),
    leaf(4, 4, eax=0),
    leaf(0xB, 0, eax=1, ebx=2, edx=77),
    leaf(0x1F, 0, eax=1),
    leaf(0x80000007, edx=0x100),
    leaf(0x80000008, eax=0x302E),
]
AMD = [leaf(1), leaf(0x80000008, ecx=0x4007), leaf(0x8000001E, eax=9, ebx=9, ecx=9)]


def identify(
    entries: list[uapi.CpuidEntry2], apic_id: int = 0, cpus: int = 1, invariant_tsc: bool = False, without: frozenset[str] = frozenset()
) -> dict[tuple[int, int], uapi.CpuidEntry2]:
    identity = Identity(apic_id, cpus, invariant_tsc, without)
    return {(entry.function, entry.index): entry for entry in cpuid.identify(entries, identity)}


def test_a_guest_sees_a_hypervisor() -> None:
    assert identify(INTEL)[1, 0].ecx == 1 | HYPERVISOR


def test_features_of_kvm_itself_can_be_switched_off() -> None:
    entries = [leaf(1, ecx=1 | 1 << 21 | TSC_DEADLINE), leaf(7, ebx=2, edx=1 << 29)]
    assert identify(entries)[1, 0].ecx == 1 | 1 << 21 | TSC_DEADLINE | HYPERVISOR
    found = identify(entries, without=frozenset({"x2apic", "tsc-adjust", "pcid"}))
    assert found[1, 0].ecx == 1 | TSC_DEADLINE | HYPERVISOR
    assert (found[7, 0].ebx, found[7, 0].edx) == (0, 1 << 29)


def test_what_kvm_returned_is_not_changed() -> None:
    before = [bytes(entry) for entry in INTEL]
    identify(INTEL, 3, 4)
    assert [bytes(entry) for entry in INTEL] == before


@pytest.mark.parametrize(("apic_id", "cpus"), [(0, 1), (1, 2), (3, 6)])
def test_topology_leaves_agree_with_each_other(apic_id: int, cpus: int) -> None:
    leaves = identify(INTEL, apic_id, cpus)
    bits = (cpus - 1).bit_length()
    assert leaves[1, 0].ebx == apic_id << 24 | cpus << 16 | 0x0800
    assert bool(leaves[1, 0].edx & HTT) == (cpus > 1)
    assert [leaves[0xB, index].edx for index in range(3)] == [apic_id] * 3
    assert [leaves[0xB, index].ecx for index in range(3)] == [0x100, 0x201, 2]
    assert (leaves[0xB, 1].eax, leaves[0xB, 1].ebx) == (bits, cpus)
    assert leaves[4, 0].eax >> 26 == (1 << bits) - 1
    assert leaves[4, 0].eax >> 14 & 0xFFF == 0  # first level: not shared
    assert leaves[4, 3].eax >> 14 & 0xFFF == cpus - 1  # third level: shared by all
    assert leaves[4, 4].eax == 0
    assert (0x1F, 0) not in leaves
    assert leaves[0x80000008, 0].ecx == 0


def test_amd_topology() -> None:
    leaves = identify(AMD, 2, 4)
    assert leaves[0x80000008, 0].ecx == 2 << 12 | 3
    assert (leaves[0x8000001E, 0].eax, leaves[0x8000001E, 0].ebx) == (2, 2)
    assert (0xB, 0) not in leaves


def test_the_tsc_is_called_invariant_only_on_demand() -> None:
    assert identify(INTEL)[0x80000007, 0].edx == 0
    assert identify(INTEL, invariant_tsc=True)[0x80000007, 0].edx == 0x100
