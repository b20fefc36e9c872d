"""Writes to a read-only memory slot: the silicon reads it as RAM, and KVM's emulator makes an exit to user space of each write.

Answers to Linux 6.1 `Documentation/virt/kvm/api.rst`, 4.35 (KVM_MEM_READONLY).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, DATA, END, PDPT, Guest

ROM, SIZE = 1 << 30, 0x1000
LARGE_PAGE = 0x83
CONTENT = 0x1122_3344_5566_7788

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests with a ROM that is mapped at its own address."""
    guests: list[Guest] = []
    roms = []

    def make(code: bytes, **registers: int) -> Guest:
        guest = Guest(kvm.System(silicon.Model(request.param)), code + END, **registers)
        guests.append(guest)
        rom = kvm.allocate_memory(SIZE)
        roms.append(rom)
        memoryview(rom)[:8] = CONTENT.to_bytes(8, "little")
        region = uapi.UserspaceMemoryRegion(
            slot=1, flags=uapi.KVM_MEM_READONLY, guest_phys_addr=ROM, memory_size=SIZE, userspace_addr=rom.address
        )
        guest.vm.set_user_memory_region(region)
        guest.ram[PDPT + 8 : PDPT + 16] = (ROM | LARGE_PAGE).to_bytes(8, "little")
        return guest

    yield make
    for guest in guests:
        guest.close()


def writes(guest: Guest) -> list[tuple[int, bytes]]:
    """Run to the end; the writes that came to user space, and no reads."""
    found: list[tuple[int, bytes]] = []
    run = guest.vcpu.kvm_run
    while True:
        guest.vcpu.run()
        if run.exit_reason != uapi.KVM_EXIT_MMIO:
            assert run.exit_reason == uapi.KVM_EXIT_IO
            return found
        assert run.mmio.is_write
        found.append((run.mmio.phys_addr, bytes(run.mmio.data[: run.mmio.len])))


def rom_is_as_it_was(guest: Guest) -> bool:
    return bool(guest.vm.mmu.read(ROM, 8) == CONTENT.to_bytes(8, "little"))


def test_reads_are_those_of_ram(boot: Boot) -> None:
    guest = boot(b"\x48\x8b\x03", rbx=ROM)  # mov rax, [rbx]
    assert writes(guest) == []
    assert guest.vcpu.get_regs().rax == CONTENT


@pytest.mark.parametrize(
    ("code", "written"),
    [
        (b"\x66\x89\x03", b"\x02\x01"),  # mov [rbx], ax
        (b"\x48\x89\x03", b"\x02\x01\0\0\0\0\0\0"),  # mov [rbx], rax
        (b"\x01\x03", b"\x8a\x78\x66\x55"),  # add [rbx], eax
        (b"\xf0\x01\x03", b"\x8a\x78\x66\x55"),  # lock add [rbx], eax
        (b"\x86\x03", b"\x02"),  # xchg [rbx], al
    ],
    ids=["mov of 2", "mov of 8", "add", "lock add", "xchg"],
)
def test_a_write_is_an_exit(boot: Boot, code: bytes, written: bytes) -> None:
    guest = boot(code, rbx=ROM, rax=0x102)
    assert writes(guest) == [(ROM, written)]
    assert rom_is_as_it_was(guest)
    assert guest.vcpu.get_regs().rip == CODE + len(code)


def test_a_repeated_string_makes_an_exit_of_each_element(boot: Boot) -> None:
    guest = boot(b"\xf3\xa4", rsi=DATA, rdi=ROM + 2, rcx=3)  # rep movsb
    guest.ram[DATA : DATA + 3] = b"abc"
    assert writes(guest) == [(ROM + 2, b"a"), (ROM + 3, b"b"), (ROM + 4, b"c")]
    assert rom_is_as_it_was(guest)
    regs = guest.vcpu.get_regs()
    assert (regs.rsi, regs.rdi, regs.rcx) == (DATA + 3, ROM + 5, 0)
