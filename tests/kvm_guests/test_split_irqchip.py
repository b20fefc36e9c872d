"""KVM_CAP_SPLIT_IRQCHIP and KVM_CAP_X86_DISABLE_EXITS on guest code: the local APICs in KVM, the other chips in user space."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm, silicon
from softkvm.uapi import kvm as uapi
from tests.helpers.long_guest import DATA, END, Guest

VECTOR, PIN = 0x31, 5
X2APIC_EOI, X2APIC_SVR, APIC_BASE = 0x80B, 0x80F, 0x1B
MSI, LEVEL_DATA, EDGE_DATA = 0xFEE0_0000, 1 << 15 | VECTOR, VECTOR
STI_HLT_EOI = b"\xfb\xf4" + b"\xb9\x0b\x08\x00\x00\x31\xc0\x31\xd2\x0f\x30" + END
"""sti; hlt; mov ecx, X2APIC_EOI; xor eax, eax; xor edx, edx; wrmsr, and the end; the handler is a port exit, which the test skips."""

Boot = Callable[..., Guest]


@pytest.fixture(params=["cascadelake", "epyc"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    """Make guests under capabilities, x2APIC on."""
    guests: list[Guest] = []

    def make(code: bytes, *caps: tuple[int, int], **registers: int) -> Guest:
        kind = type("GuestWithCaps", (Guest,), {"caps": caps})
        guest: Guest = kind(kvm.System(silicon.Model(request.param)), code, **registers)
        guests.append(guest)
        if guest.vcpu.lapic is not None:
            guest.vcpu.set_msrs({APIC_BASE: 0xFEE0_0D00})
            guest.vcpu.lapic.msr_write(X2APIC_SVR, 0x1FF)
        return guest

    yield make
    for guest in guests:
        guest.close()


def route(guest: Guest, data: int) -> None:
    entry = uapi.IrqRoutingEntry(gsi=PIN, type=uapi.KVM_IRQ_ROUTING_MSI)
    entry.msi.address_lo, entry.msi.data = MSI, data
    guest.vm.set_gsi_routing([entry])


def return_from_event(guest: Guest) -> None:
    """What IRET would do: the handler of these guests is a port exit and no more."""
    frame = guest.vcpu.get_regs().rsp
    regs = guest.vcpu.get_regs()
    regs.rip = int.from_bytes(guest.ram[frame : frame + 8], "little")
    regs.rflags = 2
    regs.rsp = int.from_bytes(guest.ram[frame + 24 : frame + 32], "little")
    guest.vcpu.set_regs(regs)


@pytest.mark.parametrize(("data", "eoi_exit"), [(LEVEL_DATA, True), (EDGE_DATA, False)])
def test_user_spaces_ioapic_hears_the_end_of_level_triggered_interrupts(boot: Boot, data: int, eoi_exit: bool) -> None:
    guest = boot(STI_HLT_EOI, (uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    route(guest, data)
    guest.vm.irq_line(PIN, 1)
    outcome = guest.run()
    assert outcome.event is not None
    assert outcome.event.vector == VECTOR
    return_from_event(guest)
    shared = guest.vcpu.kvm_run
    guest.vcpu.run()
    if eoi_exit:
        assert (shared.exit_reason, shared.eoi.vector) == (uapi.KVM_EXIT_IOAPIC_EOI, VECTOR)
        guest.vcpu.run()
    assert (shared.exit_reason, shared.io.port) == (uapi.KVM_EXIT_IO, END[1])


def test_user_spaces_pic_brings_its_vectors_itself(boot: Boot) -> None:
    guest = boot(b"\xfb\x90\x90" + END, (uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    guest.vcpu.kvm_run.request_interrupt_window = 1
    guest.vcpu.run()
    assert guest.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    guest.vcpu.kvm_run.request_interrupt_window = 0
    guest.vcpu.interrupt(0x42)
    outcome = guest.run()
    assert outcome.event is not None
    assert outcome.event.vector == 0x42


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda vm: vm.create_irqchip(), errno.EEXIST),
        (lambda vm: vm.create_pit2(uapi.PitConfig()), errno.ENOENT),
        (lambda vm: vm.get_irqchip(uapi.Irqchip()), errno.ENXIO),
        (lambda vm: vm.set_gsi_routing([uapi.IrqRoutingEntry(type=uapi.KVM_IRQ_ROUTING_IRQCHIP)]), errno.EINVAL),
        (lambda vm: vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_SPLIT_IRQCHIP, args=(24, 0, 0, 0))), errno.EEXIST),
        (lambda vm: vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_SPLIT_IRQCHIP, args=(4097, 0, 0, 0))), errno.EINVAL),
        (lambda vm: vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_X86_DISABLE_EXITS, args=(16, 0, 0, 0))), errno.EINVAL),
        (lambda vm: vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_MAX_VCPU_ID, args=(5000, 0, 0, 0))), errno.EINVAL),
        (lambda vm: vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_MAX_VCPU_ID, args=(2, 0, 0, 0))), errno.EINVAL),
    ],
)
def test_what_a_split_irqchip_does_not_have(boot: Boot, call: Callable[[kvm.Vm], object], error: int) -> None:
    guest = boot(END, (uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    with pytest.raises(OSError, match=r".") as caught:
        call(guest.vm)
    assert caught.value.errno == error


def test_the_number_of_vcpu_ids_can_be_set_once(boot: Boot) -> None:
    guest = boot(END, (uapi.KVM_CAP_MAX_VCPU_ID, 2), (uapi.KVM_CAP_MAX_VCPU_ID, 2))
    with pytest.raises(OSError, match="range"):
        guest.vm.create_vcpu(2)


def test_a_guest_that_may_halt_does_not_exit_for_it(boot: Boot) -> None:
    """No exit for HLT: the guest sleeps on its core until the interrupt is injected there."""
    disable = (uapi.KVM_CAP_X86_DISABLE_EXITS, uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE)
    guest = boot(b"\xfb\xf4" + END, disable, (uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    guest.vm.signal_msi(uapi.Msi(address_lo=MSI, data=VECTOR))
    outcome = guest.run()
    assert outcome.event is not None
    assert outcome.event.vector == VECTOR
    assert "HLT" not in guest.vcpu.exits_by_reason()


def test_mwait_that_is_not_intercepted_is_the_silicons(boot: Boot) -> None:
    guest = boot(b"\x0f\x01\xc8" + END, (uapi.KVM_CAP_X86_DISABLE_EXITS, uapi.KVM_X86_DISABLE_EXITS_MWAIT), rax=DATA)
    assert guest.run().event is None
    assert not guest.vcpu.instructions_skipped
