"""INS and OUTS: batches (as the kernel's userspace_io_test), widths, devices on both sides, and what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softkvm import silicon
from softkvm.host import trace
from softkvm.kvm import Vcpu, Vm, events
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.fake_engine import as_bytes
from tests.kvm.conftest import Script
from tests.kvm.guest import Latch, leave, out_of_guest

RIP = 0x1000
PORT = 0x3F8
APIC_TPR = 0xFEE0_0080
IN, STRING, REP, ADDRESS32, ADDRESS64, DOWN = 1, 2, 4, 8, 16, 32


def io(vcpu: Vcpu, flags: int, size: int = 1, length: int = 1, count: int = 1, gla: int = 0) -> fake_engine.Step:
    return leave(vcpu, "io", length, io_port=PORT, io_size=size, io_flags=flags, io_count=count, io_gla=gla)


@pytest.fixture(autouse=True)
def at_rip(vcpu: Vcpu) -> None:
    vcpu.state.rip = RIP


def test_devices_in_the_kernel(vcpu: Vcpu, vm: Vm, ram: object, play: Script) -> None:
    latch = Latch()
    vm.pio_bus.register(PORT, 1, latch)
    vcpu.gpr[1], vcpu.gpr[7] = 3, 0x2000
    out_of_guest(vcpu, play, io(vcpu, IN | STRING | REP | ADDRESS64, count=3, gla=0x2000))
    assert bytes(as_bytes(ram)[0x2000:0x2003]) == b"\x41\x42\x43"
    assert (vcpu.gpr[1], vcpu.gpr[7], vcpu.state.rip) == (0, 0x2003, RIP + 1)
    vcpu.gpr[1], vcpu.gpr[6] = 2, 0x2001
    out_of_guest(vcpu, play, io(vcpu, STRING | REP | ADDRESS64 | DOWN, count=2, gla=0x2001))
    assert (latch.written, vcpu.gpr[6]) == ([0x42, 0x41], 0x1FFF)


def test_rep_ins_comes_in_batches_of_1024_bytes(vcpu: Vcpu, ram: object, play: Script) -> None:
    flags = IN | STRING | REP | ADDRESS64
    total, address, exits = 8192, 0x4000, 0
    vcpu.gpr[1], vcpu.gpr[7] = total, address
    while vcpu.gpr[1]:
        play(io(vcpu, flags, count=vcpu.gpr[1], gla=vcpu.gpr[7]))
        vcpu.run()
        assert vcpu.kvm_run.io.count == 1024
        vcpu.mmap_area[4096 : 4096 + 1024] = bytes([exits + 1]) * 1024
        exits += 1
        vcpu.kvm_run.immediate_exit = 1
        with pytest.raises(InterruptedError):
            vcpu.run()
        vcpu.kvm_run.immediate_exit = 0
    assert exits == 8
    assert bytes(as_bytes(ram)[address : address + total]) == b"".join(bytes([index + 1]) * 1024 for index in range(8))
    assert vcpu.state.rip == RIP + 1


@pytest.mark.parametrize(("wanted", "left_by_user", "stored"), [(2, 1, 1), (3, 8192, 3)])
def test_user_space_may_rewrite_the_count(vcpu: Vcpu, ram: object, play: Script, wanted: int, left_by_user: int, stored: int) -> None:
    vcpu.gpr[1], vcpu.gpr[7] = wanted, 0x3000
    play(io(vcpu, IN | STRING | REP | ADDRESS64, count=wanted, gla=0x3000))
    vcpu.run()
    vcpu.mmap_area[4096:4104] = b"\xaa" * 8
    regs = vcpu.get_regs()
    regs.rcx = left_by_user
    vcpu.set_regs(regs)
    out_of_guest(vcpu, play)
    assert bytes(as_bytes(ram)[0x3000:0x3008]) == b"\xaa" * stored + bytes(8 - stored)
    assert vcpu.gpr[7] == 0x3000 + stored


def test_element_across_pages_and_16_bit_addresses(vcpu: Vcpu, ram: object, play: Script) -> None:
    as_bytes(ram)[0x2FFE:0x3002] = b"\x01\x02\x03\x04"
    vcpu.gpr[6] = 0xABCD_2FFE
    play(io(vcpu, STRING, 4, gla=0x2FFE))
    vcpu.run()
    assert bytes(vcpu.mmap_area[4096:4100]) == b"\x01\x02\x03\x04"
    out_of_guest(vcpu, play)
    assert vcpu.gpr[6] == 0xABCD_3002


def test_string_to_unmapped_memory_is_a_page_fault(vcpu: Vcpu, ram: object, play: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vcpu, "translate_gva", lambda gva, access: None)
    vcpu.state.cr0 |= 1
    out_of_guest(vcpu, play, io(vcpu, IN | STRING | ADDRESS64, 2, gla=0x2FFF))
    core = fake_engine.Core.cores[-1]
    assert core.injected == [1 << 31 | 1 << 11 | 3 << 8 | events.PF]
    assert (vcpu.state.cr2, vcpu.control.event_error, vcpu.state.rip) == (0x2FFF, 2, RIP)


def test_rep_with_count_zero_is_stepped_over(vcpu: Vcpu, play: Script) -> None:
    out_of_guest(vcpu, play, io(vcpu, IN | STRING | REP, 2, length=3, count=0))
    assert vcpu.state.rip == RIP + 3


def test_ins_to_a_device_takes_both_ways_through_user_space(vcpu: Vcpu, play: Script) -> None:
    device = 0xFF00_0000
    vcpu.gpr[1], vcpu.gpr[7] = 2, device
    play(io(vcpu, IN | STRING | REP | ADDRESS64, count=2, gla=device))
    shared = vcpu.kvm_run
    vcpu.run()
    assert (shared.exit_reason, shared.io.direction, shared.io.count) == (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_IO_IN, 1)
    vcpu.mmap_area[4096] = 0x99
    vcpu.run()
    assert (shared.exit_reason, shared.mmio.phys_addr, shared.mmio.len, shared.mmio.is_write) == (uapi.KVM_EXIT_MMIO, device, 1, 1)
    assert shared.mmio.data[0] == 0x99
    out_of_guest(vcpu, play)
    assert (vcpu.gpr[1], vcpu.gpr[7], vcpu.state.rip) == (1, device + 1, RIP)


def test_outs_from_a_device_takes_both_ways_through_user_space(vcpu: Vcpu, play: Script) -> None:
    device = 0xFF00_0000
    vcpu.gpr[6] = device
    play(io(vcpu, STRING | ADDRESS64, size=2, length=2, gla=device))
    shared = vcpu.kvm_run
    vcpu.run()
    assert (shared.exit_reason, shared.mmio.phys_addr, shared.mmio.len, shared.mmio.is_write) == (uapi.KVM_EXIT_MMIO, device, 2, 0)
    shared.mmio.data[:2] = [0x34, 0x12]
    vcpu.run()
    assert (shared.exit_reason, shared.io.direction, shared.io.size) == (uapi.KVM_EXIT_IO, uapi.KVM_EXIT_IO_OUT, 2)
    assert bytes(vcpu.mmap_area[4096:4098]) == b"\x34\x12"
    out_of_guest(vcpu, play)
    assert (vcpu.gpr[6], vcpu.state.rip) == (device + 2, RIP + 2)


def test_the_local_apic_is_memory_for_them_too(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    latch = Latch()
    vm.pio_bus.register(PORT, 1, latch)
    vcpu.gpr[7] = APIC_TPR
    out_of_guest(vcpu, play, io(vcpu, IN | STRING | ADDRESS64, size=4, gla=APIC_TPR))
    assert vcpu.state.cr8 == 4
    vcpu.gpr[6] = APIC_TPR
    out_of_guest(vcpu, play, io(vcpu, STRING | ADDRESS64, size=4, gla=APIC_TPR))
    assert latch.written == [0x41]


def test_ins_to_a_read_only_slot_is_mmio(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    rom = silicon.allocate(4096)
    vm.set_user_memory_region(
        uapi.UserspaceMemoryRegion(flags=uapi.KVM_MEM_READONLY, guest_phys_addr=0xF000, memory_size=rom.size, userspace_addr=rom.address)
    )
    vm.pio_bus.register(PORT, 1, Latch())
    play(io(vcpu, IN | STRING | ADDRESS64, gla=0xF004))
    vcpu.run()
    mmio = vcpu.kvm_run.mmio
    assert (vcpu.kvm_run.exit_reason, mmio.phys_addr, mmio.is_write, mmio.data[0]) == (uapi.KVM_EXIT_MMIO, 0xF004, 1, 0x41)
    assert bytes(as_bytes(rom)[4:5]) == b"\0"


@pytest.fixture
def pio() -> Iterator[list[tuple[int, ...]]]:
    """The kvm_pio events."""
    hits: list[tuple[int, ...]] = []
    probe = lambda *values: hits.append(values)  # noqa: E731
    trace.kvm_pio.register(probe)
    yield hits
    trace.kvm_pio.unregister(probe)


def test_batches_are_traced(vcpu: Vcpu, ram: object, play: Script, pio: list[tuple[int, ...]]) -> None:
    as_bytes(ram)[0x2000:0x2003] = b"abc"
    vcpu.gpr[1], vcpu.gpr[6] = 3, 0x2000
    play(io(vcpu, STRING | REP | ADDRESS64, count=3, gla=0x2000))
    vcpu.run()
    assert pio == [(uapi.KVM_EXIT_IO_OUT, PORT, 1, 3, ord("a"))]
