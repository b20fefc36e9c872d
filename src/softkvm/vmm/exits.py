"""What the VMM does when KVM_RUN returns: one handler per exit reason.

Source of truth: Linux 6.1 `Documentation/virt/kvm/api.rst`, section 5 (the kvm_run structure).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from softkvm.uapi import kvm as uapi
from softkvm.uapi.layout import offset_of
from softkvm.vmm.board import Board
from softkvm.vmm.stop import StopReason

REASON_NAMES = {
    value: name.removeprefix("KVM_EXIT_").lower()
    for name, value in vars(uapi).items()
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}
"""Exit reasons in the words of the API document, for counters and messages."""

# Where the structure has what every I/O and MMIO exit needs; read with one unpack each, because they come by the ten thousand.
_REASON = struct.Struct("<I")
_REASON_OFFSET = offset_of(uapi.Run, "exit_reason")
_OUT = uapi.KVM_EXIT_IO_OUT
_IO = struct.Struct("<BBHIQ")
_IO_OFFSET = offset_of(uapi.Run, "io")
_MMIO = struct.Struct("<QQIB")
_MMIO_OFFSET = offset_of(uapi.Run, "mmio")
_MMIO_DATA = _MMIO_OFFSET + offset_of(uapi.RunMmio, "data")

_SYSTEM_EVENTS = {
    uapi.KVM_SYSTEM_EVENT_SHUTDOWN: StopReason.POWER_OFF,
    uapi.KVM_SYSTEM_EVENT_RESET: StopReason.RESET,
    uapi.KVM_SYSTEM_EVENT_CRASH: StopReason.PANIC,
}
_INTERNAL_ERRORS = {
    uapi.KVM_INTERNAL_ERROR_EMULATION: "an instruction could not be emulated",
    uapi.KVM_INTERNAL_ERROR_SIMUL_EX: "an exception came while another one was delivered",
    uapi.KVM_INTERNAL_ERROR_DELIVERY_EV: "an event could not be delivered",
    uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "the CPU left the guest for an unexpected reason",
}


class Vcpu(Protocol):
    """The part of `kvm.Vcpu` that exits need."""

    @property
    def kvm_run(self) -> uapi.Run:
        """Page 0 of the mapping."""
        ...

    @property
    def mmap_area(self) -> memoryview:
        """The whole mapping."""
        ...


class ExitHandler:
    """Handles the exits of one vCPU; the actions of its thread (`crew.py`)."""

    def __init__(self, vcpu: Vcpu, board: Board, stop: Callable[[StopReason, str], None], failed: Callable[[BaseException], None]) -> None:
        """`stop(reason, detail)` ends the run; `failed(error)` ends it with an exception."""
        self._run = vcpu.kvm_run
        self._area = vcpu.mmap_area
        self._lock, self._ports, self._memory = board.lock, board.ports, board.memory
        self._stop = stop
        self.failed = failed
        self._handlers: dict[int, Callable[[], None]] = {
            uapi.KVM_EXIT_IO: self._io,
            uapi.KVM_EXIT_MMIO: self._mmio,
            uapi.KVM_EXIT_INTR: self._nothing,
            uapi.KVM_EXIT_SHUTDOWN: self._shutdown,
            uapi.KVM_EXIT_SYSTEM_EVENT: self._system_event,
            uapi.KVM_EXIT_FAIL_ENTRY: self._fail_entry,
            uapi.KVM_EXIT_INTERNAL_ERROR: self._internal_error,
        }
        self.counts = dict.fromkeys(self._handlers, 0)
        """Exits so far by reason."""

    def handle(self) -> None:
        """Act on the exit that kvm_run describes."""
        (reason,) = _REASON.unpack_from(self._area, _REASON_OFFSET)
        handler = self._handlers.get(reason)
        if handler is None:
            name = REASON_NAMES.get(reason, str(reason))
            self._stop(StopReason.INTERNAL_ERROR, f"KVM_RUN returned with exit reason {name}, which this machine never asked for")
            return
        self.counts[reason] += 1
        handler()

    def refused(self, error: OSError) -> None:
        """KVM_RUN failed with an errno that is no request to try again."""
        self._stop(StopReason.INTERNAL_ERROR, f"KVM_RUN failed: {error.strerror}")

    def _io(self) -> None:
        direction, size, port, count, offset = _IO.unpack_from(self._area, _IO_OFFSET)
        area, ports = self._area, self._ports
        with self._lock:
            for start in range(offset, offset + count * size, size) if count > 1 else (offset,):
                if direction == _OUT:
                    ports.write(port, size, int.from_bytes(area[start : start + size], "little"))
                elif size == 1:
                    area[start] = ports.read(port, 1)
                else:
                    area[start : start + size] = ports.read(port, size).to_bytes(size, "little")

    def _mmio(self) -> None:
        address, data, size, is_write = _MMIO.unpack_from(self._area, _MMIO_OFFSET)
        with self._lock:
            if is_write:
                self._memory.write(address, size, data & ((1 << 8 * size) - 1))
            else:
                self._area[_MMIO_DATA : _MMIO_DATA + 8] = self._memory.read(address, size).to_bytes(8, "little")

    def _nothing(self) -> None:
        """A signal: enter again, unless the run is over."""

    def _shutdown(self) -> None:
        self._stop(StopReason.TRIPLE_FAULT, "an exception could not be delivered, nor the double fault that followed")

    def _system_event(self) -> None:
        kind = self._run.system_event.type
        self._stop(_SYSTEM_EVENTS.get(kind, StopReason.INTERNAL_ERROR), f"KVM reported system event {kind}")

    def _fail_entry(self) -> None:
        reason = self._run.fail_entry.hardware_entry_failure_reason
        self._stop(StopReason.INTERNAL_ERROR, f"the CPU refused to enter the guest (reason {reason:#x})")

    def _internal_error(self) -> None:
        error = self._run.internal
        detail = _INTERNAL_ERRORS.get(error.suberror, f"internal error {error.suberror}")
        data = [f"{error.data[index]:#x}" for index in range(min(error.ndata, len(error.data)))]
        self._stop(StopReason.INTERNAL_ERROR, f"{detail} ({', '.join(data)})" if data else detail)
