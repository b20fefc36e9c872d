"""Instructions that touch memory which is not RAM: the silicon runs one instruction and asks for each device access that it needs.

Answers to Linux 6.1 `x86_emulate_instruction()`, `emulator_{read,write}_emulated()`, `vcpu_mmio_{read,write}()` and
`complete_emulated_mmio()`. The interpreter is the silicon's `Control.emulate`; KVM gives it a list of completed accesses, which starts
empty and grows by one each time the instruction is restarted, until it runs through and the guest goes on behind it.

From its first completed access to its end an instruction is half done: its accesses are made once and must not be lost, so nothing may
come in between (`Vcpu.half_done`).
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import events, exits
from softkvm.kvm.irqchip.lapic_registers import APIC_BASE_ENABLE, APIC_BASE_X2APIC
from softkvm.kvm.mmu import Fault
from softkvm.silicon import EMULATE_FIRST, EXIT_ACCESS, EXIT_EMULATED
from softkvm.uapi.kvm import KVM_EXIT_MMIO, Run, RunMmio
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.irqchip.lapic import Lapic
    from softkvm.kvm.vcpu import Vcpu

_APIC_PAGE = (1 << 52) - (1 << 12)
"""Address bits of IA32_APIC_BASE."""
_APIC_MODE = APIC_BASE_ENABLE | APIC_BASE_X2APIC

_put_mmio = struct.Struct("<QQIB").pack_into
_MMIO_OFFSET = offset_of(Run, "mmio")
_MMIO_DATA = _MMIO_OFFSET + offset_of(RunMmio, "data")

ACCESS_LIMIT = 8
"""Entries of `ControlBlock.access`: the most device accesses of one instruction (a 64-byte load in 8-byte pieces)."""


def emulate(vcpu: Vcpu) -> int:
    """Restart the guest's instruction, whose data access the nested page tables refused, with devices behind it."""
    control = vcpu.control
    if control.emulate:  # what they refused again is a fetch, or a page table
        stop(vcpu)
        return exits.emulation_failure(vcpu)
    control.access_count, control.emulate = 0, EMULATE_FIRST
    return 1


def after_exit(vcpu: Vcpu, reason: int) -> None:
    """The guest was entered with a half done instruction: see whether it still is."""
    if reason == EXIT_ACCESS:
        return
    if vcpu.exit.vectoring & events.EVENT_VALID:
        stop(vcpu)  # it ended by an exception, which KVM has now
    elif not vcpu.control.emulate:
        vcpu.half_done = False
    elif reason != vcpu.vendor.exit_memory_fault:  # which is for a page that the restarted instruction needs
        stop(vcpu)  # it has become another instruction


def stop(vcpu: Vcpu) -> None:
    """Forget the instruction."""
    vcpu.half_done = False
    vcpu.control.emulate = 0


def handle_emulated(vcpu: Vcpu) -> int:
    """The instruction is done, and the guest stopped behind it because something waits."""
    return 1


def handle_access(vcpu: Vcpu) -> int:
    """Serve the access that the instruction waits for."""
    access = vcpu.exit.access
    gpa, size, write = access.gpa, access.size, access.write
    fault = vcpu.vm.mmu.fault(gpa, bool(write))
    if fault is Fault.FIXED:
        return 1
    if fault is Fault.UNMAPPED:
        stop(vcpu)
        return -errno.EFAULT
    if vcpu.half_done and vcpu.control.access_count >= ACCESS_LIMIT:
        stop(vcpu)
        return exits.emulation_failure(vcpu)
    if write:
        return _write(vcpu, gpa, size, access.data[0] & (1 << size * 8) - 1)
    return _read(vcpu, gpa, size)


def _lapic_at(vcpu: Vcpu, gpa: int) -> Lapic | None:
    """The vCPU's own local APIC if its register page is at `gpa` (enabled, and in xAPIC mode)."""
    at_its_page = vcpu.apic_base & (_APIC_PAGE | _APIC_MODE) == gpa & _APIC_PAGE | APIC_BASE_ENABLE
    return vcpu.lapic if at_its_page else None


def _read(vcpu: Vcpu, gpa: int, size: int) -> int:
    lapic = _lapic_at(vcpu, gpa)
    value = lapic.mmio_read(gpa & 0xFFF, size) if lapic is not None else vcpu.vm.mmio_bus.read(gpa, size)
    if value is not None:
        return _complete(vcpu, gpa, size, 0, value)
    return _exit(vcpu, gpa, size, 0, 0)


def _write(vcpu: Vcpu, gpa: int, size: int, value: int) -> int:
    lapic = _lapic_at(vcpu, gpa)
    if lapic is not None:
        lapic.mmio_write(gpa & 0xFFF, size, value)
    if lapic is not None or vcpu.vm.mmio_bus.write(gpa, size, value):
        return _complete(vcpu, gpa, size, 1, value)
    return _exit(vcpu, gpa, size, 1, value)


def _exit(vcpu: Vcpu, gpa: int, size: int, write: int, value: int) -> int:
    """KVM_EXIT_MMIO."""
    _put_mmio(vcpu.mmap_area, _MMIO_OFFSET, gpa, value, size, write)
    vcpu.pending_io = (vcpu.state.rip, gpa, size, write, value)
    return vcpu.exit_to_user(KVM_EXIT_MMIO, _complete_in_user_space)


def _complete_in_user_space(vcpu: Vcpu) -> int:
    """`complete_emulated_mmio()`; user space that moved RIP meanwhile (a reset) wants no restart."""
    rip, gpa, size, write, value = vcpu.pending_io
    if vcpu.state.rip != rip:
        stop(vcpu)
        return 1
    if not write:
        value = int.from_bytes(vcpu.mmap_area[_MMIO_DATA : _MMIO_DATA + size], "little")
    return _complete(vcpu, gpa, size, write, value)


def _complete(vcpu: Vcpu, gpa: int, size: int, write: int, value: int) -> int:
    """Append a done access, and restart the instruction."""
    control = vcpu.control
    count = control.access_count if vcpu.half_done else 0
    done = vcpu.accesses[count]
    done.gpa, done.size, done.write, done.data[0] = gpa, size, write, value
    control.access_count = count + 1
    control.emulate = EMULATE_FIRST
    vcpu.half_done = True
    if trace.kvm_mmio.enabled:
        trace.kvm_mmio(trace.MMIO_WRITE if write else trace.MMIO_READ, size, gpa, value)
    return 1


handlers = {EXIT_ACCESS: handle_access, EXIT_EMULATED: handle_emulated}
"""The silicon's private exits, the same for both vendors."""
EXIT_NAMES = {EXIT_ACCESS: "ACCESS", EXIT_EMULATED: "EMULATED"}
