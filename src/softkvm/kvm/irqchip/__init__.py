"""The interrupt controllers that KVM_CREATE_IRQCHIP makes: a pair of PICs and an I/O APIC, on their buses and behind the GSI routes."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm.kvm.irqchip.ioapic import IOAPIC_BASE, IOAPIC_LENGTH, Ioapic
from softkvm.kvm.irqchip.pic import ELCR_PORT, MASTER_PORT, SLAVE_PORT, Pic
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.types import Vm


class Irqchip:
    """PIC and IOAPIC of a VM; the local APICs belong to the vCPUs."""

    def __init__(self, vm: Vm) -> None:
        """Chips after power-up, on the VM's buses, with KVM's default routes."""
        self.pic = Pic(vm)
        self.ioapic = Ioapic(vm)
        for port in (MASTER_PORT, SLAVE_PORT, ELCR_PORT):
            vm.pio_bus.register(port, 2, self.pic)
        vm.mmio_bus.register(IOAPIC_BASE, IOAPIC_LENGTH, self.ioapic)
        vm.routing.set_default(self)

    def get_state(self, chip_id: int) -> uapi.Irqchip:
        """KVM_GET_IRQCHIP; OSError(EINVAL) if there is no such chip."""
        state = uapi.Irqchip(chip_id=chip_id)
        if chip_id == uapi.KVM_IRQCHIP_IOAPIC:
            state.ioapic = self.ioapic.get_state()
        elif chip_id in (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE):
            state.pic = self.pic.get_state(chip_id)
        else:
            raise OSError(errno.EINVAL, "no such interrupt chip")
        return state

    def set_state(self, state: uapi.Irqchip) -> None:
        """KVM_SET_IRQCHIP; OSError(EINVAL) if there is no such chip."""
        if state.chip_id == uapi.KVM_IRQCHIP_IOAPIC:
            self.ioapic.set_state(state.ioapic)
        elif state.chip_id in (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE):
            self.pic.set_state(state.chip_id, state.pic)
        else:
            raise OSError(errno.EINVAL, "no such interrupt chip")
