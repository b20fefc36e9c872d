"""System management mode on guest code: SMI from user space and from the APIC, SMRAM that only SMM sees, RSM (APM vol. 2, ch. 10)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import CODE, DATA, END, RAM_SIZE, Guest

SMBASE = 0x30000
HANDLER, AREA = SMBASE + 0x8000, SMBASE + 0xFE00
SMM_PORT = 0xB2
RSM = b"\x0f\xaa"
IN_SMM = bytes([0xB0, 0x77, 0xE6, SMM_PORT])  # mov al, 0x77; out SMM_PORT, al
NOP = b"\x90"
X2APIC_ICR, APIC_BASE, SMI_COUNT, IA32_SMBASE = 0x830, 0x1B, 0x34, 0x9E
SMI_SELF = 0x4_0200  # shorthand self, delivery mode SMI

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests whose SMRAM is memory of its own with a handler in it; outside of SMM that page has other contents."""
    guests: list[Guest] = []

    def make(code: bytes, handler: bytes = IN_SMM + RSM, caps: tuple[tuple[int, int], ...] = (), **registers: int) -> Guest:
        kind = type("GuestWithCaps", (Guest,), {"caps": caps})
        guest: Guest = kind(kvm.System(silicon.Model(request.param)), code, **registers)
        guests.append(guest)
        guest.smram = kvm.allocate_memory(RAM_SIZE)  # type: ignore[attr-defined]
        view = memoryview(guest.smram)  # type: ignore[attr-defined]
        view[HANDLER : HANDLER + len(handler)] = handler
        guest.vm.set_user_memory_region(
            uapi.UserspaceMemoryRegion(slot=1 << 16, memory_size=RAM_SIZE, userspace_addr=guest.smram.address)  # type: ignore[attr-defined]
        )
        return guest

    yield make
    for guest in guests:
        guest.close()


def smram(guest: Guest) -> memoryview:
    return memoryview(guest.smram)  # type: ignore[attr-defined]


def run_to_smm(guest: Guest) -> None:
    guest.vcpu.run()
    shared = guest.vcpu.kvm_run
    assert (shared.exit_reason, shared.io.port, guest.vcpu.pio_data[0]) == (uapi.KVM_EXIT_IO, SMM_PORT, 0x77)
    assert shared.flags == uapi.KVM_RUN_X86_SMM


def test_an_smi_comes_and_goes_without_a_trace(boot: Boot) -> None:
    guest = boot(NOP + END, rbx=0x1122_3344_5566_7788, r15=5)
    before = bytes(guest.vcpu.get_sregs())
    guest.vcpu.smi()
    assert guest.vcpu.get_vcpu_events().smi.pending
    run_to_smm(guest)
    events, sregs = guest.vcpu.get_vcpu_events(), guest.vcpu.get_sregs()
    assert (events.smi.smm, events.smi.pending, events.nmi.masked) == (1, 0, 1)
    assert (sregs.cs.selector, sregs.cs.base, sregs.cr0 & 1, sregs.efer) == (SMBASE >> 4, SMBASE, 0, 0)
    assert guest.run().event is None
    assert guest.vcpu.kvm_run.flags == 0
    assert bytes(guest.vcpu.get_sregs()) == before
    regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rbx, regs.r15) == (CODE + 1, 0x1122_3344_5566_7788, 5)
    assert guest.vcpu.get_msrs([SMI_COUNT]) == [1]


def test_the_save_area_is_amd64s_and_what_the_handler_writes_there_counts(boot: Boot) -> None:
    guest = boot(NOP + END, rbx=0xAA)
    guest.vcpu.smi()
    run_to_smm(guest)
    area = smram(guest)
    assert struct.unpack_from("<I", area, SMBASE + 0xFEFC) == (0x2_0064,)
    assert struct.unpack_from("<Q", area, SMBASE + 0xFF78) == (CODE,)  # RIP
    assert struct.unpack_from("<Q", area, SMBASE + 0xFFE0) == (0xAA,)  # RBX
    assert bytes(guest.ram[AREA : AREA + 512]) == bytes(512)  # and the guest's own memory is as it was
    struct.pack_into("<Q", area, SMBASE + 0xFFE0, 0xBB)
    struct.pack_into("<I", area, SMBASE + 0xFF00, 0x40000)  # SMBASE
    assert guest.run().event is None
    assert guest.vcpu.get_regs().rbx == 0xBB
    assert guest.vcpu.get_msrs([IA32_SMBASE]) == [0x40000]


def test_an_smi_in_smm_waits_for_rsm(boot: Boot) -> None:
    guest = boot(NOP + END)
    guest.vcpu.smi()
    run_to_smm(guest)
    guest.vcpu.smi()
    run_to_smm(guest)
    assert guest.run().event is None
    assert guest.vcpu.get_msrs([SMI_COUNT]) == [2]


def test_an_smi_through_the_apic(boot: Boot) -> None:
    code = b"\xb9\x30\x08\x00\x00\xb8" + SMI_SELF.to_bytes(4, "little") + b"\x31\xd2\x0f\x30" + END
    guest = boot(code, caps=((uapi.KVM_CAP_SPLIT_IRQCHIP, 24),))
    guest.vcpu.set_msrs({APIC_BASE: 0xFEE0_0D00})
    run_to_smm(guest)
    assert guest.run().event is None


def test_rsm_outside_of_smm_is_undefined(boot: Boot) -> None:
    outcome = boot(RSM + END).run()
    assert outcome.event is not None
    assert (outcome.event.vector, outcome.event.rip) == (6, CODE)


@pytest.mark.parametrize(("offset", "value"), [(0xFF48, 1 << 63), (0xFF58, 1 << 31), (0xFED0, 1 << 8), (0xFF60, 1 << 40)])
def test_a_state_that_no_cpu_can_be_in_is_a_shutdown(boot: Boot, offset: int, value: int) -> None:
    """CR4, CR0, EFER (without the PAE that CR0 then needs), DR7."""
    guest = boot(NOP + END)
    guest.vcpu.smi()
    run_to_smm(guest)
    if offset == 0xFED0:
        struct.pack_into("<Q", smram(guest), SMBASE + 0xFF48, 0)
    struct.pack_into("<Q", smram(guest), SMBASE + offset, value)
    guest.vcpu.run()
    assert guest.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN


def test_a_vm_without_smram_harms_itself_only(boot: Boot) -> None:
    guest = boot(NOP + END)
    guest.vm.set_user_memory_region(uapi.UserspaceMemoryRegion(slot=1 << 16))
    guest.vcpu.smi()
    guest.vcpu.run()
    assert guest.vcpu.kvm_run.exit_reason in (uapi.KVM_EXIT_MMIO, uapi.KVM_EXIT_INTERNAL_ERROR, uapi.KVM_EXIT_SHUTDOWN)


def test_smm_is_part_of_the_vcpus_events(boot: Boot) -> None:
    """What a VMM saves in SMM and restores: into SMM, with another SMI waiting."""
    guest = boot(NOP + END)
    guest.vcpu.smi()
    run_to_smm(guest)
    guest.vcpu.smi()
    events = guest.vcpu.get_vcpu_events()
    assert (events.smi.smm, events.smi.pending) == (1, 1)
    away = guest.vcpu.get_vcpu_events()
    away.smi.smm = away.smi.pending = 0
    guest.vcpu.set_vcpu_events(away)
    assert not guest.vcpu.get_vcpu_events().smi.smm
    guest.vcpu.set_vcpu_events(events)
    run_to_smm(guest)
    assert guest.run().event is None


def test_ram_at_data_is_not_what_smm_sees(boot: Boot) -> None:
    read = b"\x66\xb8" + DATA.to_bytes(4, "little") + b"\x67\x8a\x00\xe6" + bytes([SMM_PORT])  # mov eax, DATA; mov al, [eax]; out
    guest = boot(NOP + END, handler=read + RSM)
    guest.ram[DATA], smram(guest)[DATA] = 0x11, 0x77
    guest.vcpu.smi()
    run_to_smm(guest)
    assert guest.run().event is None
