"""Port I/O: IN and OUT, with devices in KVM or in user space; the string forms go to the emulator.

Answers to Linux 6.1 `kvm_fast_pio()` and `complete_fast_pio_{in,out}()`; the data of an exit lie in page 1 of the vCPU's mapping.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import emulate, exits
from softkvm.kvm.port_exit import IO_IN, IO_STRING, port_exit
from softkvm.uapi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


def handle_io(vcpu: Vcpu) -> int:
    """IN, OUT, INS and OUTS."""
    info = vcpu.exit
    flags, port, size = info.io_flags, info.io_port, info.io_size
    if flags & IO_STRING:
        return emulate.emulate_instruction(vcpu, 0)
    if not flags & IO_IN:
        return _out(vcpu, port, size)
    value = vcpu.vm.pio_bus.read(port, size)
    if value is not None:
        return _store(vcpu, port, size, value)
    vcpu.pending_io = (vcpu.state.rip, port, size)
    return port_exit(vcpu, KVM_EXIT_IO_IN, port, size, 1, _complete_in)


def _complete_in(vcpu: Vcpu) -> int:
    """User space that moved RIP meanwhile (a reset) wants neither result nor skip."""
    rip, port, size = vcpu.pending_io
    if vcpu.state.rip != rip:
        return 1
    data = vcpu.pio_data
    return _store(vcpu, port, size, data[0] if size == 1 else int.from_bytes(data[:size], "little"))


def _store(vcpu: Vcpu, port: int, size: int, value: int) -> int:
    """Put the result of IN into AL, AX or EAX (which clears the upper half of RAX)."""
    if trace.kvm_pio.enabled:
        trace.kvm_pio(KVM_EXIT_IO_IN, port, size, 1, value)
    gpr = vcpu.gpr
    gpr[0] = value if size == 4 else gpr[0] & ~_MASK[size] | value
    return exits.skip(vcpu)


def _out(vcpu: Vcpu, port: int, size: int) -> int:
    value = vcpu.gpr[0] & _MASK[size]
    if trace.kvm_pio.enabled:
        trace.kvm_pio(KVM_EXIT_IO_OUT, port, size, 1, value)
    if vcpu.vm.pio_bus.write(port, size, value):
        return exits.skip(vcpu)
    vcpu.pio_data[:size] = value.to_bytes(size, "little")
    vcpu.pending_io = (vcpu.state.rip,)
    return port_exit(vcpu, KVM_EXIT_IO_OUT, port, size, 1, _complete_out)


def _complete_out(vcpu: Vcpu) -> int:
    return exits.skip(vcpu) if vcpu.state.rip == vcpu.pending_io[0] else 1
