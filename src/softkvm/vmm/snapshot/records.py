"""The records of a snapshot. A file may come from anywhere: every field is typed and bounded here, and what is left is for KVM to check."""

from __future__ import annotations

import ctypes
from typing import Annotated, Literal, TypeVar

from msgspec import Meta

from softkvm.uapi import kvm as uapi
from softkvm.vmm.config import MOST_CPUS, Hardware, parse_cpu, parse_memory, parse_parameters
from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.state import Record

CHIPS = (uapi.KVM_IRQCHIP_PIC_MASTER, uapi.KVM_IRQCHIP_PIC_SLAVE, uapi.KVM_IRQCHIP_IOAPIC)
"""The interrupt chips with state of their own."""

_Structure = TypeVar("_Structure", bound=ctypes.Structure)

_U64 = Annotated[int, Meta(ge=0)]
"""MessagePack has no integers above 64 bits."""
_Nanoseconds = Annotated[int, Meta(ge=0, lt=1 << 62)]
_Blob = Annotated[bytes, Meta(max_length=1 << 14)]
"""A structure of KVM's ABI."""


class HardwareState(Record, frozen=True, kw_only=True):
    """`config.Hardware`."""

    version: Literal[1] = 1
    cpu: str
    """Model and switched features, as `config.parse_cpu()` takes them."""
    cpus: Annotated[int, Meta(ge=1, le=MOST_CPUS)]
    memory: Annotated[int, Meta(ge=0, lt=1 << 62)]
    """Bytes."""
    parameters: list[str]
    """Module parameters of KVM, as `config.parse_parameters()` takes them."""
    cpuid: Annotated[bytes, Meta(max_length=64)]
    """Digest of what CPUID gives on the first CPU: another softkvm may have another CPU of the same name."""

    def check(self) -> Hardware:
        """The hardware; StateError for what cannot be, but for what only KVM knows."""
        try:
            model, features = parse_cpu(self.cpu)
            return Hardware(parse_memory(self.memory), model, features, self.cpus, parse_parameters(self.parameters))
        except ConfigError as error:
            raise StateError(f"the snapshot is of a machine that cannot be: {error}") from error


class ClockState(Record, frozen=True, kw_only=True):
    """kvmclock and the wall clock at one instant."""

    version: Literal[1] = 1
    kvmclock: _U64
    realtime: _Nanoseconds


class VcpuState(Record, frozen=True, kw_only=True):
    """One vCPU, as Linux 6.1 `Documentation/virt/kvm/api.rst` has its parts."""

    version: Literal[1] = 1
    tsc_khz: Annotated[int, Meta(ge=1, lt=1 << 31)]
    tsc: _U64
    """Its TSC at the instant of `ClockState`."""
    sregs: _Blob
    regs: _Blob
    xcrs: _Blob
    xsave: _Blob
    debugregs: _Blob
    lapic: _Blob
    events: _Blob
    mp_state: Annotated[int, Meta(ge=0, le=0xFF)]
    msrs: Annotated[list[tuple[Annotated[int, Meta(ge=0, lt=1 << 32)], _U64]], Meta(max_length=1 << 12)]


class MachineState(Record, frozen=True, kw_only=True):
    """Everything but the content of memory."""

    version: Literal[1] = 1
    hardware: HardwareState
    clock: ClockState
    vcpus: Annotated[list[VcpuState], Meta(max_length=MOST_CPUS)]
    irqchips: Annotated[list[_Blob], Meta(max_length=8)]
    pit: _Blob
    pit_ages: Annotated[list[int], Meta(max_length=8)]
    """How many ns before the instant each counter of the PIT was loaded: KVM has that in its own host's time."""
    devices: dict[str, bytes]
    """Encoded records of the board's devices, by their names."""


def to_blob(structure: ctypes.Structure) -> bytes:
    """The bytes of a structure."""
    return bytes(memoryview(structure))


def from_blob(kind: type[_Structure], blob: bytes) -> _Structure:
    """A structure of its bytes; StateError if there are more or fewer."""
    if len(blob) != ctypes.sizeof(kind):
        raise StateError(f"{len(blob)} bytes are no {kind.__name__} structure")
    return kind.from_buffer_copy(blob)
