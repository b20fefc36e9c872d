"""Hardware task switches, as code of a 32-bit guest: CALL, JMP and IRET between two tasks, and task gates."""

from __future__ import annotations

import struct

import pytest

from softkvm.uapi import kvm as uapi
from tests.helpers.hosts import Host
from tests.helpers.long_guest import CODE, END, GDT, HANDLER_SIZE, HANDLERS, IDT, STACK, Event, Guest
from tests.kvm_guests.conftest import Boot

TS, GP = 10, 13
CODE_32, DATA_32, OWN, OTHER = 8, 16, 24, 32
OWN_TSS, OTHER_TSS = 0x7000, 0x7200
OTHER_CODE, OTHER_STACK = CODE + 0x100, STACK - 0x1000
AVAILABLE, BUSY = 0x89, 0x8B
NT, CR0_TS = 1 << 14, 1 << 3
CALL = b"\x9a" + struct.pack("<IH", 0, OTHER)
JMP = b"\xea" + struct.pack("<IH", 0, OTHER)
IRET = b"\xcf"
RDMSR_OF_NONE = b"\xb9\x78\x56\x34\x12\x0f\x32"


@pytest.fixture(params=[Host("cascadelake", True, True), Host("epyc", True, True), Host("epyc", False, True)], ids=str)
def host(request: pytest.FixtureRequest) -> Host:
    """Both vendors' silicon, with and without the address of the next instruction."""
    assert isinstance(request.param, Host)
    return request.param


def descriptor(base: int, limit: int, access: int, flags: int = 0) -> int:
    low = limit & 0xFFFF | (base & 0xFF_FFFF) << 16 | access << 40
    return low | (limit >> 16 | flags << 4) << 48 | base >> 24 << 56


def start(boot: Boot, host: Host, code: bytes, other: bytes, limit: int = 0x67) -> Guest:
    """A guest in protected mode without paging, in its own task, with another one beside it."""
    guest = boot(host, code, rax=0x11)
    flat = [0, descriptor(0, 0xFFFFF, 0x9B, 0xC), descriptor(0, 0xFFFFF, 0x93, 0xC)]
    tasks = [descriptor(OWN_TSS, 0x67, BUSY), descriptor(OTHER_TSS, limit, AVAILABLE)]
    guest.ram[GDT : GDT + 40] = struct.pack("<5Q", *flat, *tasks)
    guest.ram[OTHER_CODE : OTHER_CODE + len(other)] = other
    registers = struct.pack("<10I", OTHER_CODE, 2, 0x22, 0, 0, 0, OTHER_STACK, 0, 0, 0)
    selectors = struct.pack("<6I", *(CODE_32 if number == 1 else DATA_32 for number in range(6)))
    guest.ram[OTHER_TSS + 32 : OTHER_TSS + 100] = registers + selectors + bytes(4)
    for vector in range(32):
        handler = HANDLERS + vector * HANDLER_SIZE
        guest.ram[IDT + vector * 8 : IDT + vector * 8 + 8] = struct.pack("<HHBBH", handler, CODE_32, 0, 0x8E, 0)
    sregs = guest.vcpu.get_sregs()
    sregs.cs = uapi.Segment(selector=CODE_32, limit=0xFFFF_FFFF, type=0xB, present=1, s=1, db=1, g=1)
    sregs.tr = uapi.Segment(selector=OWN, base=OWN_TSS, limit=0x67, type=0xB, present=1)
    sregs.gdt.base, sregs.gdt.limit = GDT, 39
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x31, 0, 0, 0
    guest.vcpu.set_sregs(sregs)
    return guest


def word(guest: Guest, address: int) -> int:
    return int(struct.unpack_from("<I", guest.ram, address)[0])


def access(guest: Guest, selector: int) -> int:
    return int(guest.ram[GDT + selector + 5])


def test_call_nests_a_task(boot: Boot, host: Host) -> None:
    guest = start(boot, host, CALL, END)
    assert guest.run().event is None
    state, sregs = guest.vcpu.get_regs(), guest.vcpu.get_sregs()
    assert (state.rax, state.rsp, state.rflags & NT, sregs.cr0 & CR0_TS) == (0x22, OTHER_STACK, NT, CR0_TS)
    assert (sregs.tr.selector, sregs.tr.base) == (OTHER, OTHER_TSS)
    assert (word(guest, OWN_TSS + 32), word(guest, OWN_TSS + 40)) == (CODE + len(CALL), 0x11)
    assert (word(guest, OTHER_TSS) & 0xFFFF, access(guest, OWN), access(guest, OTHER)) == (OWN, BUSY, BUSY)


def test_iret_goes_back(boot: Boot, host: Host) -> None:
    guest = start(boot, host, CALL + END, IRET)
    assert guest.run().event is None
    state = guest.vcpu.get_regs()
    assert (state.rax, state.rip, state.rflags & NT) == (0x11, CODE + len(CALL), 0)
    assert (access(guest, OWN), access(guest, OTHER)) == (BUSY, AVAILABLE)
    assert word(guest, OTHER_TSS + 36) & NT == 0


def test_jmp_leaves_the_old_task_for_good(boot: Boot, host: Host) -> None:
    guest = start(boot, host, JMP, END)
    assert guest.run().event is None
    assert guest.vcpu.get_regs().rflags & NT == 0
    assert (access(guest, OWN), access(guest, OTHER)) == (AVAILABLE, BUSY)


def test_an_exception_through_a_task_gate_brings_its_error_code(boot: Boot, host: Host) -> None:
    guest = start(boot, host, RDMSR_OF_NONE, END)
    guest.ram[IDT + GP * 8 : IDT + GP * 8 + 8] = struct.pack("<HHBBH", 0, OTHER, 0, 0x85, 0)
    assert guest.run().event is None
    assert (guest.vcpu.get_regs().rsp, word(guest, OTHER_STACK - 4)) == (OTHER_STACK - 4, 0)
    assert word(guest, OWN_TSS + 32) == CODE + 5, "the instruction that faulted runs again"


def test_a_short_tss_is_refused(boot: Boot, host: Host) -> None:
    guest = start(boot, host, CALL + END, END, limit=0x66)
    assert guest.run().event == Event(TS, *guest_frame(guest))
    assert access(guest, OTHER) == AVAILABLE


def guest_frame(guest: Guest) -> tuple[int, int, int]:
    """RIP, RFLAGS and error code as `Guest` reads them from a stack of 64-bit words."""
    frame = guest.vcpu.get_regs().rsp
    error, rip, _cs, rflags = struct.unpack_from("<4Q", guest.ram, frame)
    assert word(guest, frame) == OTHER
    return rip, rflags, error
