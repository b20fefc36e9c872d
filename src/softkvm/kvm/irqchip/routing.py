"""GSI routing: what happens when a global system interrupt line changes level, and who hears of its end.

Answers to Linux 6.1 `virt/kvm/irqchip.c`, `arch/x86/kvm/irq_comm.c` and `Documentation/virt/kvm/api.rst` (KVM_SET_GSI_ROUTING).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.irq import LapicIrq
from softkvm.kvm.request import REQ_SCAN_IOAPIC
from softkvm.uapi.kvm import (
    KVM_IOAPIC_NUM_PINS,
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_MSI_VALID_DEVID,
    IrqRoutingEntry,
)

if TYPE_CHECKING:
    from softkvm.kvm.irqchip import Irqchip
    from softkvm.kvm.types import Vm

USERSPACE_SOURCE, RESAMPLE_SOURCE, PIT_SOURCE = range(3)
"""Who drives a line; the line is high while any of them holds it."""

MAX_ROUTES = 4096
PIC_PINS = 8
"""Pins of one PIC."""


def line_level(levels: list[int], pin: int, source: int, level: bool) -> bool:
    """Record in `levels` (a bitmap of sources for each pin) that `source` drives `pin`, and return the level of the line."""
    bit = 1 << source
    levels[pin] = levels[pin] | bit if level else levels[pin] & ~bit
    return bool(levels[pin])


def msi_message(address_lo: int, address_hi: int, data: int, x2apic_format: bool) -> LapicIrq:
    """The APIC message of an MSI (SDM vol. 3, 11.11); with `x2apic_format`, `address_hi` carries bits 31..8 of the destination."""
    dest_id = address_lo >> 12 & 0xFF
    if x2apic_format:
        dest_id |= address_hi & 0xFFFF_FF00
    return LapicIrq(
        vector=data & 0xFF,
        dest_id=dest_id,
        delivery_mode=data & irq.DM_MASK,
        logical=bool(address_lo & 1 << 2),
        level_triggered=bool(data & irq.TRIGGER_LEVEL),
        redirection_hint=bool(address_lo & 1 << 3),
    )


@dataclass(frozen=True, slots=True)
class Route:
    """One thing that a GSI does: `set(source, level)` returns the number of APICs reached, 0 if coalesced, negative if nobody took it."""

    set: Callable[[int, bool], int]
    chip: int | None
    pin: int
    message: LapicIrq | None = None
    """Of a message-signalled one, as the routes were set."""


class Routing:
    """The routes of all GSIs, and the listeners for acknowledgement and masking of pins."""

    def __init__(self, vm: Vm) -> None:
        """No routes, which is the state before KVM_CREATE_IRQCHIP, and with the PIC and IOAPIC in user space."""
        self._vm = vm
        self._routes: dict[int, tuple[Route, ...]] = {}
        self._gsi_of_pin: dict[tuple[int, int], int] = {}
        self._ack_listeners: dict[int, tuple[Callable[[], None], ...]] = {}
        self._mask_listeners: dict[int, tuple[Callable[[bool], None], ...]] = {}
        self._user_ioapic_vectors: frozenset[int] = frozenset()
        self.x2apic_format = False
        """KVM_X2APIC_API_USE_32BIT_IDS: APIC ids of 32 bits in MSIs and in KVM_GET_LAPIC."""
        self.x2apic_broadcast_quirk = True
        """Cleared by KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK: id FFh is then one APIC, not all."""

    def set_default(self, irqchip: Irqchip) -> None:
        """KVM's routes after KVM_CREATE_IRQCHIP: GSI n is IOAPIC pin n, and below 16 also line n of the PICs."""
        routes = {gsi: [self._chip_route(irqchip, KVM_IRQCHIP_IOAPIC, gsi)] for gsi in range(KVM_IOAPIC_NUM_PINS)}
        for gsi in range(2 * PIC_PINS):
            chip = KVM_IRQCHIP_PIC_MASTER if gsi < PIC_PINS else KVM_IRQCHIP_PIC_SLAVE
            routes[gsi].append(self._chip_route(irqchip, chip, gsi % PIC_PINS))
        self._install(routes)

    def set(self, entries: Sequence[IrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING: replace all routes; OSError(EINVAL) for an entry that makes no sense, and nothing changes then."""
        if len(entries) > MAX_ROUTES:
            raise OSError(errno.EINVAL, "too many routes")
        routes: dict[int, list[Route]] = {}
        for entry in entries:
            if entry.gsi >= MAX_ROUTES:
                raise OSError(errno.EINVAL, "GSI out of range")
            route = self._route(entry)
            others = routes.setdefault(entry.gsi, [])
            if any(route.chip is None or other.chip is None or other.chip == route.chip for other in others):
                raise OSError(errno.EINVAL, "a GSI goes to one message, or to at most one pin of each chip")
            others.append(route)
        self._install(routes)

    def set_irq(self, source: int, gsi: int, level: bool) -> int:
        """`source` drives line `gsi`. Returns the APICs reached, 0 if coalesced, or negative: masked, or no route."""
        if trace.kvm_set_irq.enabled:
            trace.kvm_set_irq(gsi, int(level), source)
        result = -1
        for route in self._routes.get(gsi, ()):
            reached = route.set(source, level)
            if reached >= 0:
                result = reached + max(result, 0)
        return result

    def signal_msi(self, address_lo: int, address_hi: int, data: int) -> int:
        """Send an MSI; the result is that of `irq.deliver()`. OSError(EINVAL) for an address that no MSI has."""
        self._check_msi(address_hi)
        return irq.deliver(self._vm, msi_message(address_lo, address_hi, data, self.x2apic_format))

    def add_ack_listener(self, gsi: int, listener: Callable[[], None]) -> None:
        """Call `listener` whenever the guest ends the interrupt of `gsi`; with the VM's lock held."""
        with self._vm.lock:
            self._ack_listeners[gsi] = (*self._ack_listeners.get(gsi, ()), listener)
            self._rescan()

    def remove_ack_listener(self, gsi: int, listener: Callable[[], None]) -> None:
        """Undo `add_ack_listener()`."""
        with self._vm.lock:
            self._ack_listeners[gsi] = tuple(other for other in self._ack_listeners.get(gsi, ()) if other != listener)
            self._rescan()

    def add_mask_listener(self, gsi: int, listener: Callable[[bool], None]) -> None:
        """Call `listener(masked)` whenever the guest masks or unmasks a pin of `gsi`; with the VM's lock held."""
        with self._vm.lock:
            self._mask_listeners[gsi] = (*self._mask_listeners.get(gsi, ()), listener)

    def notify_acked(self, chip: int, pin: int) -> None:
        """A chip saw the end of the interrupt of its pin."""
        gsi = self._gsi_of_pin.get((chip, pin))
        for listener in self._ack_listeners.get(gsi, ()) if gsi is not None else ():
            listener()

    def notify_masked(self, chip: int, pin: int, masked: bool) -> None:
        """A chip's pin was masked or unmasked."""
        gsi = self._gsi_of_pin.get((chip, pin))
        for listener in self._mask_listeners.get(gsi, ()) if gsi is not None else ():
            listener(masked)

    def has_ack_listener(self, chip: int, pin: int) -> bool:
        """Whether anybody waits for the end of this pin's interrupt."""
        gsi = self._gsi_of_pin.get((chip, pin))
        return gsi is not None and bool(self._ack_listeners.get(gsi))

    def user_ioapic_handles(self, vector: int) -> bool:
        """Whether the end of a vector that an APIC had in service concerns the IOAPIC in user space: one of its pins is level-triggered."""
        return vector in self._user_ioapic_vectors

    def handled_vectors(self) -> int:
        """Bitmap of the vectors whose end concerns an IOAPIC, in the kernel or in user space."""
        irqchip = self._vm.irqchip
        return sum(1 << vector for vector in self._user_ioapic_vectors) if irqchip is None else irqchip.ioapic.handled_vectors

    def make_scan_ioapic_request(self) -> None:
        """Let all vCPUs know that `handled_vectors()` has changed."""
        for vcpu in self._vm.vcpus:
            if vcpu.lapic is not None and vcpu.lapic.virtual is not None:
                vcpu.make_request(REQ_SCAN_IOAPIC)

    def _route(self, entry: IrqRoutingEntry) -> Route:
        if entry.type == KVM_IRQ_ROUTING_MSI and not entry.flags & ~KVM_MSI_VALID_DEVID:
            msi = entry.msi
            self._check_msi(msi.address_hi)
            message = msi_message(msi.address_lo, msi.address_hi, msi.data, self.x2apic_format)
            return Route(partial(self._set_msi, msi.address_lo, msi.address_hi, msi.data), None, 0, message)
        irqchip = self._vm.irqchip
        if entry.type == KVM_IRQ_ROUTING_IRQCHIP and not entry.flags and irqchip is not None:
            return self._chip_route(irqchip, entry.irqchip.irqchip, entry.irqchip.pin)
        raise OSError(errno.EINVAL, "no such kind of route")

    def _chip_route(self, irqchip: Irqchip, chip: int, pin: int) -> Route:
        if chip == KVM_IRQCHIP_IOAPIC and pin < KVM_IOAPIC_NUM_PINS:
            return Route(partial(irqchip.ioapic.set_irq, pin), chip, pin)
        if chip in (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE) and pin < PIC_PINS:
            return Route(partial(irqchip.pic.set_irq, pin + chip * PIC_PINS), chip, pin)
        raise OSError(errno.EINVAL, "no such chip or pin")

    def _set_msi(self, address_lo: int, address_hi: int, data: int, _source: int, level: bool) -> int:
        if not level:
            return -1
        return irq.deliver(self._vm, msi_message(address_lo, address_hi, data, self.x2apic_format))

    def _check_msi(self, address_hi: int) -> None:
        if self.x2apic_format and address_hi & 0xFF:
            raise OSError(errno.EINVAL, "low byte of an MSI's upper address is not zero")

    def _install(self, routes: dict[int, list[Route]]) -> None:
        with self._vm.lock:
            self._routes = {gsi: tuple(several) for gsi, several in routes.items()}
            self._gsi_of_pin = {
                (route.chip, route.pin): gsi for gsi, several in routes.items() for route in several if route.chip is not None
            }
            self._user_ioapic_vectors = frozenset(self._level_vectors(self._vm.reserved_ioapic_pins))
            self._rescan()

    def _level_vectors(self, pins: int) -> Iterator[int]:
        """Vectors of level-triggered messages on the first GSIs (`kvm_scan_ioapic_routes()`)."""
        for gsi in range(pins):
            for route in self._routes.get(gsi, ()):
                if route.message is not None and route.message.level_triggered:
                    yield route.message.vector

    def _rescan(self) -> None:
        if self._vm.irqchip is not None:
            self._vm.irqchip.ioapic.rescan()
        else:
            self.make_scan_ioapic_request()
