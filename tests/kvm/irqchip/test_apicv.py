"""`softkvm.kvm.irqchip.apicv`: when the silicon has a local APIC, and that nothing of its state is lost on the way."""

from __future__ import annotations

import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm import Parameters, Vcpu, Vm, msr
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.lapic import Lapic
from softkvm.kvm.irqchip.lapic_registers import Reg
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import leave, out_of_guest

X2APIC, SVR, EOI, ICR = 1 << 10, 0x80F, 0x80B, 0x830
VECTOR, LOWER = 0x51, 0x31
EOI_INDUCED = {"intel": 45, "amd": 0x402}
ICR_WRITE = {"intel": 56, "amd": 0x401}


def serve(vcpu: Vcpu, play: Script) -> None:
    """Let the vCPU enter the guest once, which does what waits."""
    out_of_guest(vcpu, play)


def lapic_of(vcpu: Vcpu) -> Lapic:
    assert vcpu.lapic is not None
    return vcpu.lapic


def to_x2apic(vcpu: Vcpu, play: Script) -> Lapic:
    vcpu.set_msrs({msr.IA32_APIC_BASE: vcpu.apic_base | X2APIC})
    lapic = lapic_of(vcpu)
    lapic.msr_write(SVR, 0x1FF)
    serve(vcpu, play)
    return lapic


def given(vcpu: Vcpu, posted: object) -> tuple[object, object]:
    """What the core has of the vCPU, as anything: in these tests both come from the stand-in for the engine."""
    return posted, vcpu.vm.ipi_table


def writes_exit(vcpu: Vcpu) -> list[bool]:
    """Whether WRMSR of EOI and of the ICR does."""
    return [bool(vcpu.block.msr_bitmap[0][1][index // 8] >> index % 8 & 1) for index in (EOI, ICR)]


def registers(vcpu: Vcpu) -> tuple[int, int]:
    """IRR and ISR as user space sees them."""
    page = bytes(vcpu.get_lapic().regs)
    words = [int.from_bytes(page[16 * number : 16 * number + 4], "little") for number in range(64)]
    irr, isr = (sum(words[first + n] << 32 * n for n in range(8)) for first in (Reg.IRR, Reg.ISR))
    return irr, isr


def test_an_x2apic_is_the_silicons(vcpu: Vcpu, play: Script) -> None:
    lapic = lapic_of(vcpu)
    serve(vcpu, play)
    assert (lapic.virtual, vcpu.block.apic.enable, writes_exit(vcpu)) == (None, 0, [True, True])
    to_x2apic(vcpu, play)
    assert lapic.virtual is lapic.apicv
    assert lapic.virtual is not None
    assert (vcpu.block.apic.enable, writes_exit(vcpu)) == (1, [False, False])
    posted, table = given(vcpu, lapic.virtual.posted)
    assert table == {0: posted}
    core = fake_engine.Core.cores[-1]
    assert (core.posted, core.table) == (posted, table)
    vcpu.sched_out()
    assert (core.posted, core.table) == (None, None)


def test_interrupts_are_posted_and_nothing_is_injected(vcpu: Vcpu, play: Script) -> None:
    lapic = to_x2apic(vcpu, play)
    assert lapic.accept(irq.DM_FIXED, VECTOR, True, False)
    vcpu.state.rflags |= 1 << 9
    assert irq.has_interrupt(vcpu)
    assert not irq.has_injectable(vcpu)
    serve(vcpu, play)
    assert fake_engine.Core.cores[-1].injected == []
    assert registers(vcpu) == (1 << VECTOR, 0)


def test_what_waits_goes_along_in_both_directions(vcpu: Vcpu, play: Script) -> None:
    lapic = lapic_of(vcpu)
    lapic.mmio_write(Reg.SPIV << 4, 4, 0x1FF)
    lapic.accept(irq.DM_FIXED, VECTOR, True, False)
    assert lapic.acknowledge() == VECTOR
    lapic.accept(irq.DM_FIXED, LOWER, True, False)
    lapic.set_tpr(0x20)
    to_x2apic(vcpu, play)
    assert registers(vcpu) == (1 << LOWER, 1 << VECTOR)
    assert vcpu.block.apic.tpr == 0x20
    vcpu.block.apic.icr = 7 << 32 | 0x4030
    lapic.accept(irq.DM_FIXED, LOWER + 1, True, False)
    vcpu.set_guest_debug(uapi.GuestDebug(control=uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_USE_SW_BP))
    serve(vcpu, play)
    assert (lapic.virtual, vcpu.block.apic.enable, writes_exit(vcpu)) == (None, 0, [True, True])
    assert given(vcpu, None) == (None, {})
    assert registers(vcpu) == (3 << LOWER, 1 << VECTOR)
    assert lapic.msr_read(ICR) == 7 << 32 | 0x4030
    vcpu.set_guest_debug(uapi.GuestDebug())
    serve(vcpu, play)
    assert lapic.virtual is not None
    assert registers(vcpu) == (3 << LOWER, 1 << VECTOR)


def test_state_that_user_space_sets_reaches_the_silicon(vcpu: Vcpu, play: Script) -> None:
    lapic = to_x2apic(vcpu, play)
    lapic.accept(irq.DM_FIXED, VECTOR, True, False)
    lapic.set_tpr(0x60)
    saved = vcpu.get_lapic()
    lapic.reset(init=True)
    assert registers(vcpu) == (0, 0)
    assert vcpu.block.apic.tpr == 0
    lapic.accept_vector(LOWER, True, False)
    vcpu.set_lapic(saved)
    assert (registers(vcpu), vcpu.block.apic.tpr) == ((1 << VECTOR, 0), 0x60)


def test_ends_that_concern_an_ioapic_exit(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    lapic = to_x2apic(vcpu, play)
    assert vm.irqchip is not None
    ioapic, ended = vm.irqchip.ioapic, []
    ioapic.write(0xFEC0_0000, 4, 0x10 + 2 * 9)
    ioapic.write(0xFEC0_0010, 4, 1 << 15 | VECTOR)
    vm.routing.add_ack_listener(9, lambda: ended.append(9))
    serve(vcpu, play)
    assert bytes(vcpu.block.apic.eoi_exit) == (1 << VECTOR).to_bytes(32, "little")
    reason = EOI_INDUCED[vcpu.model.vendor]
    out_of_guest(vcpu, play, fake_engine.exits_with(reason, qualification=VECTOR, info2=VECTOR))
    assert ended == [9]
    assert lapic.virtual is not None


def test_commands_that_the_silicon_does_not_know(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    other = vm.create_vcpu(1)
    to_x2apic(vcpu, play)
    vcpu.block.apic.icr = 1 << 32 | irq.DM_INIT | irq.LEVEL_ASSERT
    rip = vcpu.state.rip
    out_of_guest(vcpu, play, fake_engine.exits_with(ICR_WRITE[vcpu.model.vendor], qualification=0x300))
    assert lapic_of(other).pending_init
    assert lapic_of(vcpu).msr_read(ICR) == 1 << 32 | irq.DM_INIT | irq.LEVEL_ASSERT
    assert vcpu.state.rip == rip
    lapic_of(vcpu).msr_write(ICR, 1 << 32 | irq.DM_NMI)  # as where the instruction is emulated
    assert lapic_of(vcpu).msr_read(ICR) == vcpu.block.apic.icr == 1 << 32 | irq.DM_NMI


def test_a_posted_interrupt_ends_a_halt(vcpu: Vcpu, play: Script) -> None:
    lapic = to_x2apic(vcpu, play)
    vcpu.state.rflags |= 1 << 9
    lapic.accept(irq.DM_FIXED, VECTOR, True, False)
    out_of_guest(vcpu, play, leave(vcpu, "hlt"))
    assert vcpu.stats["halt_exits"] == 1


@pytest.mark.parametrize("wanted", [True, False])
def test_the_parameter(wanted: bool, model: silicon.Model, clock: VirtualClock, play: Script) -> None:
    system = kvm.System(model, Parameters(enable_apicv=wanted))
    with system.create_vm(clock=clock) as vm:
        vm.create_irqchip()
        lapic = to_x2apic(ready(vm.create_vcpu(0), system), play)
        assert (lapic.virtual is not None) is wanted
