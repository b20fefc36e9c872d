"""VMCALL on AMD's silicon and VMMCALL on Intel's: undefined there, so KVM stores the silicon's own hypercall over them.

Answers to Linux 6.1 `em_hypercall()` and `emulator_fix_hypercall()`; a guest comes to this when it has moved to a host of the other vendor.
"""

from __future__ import annotations

import struct

import pytest

from softkvm.kvm.hypercall import VMCALL, VMMCALL
from softkvm.uapi import kvm as uapi
from tests.helpers.hosts import HOSTS, Host
from tests.helpers.long_guest import CODE, END, PD, PDPT, PML4, STACK, Guest
from tests.kvm_guests.conftest import Boot

UD, GP, PF = 6, 13, 14
OWN = {"intel": VMCALL, "amd": VMMCALL}
FOREIGN = {"intel": VMMCALL, "amd": VMCALL}
UNKNOWN_CALL, ENOSYS = 99, (1 << 64) - 1000
PT, RSP0 = 0x7000, 4
PRESENT, WRITABLE, USER = 1, 2, 4
LOCK, CR0_WP = b"\xf0", 1 << 16

each_host = pytest.mark.parametrize("host", HOSTS, ids=str)


def map_pages(guest: Guest, unwritable: int, rights: int = PRESENT | WRITABLE) -> None:
    """Map RAM in pages of 4 KB with `rights`, one of them without writing, which counts for the kernel too."""
    for page in range(512):
        entry = page << 12 | (rights & ~WRITABLE if page == unwritable >> 12 else rights)
        struct.pack_into("<Q", guest.ram, PT + page * 8, entry)
    for table, below in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
        struct.pack_into("<Q", guest.ram, table, below | rights)
    sregs = guest.vcpu.get_sregs()
    sregs.cr0 |= CR0_WP
    guest.vcpu.set_sregs(sregs)


def to_user_mode(guest: Guest) -> None:
    sregs = guest.vcpu.get_sregs()
    for segment in (sregs.cs, sregs.ss):
        segment.dpl = 3
        segment.selector |= 3
    guest.vcpu.set_sregs(sregs)
    struct.pack_into("<Q", guest.ram, RSP0, STACK)  # in the TSS, which is at 0


@each_host
@pytest.mark.parametrize("prefix", [b"", b"\x2e\x67", b"\x48"])
def test_the_other_vendors_hypercall_becomes_the_silicons_own(boot: Boot, host: Host, prefix: bytes) -> None:
    code = prefix + FOREIGN[host.vendor]
    guest = boot(host, code + END, rax=UNKNOWN_CALL)
    undefined = "EXCP_6" if host.vendor == "amd" else "EXCEPTION_NMI"
    for _ in range(2):
        assert guest.run().event is None
        regs = guest.vcpu.get_regs()
        assert (regs.rax, regs.rip) == (ENOSYS, CODE + len(code))
        assert bytes(guest.ram[CODE : CODE + len(code)]) == prefix + OWN[host.vendor]
        assert guest.vcpu.exits_by_reason()[undefined] == 1, "the second time it is the silicon's own"
        regs.rax, regs.rip = UNKNOWN_CALL, CODE
        guest.vcpu.set_regs(regs)


@each_host
def test_code_across_a_page_is_mended(boot: Boot, host: Host) -> None:
    start = CODE + 0xFFE
    guest = boot(host, b"", rip=start, rax=UNKNOWN_CALL)
    guest.ram[start : start + 3 + len(END)] = FOREIGN[host.vendor] + END
    assert guest.run().event is None
    assert guest.vcpu.get_regs().rax == ENOSYS


@each_host
def test_code_that_the_guest_may_not_write_is_a_page_fault(boot: Boot, host: Host) -> None:
    guest = boot(host, FOREIGN[host.vendor] + END, rax=UNKNOWN_CALL)
    map_pages(guest, unwritable=CODE)
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip, event.error) == (PF, CODE, PRESENT | WRITABLE)
    assert guest.vcpu.get_sregs().cr2 == CODE
    assert bytes(guest.ram[CODE : CODE + 3]) == FOREIGN[host.vendor]


@each_host
def test_code_in_read_only_memory_stays_undefined(boot: Boot, host: Host) -> None:
    guest = boot(host, FOREIGN[host.vendor] + END)
    rom = uapi.UserspaceMemoryRegion(
        slot=1, flags=uapi.KVM_MEM_READONLY, guest_phys_addr=2 << 20, memory_size=0x1000, userspace_addr=guest.memory.address + CODE
    )
    guest.vm.set_user_memory_region(rom)
    map_pages(guest, unwritable=0)
    struct.pack_into("<Q", guest.ram, PT + (CODE >> 9), 2 << 20 | PRESENT | WRITABLE)
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE)


@each_host
def test_vmcall_is_the_kernels_and_vmmcall_anybodys(boot: Boot, host: Host) -> None:
    """Of the two KVM's emulator looks at the privilege of VMCALL alone; the call itself is not for programs."""
    guest = boot(host, FOREIGN[host.vendor] + b"\xf4", rax=UNKNOWN_CALL)  # hlt, which is the kernel's
    map_pages(guest, unwritable=0, rights=PRESENT | WRITABLE | USER)
    to_user_mode(guest)
    event = guest.run().event
    assert event is not None
    refused = FOREIGN[host.vendor] == VMCALL
    assert (event.vector, event.rip, event.error) == (GP, CODE + (0 if refused else 3), 0)
    assert refused or guest.vcpu.get_regs().rax >> 8 == (1 << 64) - 1 >> 8  # -EPERM; the handler has its vector in AL


@pytest.mark.parametrize("host", [host for host in HOSTS if host.vendor == "intel"], ids=str)
@pytest.mark.parametrize("prefix", [b"\x66", b"\xf2", b"\xf3", b"\xf3\x48"])
@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
def test_a_prefix_that_makes_vmcall_undefined_keeps_it_so(boot: Boot, host: Host, prefix: bytes, instruction: bytes) -> None:
    guest = boot(host, prefix + instruction + END)
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE)
    assert guest.vcpu.exits_by_reason()["EXCEPTION_NMI"] <= 2


@each_host
def test_a_locked_one_is_undefined(boot: Boot, host: Host) -> None:
    event = boot(host, LOCK + FOREIGN[host.vendor] + END).run().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE)
