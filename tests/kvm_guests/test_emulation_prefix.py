"""The forced emulation prefix: instructions that a guest sends to KVM's emulator, as kvm-unit-tests do; XSETBV above all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.kvm.emulate import FORCED_EMULATION_PREFIX as FEP
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, CR4_OSXSAVE, DATA, END, PD, PDPT, PML4, STACK, Guest

DB, UD, GP = 1, 6, 13
TF = 1 << 8
XSETBV, CPUID, UD2 = b"\x0f\x01\xd1", b"\x0f\xa2", b"\x0f\x0b"
DEVICE = 1 << 30
USER_PAGE, RSP0 = 4, 4
"""Of a page table entry; offset in the TSS, which is at 0."""

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc", "epyc without NRIPS"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests on each silicon."""
    name, _, lacks = str(request.param).partition(" ")
    guests: list[Guest] = []

    def make(code: bytes, prefix: bool = True, **registers: int) -> Guest:
        system = kvm.System(silicon.Model(name, {"nrip-save": False} if lacks else {}), kvm.Parameters(force_emulation_prefix=prefix))
        guests.append(Guest(system, code, **registers))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


def test_without_the_parameter_the_prefix_is_undefined(boot: Boot) -> None:
    event = boot(FEP + CPUID + END, prefix=False).run().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE)


def test_undefined_instructions_of_the_guest_stay_its_own(boot: Boot) -> None:
    for code in (UD2, UD2 + b"kvx", FEP + UD2):
        event = boot(code).run().event
        assert event is not None
        assert (event.vector, event.rip) == (UD, CODE + len(code) - len(UD2) if code.startswith(FEP) else CODE)


def test_prefixes_do_not_nest(boot: Boot) -> None:
    event = boot(FEP * 2000 + END).run().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE + len(FEP))


def test_intercepted_instruction(boot: Boot) -> None:
    code = FEP + b"\x2e\x67" + CPUID
    guest = boot(code + END, rax=0x4000_0000)
    assert guest.run().event is None
    assert (guest.vcpu.get_regs().rbx, guest.vcpu.get_regs().rip) == (0x4B4D_564B, CODE + len(code))


def test_instruction_of_the_silicon_and_the_trap_behind_it(boot: Boot) -> None:
    code = FEP + b"\x48\x89\x03"  # mov [rbx], rax
    guest = boot(code + b"\x90" + END, rax=0x1234, rbx=DATA, rflags=2 | TF)
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip) == (DB, CODE + len(code))
    assert bytes(guest.ram[DATA : DATA + 2]) == b"\x34\x12"


def test_fault_of_the_instruction(boot: Boot) -> None:
    event = boot(FEP + b"\x48\x8b\x03", rbx=1 << 63).run().event  # mov rax, [rbx]
    assert event is not None
    assert (event.vector, event.rip) == (GP, CODE + len(FEP))


def xsetbv(boot: Boot, value: int, rcx: int) -> Guest:
    return boot(FEP + XSETBV + END, rax=value & 0xFFFF_FFFF, rdx=value >> 32, rcx=rcx)


@pytest.mark.parametrize(("value", "rcx"), [(1, 0), (3, 0), (3, 0xABCD << 32)])
def test_xsetbv_sets_xcr0(boot: Boot, value: int, rcx: int) -> None:
    guest = xsetbv(boot, value, rcx)
    assert guest.run().event is None
    assert guest.vcpu.get_xcrs().xcrs[0].value == value
    assert guest.vcpu.get_regs().rip == CODE + len(FEP + XSETBV)


@pytest.mark.parametrize(
    ("value", "rcx"),
    [
        (3, 1),
        (3, 63),
        (0, 0),
        (2, 0),
        (5, 0),
        (1 | 1 << 62, 0),
        (1 | 1 << 3, 0),
        (1 | 1 << 4, 0),
        (7 | 1 << 5, 0),
        (3 | 7 << 5, 0),
        (1 | 1 << 17, 0),
    ],
)
def test_xsetbv_refuses(boot: Boot, value: int, rcx: int) -> None:
    guest = xsetbv(boot, value, rcx)
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip, event.error) == (GP, CODE + len(FEP), 0)
    assert guest.vcpu.get_xcrs().xcrs[0].value == 1


def test_xsetbv_without_osxsave_is_undefined_whatever_the_operands(boot: Boot) -> None:
    for rcx in (0, 1):
        guest = xsetbv(boot, 3, rcx)
        sregs = guest.vcpu.get_sregs()
        sregs.cr4 &= ~CR4_OSXSAVE
        guest.vcpu.set_sregs(sregs)
        event = guest.run().event
        assert event is not None
        assert (event.vector, event.rip) == (UD, CODE + len(FEP))


def test_xsetbv_is_the_kernels(boot: Boot) -> None:
    guest = xsetbv(boot, 3, 0)
    for table in (PML4, PDPT, PD):
        guest.ram[table] |= USER_PAGE
    sregs = guest.vcpu.get_sregs()
    sregs.cs.dpl = sregs.ss.dpl = 3
    sregs.cs.selector |= 3
    sregs.ss.selector |= 3
    guest.vcpu.set_sregs(sregs)
    guest.ram[RSP0 : RSP0 + 8] = STACK.to_bytes(8, "little")
    event = guest.run().event
    assert event is not None
    assert (event.vector, event.rip, event.error) == (GP, CODE + len(FEP), 0)
    assert guest.vcpu.get_xcrs().xcrs[0].value == 1


def test_device_memory(boot: Boot) -> None:
    guest = boot(FEP + b"\x8b\x03" + END, rbx=DEVICE)  # mov eax, [rbx]
    guest.ram[0x2008:0x2010] = (DEVICE | 0x83).to_bytes(8, "little")  # a PDPTE of 1 GB
    guest.vcpu.run()
    run = guest.vcpu.kvm_run
    assert (run.exit_reason, run.mmio.phys_addr, run.mmio.len) == (uapi.KVM_EXIT_MMIO, DEVICE, 4)
    run.mmio.data[:4] = list(b"\x11\x22\x33\x44")
    assert guest.run().event is None
    assert guest.vcpu.get_regs().rax == 0x4433_2211
