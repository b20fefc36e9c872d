"""INS and OUTS between a port and memory that is not RAM: one element at a time, each half in KVM or in user space.

Answers to Linux 6.1 `em_in()`, `em_out()` with `segmented_read/write()` of the emulator, for operands that `emulator_read_write()` takes
to MMIO. `pio.py` has the string forms whose memory side is RAM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm.port_exit import port_exit
from softkvm.uapi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

Then = Callable[[int], int]
"""What to do with a value that was read; the result is that of an exit handler."""


def transfer_in(vcpu: Vcpu, port: int, size: int, gpa: int, advance: Callable[[], int]) -> int:
    """One element of INS to a device at `gpa`, then `advance()`."""

    def store(value: int) -> int:
        return _write_memory(vcpu, gpa, size, value, advance)

    return _read_port(vcpu, port, size, store)


def transfer_out(vcpu: Vcpu, port: int, size: int, gpa: int, advance: Callable[[], int]) -> int:
    """One element of OUTS from a device at `gpa`, then `advance()`."""

    def send(value: int) -> int:
        return _write_port(vcpu, port, size, value, advance)

    return _read_memory(vcpu, gpa, size, send)


def _read_port(vcpu: Vcpu, port: int, size: int, then: Then) -> int:
    value = vcpu.vm.pio_bus.read(port, size)
    if value is not None:
        return then(value)
    finish = _unless_moved(vcpu, lambda: then(int.from_bytes(vcpu.pio_data[:size], "little")))
    return port_exit(vcpu, KVM_EXIT_IO_IN, port, size, 1, finish)


def _write_port(vcpu: Vcpu, port: int, size: int, value: int, then: Callable[[], int]) -> int:
    if vcpu.vm.pio_bus.write(port, size, value):
        return then()
    vcpu.pio_data[:size] = value.to_bytes(size, "little")
    return port_exit(vcpu, KVM_EXIT_IO_OUT, port, size, 1, _unless_moved(vcpu, then))


def _read_memory(vcpu: Vcpu, gpa: int, size: int, then: Then) -> int:
    value = vcpu.vm.mmio_bus.read(gpa, size)
    if value is not None:
        return then(value)
    mmio = vcpu.kvm_run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, 0
    return vcpu.exit_to_user(KVM_EXIT_MMIO, _unless_moved(vcpu, lambda: then(int.from_bytes(mmio.data[:size], "little"))))


def _write_memory(vcpu: Vcpu, gpa: int, size: int, value: int, then: Callable[[], int]) -> int:
    if vcpu.vm.mmio_bus.write(gpa, size, value):
        return then()
    mmio = vcpu.kvm_run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, 1
    mmio.data[:] = list(value.to_bytes(8, "little"))
    return vcpu.exit_to_user(KVM_EXIT_MMIO, _unless_moved(vcpu, then))


def _unless_moved(vcpu: Vcpu, then: Callable[[], int]) -> Callable[[Vcpu], int]:
    """`then`, unless user space has moved RIP meanwhile (a reset)."""
    rip = vcpu.state.rip
    return lambda vcpu: then() if vcpu.state.rip == rip else 1
