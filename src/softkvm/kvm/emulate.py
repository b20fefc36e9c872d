"""Instructions that touch memory which is not RAM: the silicon runs one instruction and asks for each device access that it needs.

Answers to Linux 6.1 `x86_emulate_instruction()`, `emulator_{read,write}_emulated()`, `vcpu_mmio_{read,write}()` and
`complete_emulated_mmio()`. The interpreter is the silicon's `Control.emulate` mode; KVM gives it a list of completed accesses, which
starts empty and grows by one each time the instruction is restarted, until it runs through.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import events, exits
from softkvm.kvm.mmu import Fault
from softkvm.kvm.request import REQ_EVENT
from softkvm.silicon import EXIT_ACCESS, EXIT_EMULATED
from softkvm.uapi.kvm import KVM_EXIT_MMIO

if TYPE_CHECKING:
    from softkvm.kvm.irqchip.lapic import Lapic
    from softkvm.kvm.vcpu import Vcpu

_APIC_PAGE = (1 << 52) - (1 << 12)
"""Address bits of IA32_APIC_BASE."""

ACCESS_LIMIT = 8
"""Entries of `ControlBlock.access`: the most device accesses of one instruction (a 64-byte load in 8-byte pieces)."""


def emulate(vcpu: Vcpu) -> int:
    """Run the guest's instruction, whose data access the nested page tables refused, with devices behind it."""
    control = vcpu.control
    if control.intercepts & events.WINDOWS:  # an exit for a window would lose accesses that are already done
        vcpu.set_windows(0)
        vcpu.make_request(REQ_EVENT)
    control.access_count = 0
    control.emulate = 1
    return _continue(vcpu)


def _continue(vcpu: Vcpu) -> int:
    """Run until the instruction is done, waits for user space, or leaves for a reason of its own."""
    vendor = vcpu.vendor
    control = vcpu.control
    while True:
        reason = vcpu.enter()
        if reason == EXIT_ACCESS:
            if (result := _access(vcpu)) <= 0:
                return result
        elif reason == EXIT_EMULATED:
            control.emulate = 0
            return 1
        elif reason == vendor.exit_interrupt:
            exits.handle_interrupt(vcpu)  # a kick or a timer got in first; what it is about is looked at after the instruction
        elif reason == vendor.exit_memory_fault:
            fault = vcpu.vm.mmu.fault(*vendor.memory_fault(vcpu))
            if fault is not Fault.FIXED:  # an instruction fetch from where no memory is
                control.emulate = 0
                return exits.emulation_failure(vcpu)
        else:
            control.emulate = 0
            return vendor.handle_exit(vcpu, reason)


def _access(vcpu: Vcpu) -> int:
    """Serve the access that the instruction waits for: 1 served, 0 user space must do it, else -errno."""
    access = vcpu.exit.access
    gpa, size, write = access.gpa, access.size, access.write
    fault = vcpu.vm.mmu.fault(gpa, bool(write))
    if fault is Fault.FIXED:
        return 1
    if fault is Fault.UNMAPPED:
        vcpu.control.emulate = 0
        return -errno.EFAULT
    if vcpu.control.access_count >= ACCESS_LIMIT:
        vcpu.control.emulate = 0
        return exits.emulation_failure(vcpu)
    if write:
        return _write(vcpu, gpa, size, access.data[0] & (1 << size * 8) - 1)
    return _read(vcpu, gpa, size)


def _lapic_at(vcpu: Vcpu, gpa: int) -> Lapic | None:
    """The vCPU's own local APIC if its register page is at `gpa` (xAPIC mode only)."""
    lapic = vcpu.lapic
    if lapic is None or (vcpu.apic_base ^ gpa) & _APIC_PAGE or not lapic.hw_enabled or lapic.x2apic:
        return None
    return lapic


def _read(vcpu: Vcpu, gpa: int, size: int) -> int:
    lapic = _lapic_at(vcpu, gpa)
    value = lapic.mmio_read(gpa & 0xFFF, size) if lapic is not None else vcpu.vm.mmio_bus.read(gpa, size)
    if value is not None:
        _complete(vcpu, gpa, size, 0, value)
        return 1
    mmio = vcpu.kvm_run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, 0

    def finish() -> int:
        _complete(vcpu, gpa, size, 0, int.from_bytes(mmio.data[:size], "little"))
        return _continue(vcpu)

    return vcpu.exit_to_user(KVM_EXIT_MMIO, finish)


def _write(vcpu: Vcpu, gpa: int, size: int, value: int) -> int:
    lapic = _lapic_at(vcpu, gpa)
    if lapic is not None:
        lapic.mmio_write(gpa & 0xFFF, size, value)
    if lapic is not None or vcpu.vm.mmio_bus.write(gpa, size, value):
        _complete(vcpu, gpa, size, 1, value)
        return 1
    mmio = vcpu.kvm_run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, 1
    mmio.data[:] = list(value.to_bytes(8, "little"))

    def finish() -> int:
        _complete(vcpu, gpa, size, 1, value)
        return _continue(vcpu)

    return vcpu.exit_to_user(KVM_EXIT_MMIO, finish)


def _complete(vcpu: Vcpu, gpa: int, size: int, write: int, value: int) -> None:
    """Append a done access for the restart of the instruction."""
    control = vcpu.control
    done = vcpu.accesses[control.access_count]
    done.gpa, done.size, done.write, done.data[0] = gpa, size, write, value
    control.access_count += 1
    if trace.kvm_mmio.enabled:
        trace.kvm_mmio("write" if write else "read", size, gpa, value)
