"""The state of a vCPU before its first instruction."""

from __future__ import annotations

import struct

import pytest

from softkvm.uapi import kvm as uapi
from softkvm.vmm import layout
from softkvm.vmm.boot import cpu, linux


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
