"""`softkvm.kvm.irqchip.routing`: default and user routes, MSIs, wrong entries."""

from __future__ import annotations

import pytest

from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.lapic_registers import Reg
from softkvm.kvm.irqchip.routing import msi_message
from softkvm.uapi.kvm import KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, IrqRoutingEntry
from tests.kvm.fakes import FakeVcpu, FakeVm


def pin(gsi: int, chip: int, number: int, flags: int = 0) -> IrqRoutingEntry:
    entry = IrqRoutingEntry(gsi=gsi, type=KVM_IRQ_ROUTING_IRQCHIP, flags=flags)
    entry.irqchip.irqchip, entry.irqchip.pin = chip, number
    return entry


def msi(gsi: int, address: int = 0xFEE0_0000, data: int = 0x55, high: int = 0) -> IrqRoutingEntry:
    entry = IrqRoutingEntry(gsi=gsi, type=KVM_IRQ_ROUTING_MSI)
    entry.msi.address_lo, entry.msi.address_hi, entry.msi.data = address, high, data
    return entry


def setup() -> tuple[FakeVm, FakeVcpu]:
    vm = FakeVm()
    vcpu = FakeVcpu(vm)
    vcpu.apic.mmio_write(Reg.SPIV << 4, 4, 0x1FF)
    return vm, vcpu


def test_default_routes_reach_ioapic_and_pic() -> None:
    vm, _ = setup()
    vm.routing.set_irq(0, 3, True)
    assert vm.chips.ioapic.get_state().irr == 1 << 3
    assert vm.chips.pic.get_state(0).irr == 1 << 3
    vm.routing.set_irq(0, 12, True)
    assert vm.chips.pic.get_state(1).irr == 1 << 4
    assert vm.routing.set_irq(0, 24, True) == -1


def test_status_adds_up_what_was_reached() -> None:
    vm, _ = setup()
    assert vm.routing.set_irq(0, 3, True) == 1  # the PIC takes it, the masked IOAPIC pin does not count
    assert vm.routing.set_irq(0, 20, True) == -1
    assert vm.routing.set_irq(0, 20, False) == 1


def test_user_routes_replace_all() -> None:
    vm, vcpu = setup()
    vm.routing.set([msi(5), pin(0, 2, 2)])
    assert vm.routing.set_irq(0, 5, True) == 1
    assert vcpu.apic.highest_irr() == 0x55
    assert vm.routing.set_irq(0, 5, False) == -1
    assert vm.routing.set_irq(0, 3, True) == -1
    vm.routing.set_irq(0, 0, True)
    assert vm.chips.ioapic.get_state().irr == 1 << 2


@pytest.mark.parametrize(
    "entries",
    [
        [pin(0, 2, 24)],
        [pin(0, 0, 8)],
        [pin(0, 3, 0)],
        [pin(0, 2, 0, flags=1)],
        [pin(4096, 2, 0)],
        [pin(1, 2, 1), pin(1, 2, 2)],
        [pin(1, 2, 1), msi(1)],
        [msi(1), msi(1)],
        [IrqRoutingEntry(gsi=1, type=9)],
        [msi(gsi) for gsi in range(4097)],
    ],
)
def test_bad_entries_change_nothing(entries: list[IrqRoutingEntry]) -> None:
    vm, _ = setup()
    with pytest.raises(OSError, match=r"\[Errno 22\]"):
        vm.routing.set([pin(7, 2, 7), *entries])
    assert vm.routing.set_irq(0, 3, True) == 1


def test_msi_fields() -> None:
    message = msi_message(0xFEE3_C00C, 0x1234_5600, 0x8000 | irq.DM_LOWEST | 0x42, x2apic_format=True)
    assert message.vector == 0x42
    assert message.dest_id == 0x1234_563C
    assert message.logical
    assert message.redirection_hint
    assert message.level_triggered
    assert message.delivery_mode == irq.DM_LOWEST
    assert msi_message(0xFEE3_C000, 0x1234_5600, 0, x2apic_format=False).dest_id == 0x3C


def test_signal_msi() -> None:
    vm, vcpu = setup()
    assert vm.routing.signal_msi(0xFEE0_0000, 0, 0x61) == 1
    assert vm.routing.signal_msi(0xFEE0_7000, 0, 0x61) == -1  # no such APIC
    vcpu.apic.mmio_write(Reg.SPIV << 4, 4, 0xFF)
    assert vm.routing.signal_msi(0xFEE0_0000, 0, 0x61) == 0
    vm.routing.x2apic_format = True
    with pytest.raises(OSError, match="upper address"):
        vm.routing.signal_msi(0xFEE0_0000, 1, 0x61)


def test_broadcast_quirk() -> None:
    vm, vcpu = setup()
    vcpu.apic.set_base(vcpu.apic_base | 1 << 10)
    assert vm.routing.signal_msi(0xFEEF_F000, 0, 0x61) == 1
    vm.routing.x2apic_broadcast_quirk = False
    assert vm.routing.signal_msi(0xFEEF_F000, 0, 0x61) == -1


def test_listeners_follow_the_routes() -> None:
    vm, _ = setup()
    heard: list[str] = []

    def listener() -> None:
        heard.append("acked")

    vm.routing.add_ack_listener(20, listener)
    vm.routing.notify_acked(2, 20)
    vm.routing.set([pin(20, 2, 5)])
    vm.routing.notify_acked(2, 20)
    vm.routing.notify_acked(2, 5)
    vm.routing.remove_ack_listener(20, listener)
    vm.routing.notify_acked(2, 5)
    assert heard == ["acked"] * 2
