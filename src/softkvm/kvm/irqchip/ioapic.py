"""The I/O APIC: 24 pins at FEC00000h.

Answers to the 82093AA data sheet and Linux 6.1 `arch/x86/kvm/ioapic.c`. As in KVM, polarity is kept but ignored: lines carry levels,
high is asserted; and the chip is version 11h, without an EOI register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.clock import NSEC_PER_MSEC, HrTimer
from softkvm.kvm.irqchip import irq
from softkvm.kvm.irqchip.irq import LapicIrq
from softkvm.kvm.irqchip.routing import line_level
from softkvm.uapi.kvm import KVM_IOAPIC_NUM_PINS, KVM_IRQCHIP_IOAPIC, IoapicState

if TYPE_CHECKING:
    from softkvm.kvm.types import Vm

IOAPIC_BASE = 0xFEC0_0000
IOAPIC_LENGTH = 0x100
IOREGSEL, IOWIN = 0x00, 0x10
"""Memory-mapped registers: the index and the window."""
REG_ID, REG_VERSION, REG_ARBITRATION, REG_REDIRECTION = 0x00, 0x01, 0x02, 0x10
"""Indexed registers."""
VERSION = 0x11 | (KVM_IOAPIC_NUM_PINS - 1) << 16

LOGICAL, DELIVERY_STATUS, REMOTE_IRR, LEVEL, MASKED = 1 << 11, 1 << 12, 1 << 14, 1 << 15, 1 << 16
"""Bits of a redirection entry; bits 10..8 are the delivery mode, 7..0 the vector, 63..56 the destination."""

SUCCESSIVE_IRQ_MAX_COUNT = 10_000
"""Interrupts of a level pin that the guest ends without quieting its device, before KVM slows the pin down ..."""
EOI_DELAY_NS = 10 * NSEC_PER_MSEC
"""... to one in this time, so that an interrupt storm leaves the guest time to run."""


class Ioapic:
    """The chip; all methods may be called from any thread and take the VM's lock."""

    def __init__(self, vm: Vm) -> None:
        """A chip after reset, not yet on a bus."""
        self._vm = vm
        self._levels = [0] * KVM_IOAPIC_NUM_PINS
        self._storm = [0] * KVM_IOAPIC_NUM_PINS
        self._delayed = HrTimer(vm.clock, self._inject_delayed)
        self._redirection = [MASKED] * KVM_IOAPIC_NUM_PINS
        self._id = 0
        self._select = 0
        self._irr = 0
        self._irr_delivered = 0
        self.handled_vectors = 0
        """Bitmap of the vectors whose end of interrupt concerns the chip; read by local APICs without the lock."""

    # --- Guest side -------------------------------------------------------------------------------------------------------------

    def read(self, address: int, size: int) -> int:
        """Read of the memory-mapped registers."""
        with self._vm.lock:
            register = address & 0xFF
            value = self._select if register == IOREGSEL else self._read_indirect() if register == IOWIN else 0
        return value & (1 << 8 * size) - 1

    def write(self, address: int, size: int, value: int) -> bool:
        """Write of the memory-mapped registers."""
        register = address & 0xFF
        with self._vm.lock:
            if register == IOREGSEL:
                self._select = value & 0xFF
            elif register == IOWIN:
                self._write_indirect(value & (1 << 8 * min(size, 4)) - 1)
        return True

    def _read_indirect(self) -> int:
        if self._select == REG_VERSION:
            return VERSION
        if self._select in (REG_ID, REG_ARBITRATION):
            return self._id << 24
        pin = self._select - REG_REDIRECTION >> 1
        entry = self._redirection[pin] if 0 <= pin < KVM_IOAPIC_NUM_PINS else (1 << 64) - 1
        return (entry >> 32 if self._select & 1 else entry) & 0xFFFF_FFFF

    def _write_indirect(self, value: int) -> None:
        if self._select == REG_ID:
            self._id = value >> 24 & 0xF
        pin = self._select - REG_REDIRECTION >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        before = self._redirection[pin]
        entry = before & 0xFFFF_FFFF | value << 32 if self._select & 1 else before & ~0xFFFF_FFFF | value
        entry = entry & ~(REMOTE_IRR | DELIVERY_STATUS) | before & (REMOTE_IRR | DELIVERY_STATUS)
        if not entry & LEVEL:
            entry &= ~REMOTE_IRR  # guests switch a pin to edge and back to get rid of a stuck remote IRR
        self._redirection[pin] = entry
        self.rescan()
        if (before ^ entry) & MASKED:
            self._vm.routing.notify_masked(KVM_IRQCHIP_IOAPIC, pin, bool(entry & MASKED))
        if entry & LEVEL and self._irr >> pin & 1:
            self._service(pin)

    # --- Lines and delivery -----------------------------------------------------------------------------------------------------

    def set_irq(self, pin: int, source: int, level: bool) -> int:
        """`source` drives a pin. Returns the APICs reached, 0 if coalesced, -1 if the pin is masked."""
        with self._vm.lock:
            return self._set_level(pin, line_level(self._levels, pin, source, level))

    def _set_level(self, pin: int, level: bool) -> int:
        bit = 1 << pin
        if not level:
            self._irr &= ~bit
            return 1
        was_high = bool(self._irr & bit)
        self._irr |= bit
        if not self._redirection[pin] & LEVEL:
            self._irr_delivered &= ~bit
            if was_high:
                return 0
        return self._service(pin)

    def _service(self, pin: int) -> int:
        entry = self._redirection[pin]
        if entry & MASKED or (entry & LEVEL and entry & REMOTE_IRR):
            return -1
        message = LapicIrq(
            vector=entry & 0xFF,
            dest_id=entry >> 56,
            delivery_mode=entry & irq.DM_MASK,
            logical=bool(entry & LOGICAL),
            level_triggered=bool(entry & LEVEL),
        )
        if not entry & LEVEL:
            self._irr_delivered |= 1 << pin
        reached = irq.deliver(self._vm, message)
        if reached and entry & LEVEL:
            self._redirection[pin] |= REMOTE_IRR
        return reached

    def eoi(self, vector: int, level_triggered: bool) -> None:
        """A local APIC broadcasts the end of `vector`, which its TMR says was level-triggered or not."""
        with self._vm.lock:
            for pin, entry in enumerate(self._redirection):
                if entry & 0xFF == vector:
                    self._vm.routing.notify_acked(KVM_IRQCHIP_IOAPIC, pin)
                    if level_triggered and self._redirection[pin] & LEVEL:
                        self._end_level(pin)

    def _end_level(self, pin: int) -> None:
        self._redirection[pin] &= ~REMOTE_IRR
        if self._redirection[pin] & MASKED or not self._irr >> pin & 1:
            self._storm[pin] = 0
            return
        self._storm[pin] += 1
        if self._storm[pin] < SUCCESSIVE_IRQ_MAX_COUNT:
            self._service(pin)
            return
        self._storm[pin] = 0
        self._delayed.start(self._vm.clock.monotonic_ns() + EOI_DELAY_NS)

    def _inject_delayed(self, _now: int) -> None:
        with self._vm.lock:
            for pin, entry in enumerate(self._redirection):
                if entry & LEVEL and self._irr >> pin & 1 and not entry & REMOTE_IRR:
                    self._service(pin)

    def rescan(self) -> None:
        """Recompute `handled_vectors` after a change of entries, routes or listeners."""
        handled = 0
        for pin, entry in enumerate(self._redirection):
            if entry & LEVEL or self._vm.routing.has_ack_listener(KVM_IRQCHIP_IOAPIC, pin):
                handled |= 1 << (entry & 0xFF)
        if handled != self.handled_vectors:
            self.handled_vectors = handled
            self._vm.routing.make_scan_ioapic_request()

    # --- State ------------------------------------------------------------------------------------------------------------------

    def get_state(self) -> IoapicState:
        """KVM_GET_IRQCHIP; edges that were delivered are not pending any more."""
        state = IoapicState(base_address=IOAPIC_BASE, ioregsel=self._select, id=self._id)
        with self._vm.lock:
            state.irr = self._irr & ~self._irr_delivered
            for pin, entry in enumerate(self._redirection):
                state.redirtbl[pin] = entry
        return state

    def set_state(self, state: IoapicState) -> None:
        """KVM_SET_IRQCHIP; pending lines are raised again."""
        with self._vm.lock:
            self._select, self._id = state.ioregsel & 0xFF, state.id & 0xF
            self._redirection = list(state.redirtbl)
            self._irr = self._irr_delivered = 0
            self.rescan()
            for pin in range(KVM_IOAPIC_NUM_PINS):
                if state.irr >> pin & 1:
                    self._set_level(pin, True)
