"""The state of a vCPU before its first instruction."""

from __future__ import annotations

import struct

import pytest

from softkvm.uapi import kvm as uapi
from softkvm.vmm import layout
from softkvm.vmm.boot import cpu, linux

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
    leaf(0x80000008, eax=0x302E),
]
AMD = [leaf(1), leaf(0x80000008, ecx=0x4007), leaf(0x8000001E, eax=9, ebx=9, ecx=9)]


def identify(entries: list[uapi.CpuidEntry2], apic_id: int = 0, cpus: int = 1) -> dict[tuple[int, int], uapi.CpuidEntry2]:
    return {(entry.function, entry.index): entry for entry in cpu.cpuid(entries, apic_id, cpus, tsc_deadline=True)}


def test_a_guest_sees_a_hypervisor_and_the_deadline_timer() -> None:
    assert identify(INTEL)[1, 0].ecx == 1 | HYPERVISOR | TSC_DEADLINE
    assert cpu.cpuid(INTEL, 0, 1, tsc_deadline=False)[1].ecx == 1 | HYPERVISOR


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


def test_firmware_msrs() -> None:
    assert cpu.msrs(0x1800) == {0x1A0: 0x1801, 0x2FF: 0x806}


@pytest.mark.parametrize(("boot_cpu", "lint0"), [(True, 0x700), (False, 0x10000)])
def test_local_apic_pins(boot_cpu: bool, lint0: int) -> None:
    state = uapi.LapicState()
    for register in (0x350, 0x360):
        struct.pack_into("<I", state.regs, register, 0x10000)
    cpu.wire_lapic(state, boot_cpu)
    assert struct.unpack_from("<I", bytes(state.regs), 0x350)[0] == lint0
    assert struct.unpack_from("<I", bytes(state.regs), 0x360)[0] == 0x400


def test_entry_follows_the_64_bit_boot_protocol() -> None:
    regs, sregs = cpu.entry_registers(0x1000200), uapi.Sregs()
    cpu.enter_long_mode(sregs)
    assert (regs.rip, regs.rsi, regs.rflags) == (0x1000200, layout.ZERO_PAGE.base, 2)
    assert layout.BOOT_STACK.base < regs.rsp <= layout.BOOT_STACK.end
    assert (sregs.cs.selector, sregs.ss.selector, sregs.ds.selector, sregs.es.selector) == (0x10, 0x18, 0x18, 0x18)
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.type) == (1, 0, 0xB)
    assert sregs.efer == 0x500
    assert sregs.cr0 & 0x80000001 == 0x80000001
    assert sregs.cr4 & 0x20
    assert sregs.cr3 == layout.BOOT_PAGE_TABLES.base
    assert sregs.gdt.limit == len(linux.GDT) - 1


def test_gdt_in_memory_agrees_with_the_segment_registers() -> None:
    sregs = uapi.Sregs()
    cpu.enter_long_mode(sregs)
    for segment in (sregs.cs, sregs.ds):
        descriptor = struct.unpack_from("<Q", linux.GDT, segment.selector)[0]
        assert descriptor >> 40 & 0xF == segment.type
        assert (descriptor >> 53 & 1, descriptor >> 54 & 1, descriptor >> 55 & 1) == (segment.l, segment.db, segment.g)
        assert (descriptor >> 44 & 1, descriptor >> 47 & 1) == (segment.s, segment.present)
