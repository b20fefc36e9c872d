"""Suspend to RAM (S3): a machine keeps its memory, its time of day and its power management; all else has power again when it wakes up.

Answers to ACPI specification 6.5, 16.1.3 (S3), 5.2.10 (FACS, waking vector) and 16.3.2. What firmware does on the way back is done here:
the boot processor starts in real mode at the waking vector, the others wait for their start-up IPI.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec

from softkvm.host.clock import NSEC_PER_SEC, Clock, VirtualClock
from softkvm.uapi import kvm as uapi
from softkvm.vmm.acpi import FACS_ADDRESS, WAKING_VECTOR
from softkvm.vmm.memory import GuestMemory
from softkvm.vmm.snapshot import Parts
from softkvm.vmm.snapshot import vcpu as vcpu_state
from softkvm.vmm.snapshot.records import CHIPS, VcpuState
from softkvm.vmm.state import Record

_KEPT = frozenset({"pm", "rtc"})
"""Devices with a power supply of their own."""
_TSC_ADJUST = 0x3B
"""Goes with the TSC, which goes on."""
_REAL_MODE_REACH = 1 << 20
_RFLAGS_RESERVED = 1 << 1


class PowerOn:
    """What each part has when it gets power: taken from a machine that was just made."""

    def __init__(self, parts: Parts) -> None:
        """Of these parts; the board's lock is held."""
        indices = parts.system.get_msr_index_list()
        self._vcpus = [_without_tsc_adjust(vcpu_state.save(vcpu, indices, 0)) for vcpu in parts.vcpus]
        self._chips = [parts.vm.get_irqchip(uapi.Irqchip(chip_id=chip)) for chip in CHIPS]
        self._pit = parts.vm.get_pit2()
        self._devices: dict[str, Record] = {name: device.save() for name, device in _powered(parts).items()}

    def give(self, parts: Parts) -> None:
        """Put the parts into that state; the vCPUs stand still, and the board's lock is held."""
        for name, device in _powered(parts).items():
            device.restore(self._devices[name])
        for chip in self._chips:
            parts.vm.set_irqchip(chip)
        parts.vm.set_pit2(self._pit)
        for vcpu, state in zip(parts.vcpus, self._vcpus, strict=True):
            vcpu_state.restore_registers(vcpu, state)
            vcpu_state.restore_events(vcpu, state)
        parts.board.lines.assert_again()


def _without_tsc_adjust(state: VcpuState) -> VcpuState:
    return msgspec.structs.replace(state, msrs=[(index, value) for index, value in state.msrs if index != _TSC_ADJUST])


def _powered(parts: Parts) -> dict[str, Any]:
    return {name: device for name, device in parts.board.stateful().items() if name not in _KEPT}


class Suspend:
    """Whether the machine sleeps, and how it wakes up."""

    def __init__(self, parts: Parts, memory: GuestMemory, clock: Clock, changed: Callable[[], None]) -> None:
        """Of a machine that was just made; `changed()` is called when it falls asleep and when something wakes it, on any thread."""
        self._parts, self._memory, self._clock = parts, memory, clock
        self._changed = changed
        self._power_on = PowerOn(parts)
        self.asleep = False
        """From the guest's wish until its vCPUs have their state of the way back."""
        self.woken = False
        """Something has happened that ends the sleep."""

    def begin(self) -> None:
        """The guest wants to sleep: no vCPU executes another instruction."""
        self.asleep, self.woken = True, False
        self._changed()

    def wake_up(self) -> None:
        """Something that may end a sleep has happened, if there is one."""
        if self.asleep:
            self.woken = True
            self._changed()

    def wait(self, changed: threading.Event, timeout: float | None) -> None:
        """Let the alarms go on until one rings, `changed` is set, or `timeout` seconds are over; virtual time jumps if one may wake us."""
        self._clock.run_expired()
        expiry = self._clock.first_expiry
        if self.woken:
            return
        if isinstance(self._clock, VirtualClock) and expiry is not None and self._parts.board.pm.alarm_wakes:
            self._clock.skip_to(expiry)
            return
        waits = [] if timeout is None else [timeout]
        if expiry is not None:
            waits.append(max(0, expiry - self._clock.monotonic_ns()) / NSEC_PER_SEC)
        changed.wait(min(waits, default=None))

    def end(self) -> bool:
        """Bring the machine to the guest's waking vector; False if there is none that a processor in real mode could reach.

        The vCPUs stand still, and the board's lock is held.
        """
        self.asleep = self.woken = False
        vector = int.from_bytes(self._memory.view(FACS_ADDRESS + WAKING_VECTOR, 4), "little")
        if not 0 < vector < _REAL_MODE_REACH:
            return False
        self._power_on.give(self._parts)
        self._parts.board.pm.wake()
        boot_vcpu = self._parts.vcpus[0]
        sregs = boot_vcpu.get_sregs2()
        sregs.cs.selector, sregs.cs.base = vector >> 4, vector & ~0xF
        boot_vcpu.set_sregs2(sregs)
        boot_vcpu.set_regs(uapi.Regs(rip=vector & 0xF, rflags=_RFLAGS_RESERVED))
        return True
