"""What the emulator sees of the machine: instruction bytes, guest memory, devices and ports, and user space behind them.

Answers to `struct x86_emulate_ops` of Linux 6.1 as `arch/x86/kvm/x86.c` fills it: `kvm_fetch_guest_virt()`, `vcpu_mmio_{read,write}()`,
`emulator_read_write_onepage()`, `emulator_pio_in_out()`. MSRs and intercept checks are not here, as the silicon makes them: an emulated
instruction that touches an intercepted MSR exits like any other.

Every access that KVM itself makes to guest memory for an instruction is one of `fetch()`, `read_memory()` and `write_memory()`, or one of
the device accesses below them. Whoever watches guest memory (page tracking, introspection) is asked here and nowhere else.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import events, regs
from softkvm.kvm.irqchip.lapic_registers import APIC_BASE_ENABLE, APIC_BASE_X2APIC
from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.kvm.mmu import Fault
from softkvm.kvm.port_exit import port_exit
from softkvm.silicon import RIGHT_R, RIGHT_W, RIGHT_X
from softkvm.uapi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, Run, RunMmio
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

INSTRUCTION_LIMIT = 15
"""Bytes of the longest instruction."""
TRANSLATE_USER = 8
"""`Core.translate`: an access by user mode."""

_APIC_PAGE = (1 << 52) - (1 << 12)
"""Address bits of IA32_APIC_BASE."""
_APIC_MODE = APIC_BASE_ENABLE | APIC_BASE_X2APIC
_U32 = 0xFFFF_FFFF

_put_mmio = struct.Struct("<QQIB").pack_into
_MMIO_OFFSET = offset_of(Run, "mmio")
_MMIO_DATA = _MMIO_OFFSET + offset_of(RunMmio, "data")

Piece = tuple[tuple[int, int], ...]
"""Where one operand lies: (GPA, bytes), two of them if it crosses a page."""
Then = Callable[[int], int]
"""What to do with a value that was read; the result is that of an exit handler."""


# --- Guest memory ------------------------------------------------------------------------------------------------------------------


def fetch(vcpu: Vcpu) -> bytes:
    """The bytes at CS:RIP, as many of 15 as the code segment, the guest's paging and its memory have."""
    state = vcpu.state
    start, limit, mask = state.rip, INSTRUCTION_LIMIT, (1 << 64) - 1
    if not regs.is_64_bit_mode(vcpu):
        code_segment = state.segments[regs.CS]
        start, mask = code_segment.base + start, _U32
        limit = min(limit, code_segment.limit + 1 - state.rip)
    access = RIGHT_X | (TRANSLATE_USER if regs.cpl(vcpu) == 3 else 0)
    code = b""
    while len(code) < limit:
        gpa = vcpu.translate_gva(start + len(code) & mask, access)
        if gpa is None:
            break
        try:
            code += vcpu.mmu.read(gpa, min(limit - len(code), PAGE_SIZE - gpa % PAGE_SIZE))
        except OSError:  # a device, or nothing at all
            break
    return code


def translate(vcpu: Vcpu, addresses: list[int], size: int, access: int) -> list[Piece] | int:
    """Guest-physical places of operands of `size` bytes at linear addresses; 1 after a #PF was queued, -errno without RAM behind a slot.

    `access` is RIGHT_R or RIGHT_W, at the privilege of the guest's code.
    """
    user = TRANSLATE_USER if regs.cpl(vcpu) == 3 else 0
    pages: dict[int, int] = {}
    for page in dict.fromkeys(linear & -PAGE_SIZE for address in addresses for linear in (address, address + size - 1)):
        gpa = vcpu.translate_gva(page, access | user)
        if gpa is None:
            linear = next(address for address in addresses if page in (address & -PAGE_SIZE, (address + size - 1) & -PAGE_SIZE))
            present = vcpu.translate_gva(page, RIGHT_R) is not None
            events.inject_page_fault(vcpu, max(linear, page), int(present) | (2 if access == RIGHT_W else 0) | (4 if user else 0))
            return 1
        if vcpu.mmu.fault(gpa, access == RIGHT_W) is Fault.UNMAPPED:
            return -errno.EFAULT
        pages[page] = gpa
    return [_piece(pages, address, size) for address in addresses]


def _piece(pages: dict[int, int], address: int, size: int) -> Piece:
    first = min(size, PAGE_SIZE - address % PAGE_SIZE)
    piece: Piece = ((pages[address & -PAGE_SIZE] + address % PAGE_SIZE, first),)
    return piece if first == size else (*piece, (pages[address + first], size - first))


def is_device(vcpu: Vcpu, piece: Piece, write: bool) -> bool:
    """Whether an access to an operand would not be one to RAM, but to a device, or a write to a read-only slot."""
    return any(vcpu.mmu.fault(gpa, write) is Fault.MMIO for gpa, _ in piece)


def read_memory(vcpu: Vcpu, piece: Piece) -> bytes:
    """An operand in RAM."""
    return b"".join(vcpu.mmu.read(gpa, count) for gpa, count in piece)


def write_memory(vcpu: Vcpu, piece: Piece, data: bytes) -> None:
    """Store an operand in RAM."""
    for gpa, count in piece:
        vcpu.mmu.write(gpa, data[:count])
        data = data[count:]


# --- Devices in memory -------------------------------------------------------------------------------------------------------------


def mmio_read(vcpu: Vcpu, gpa: int, size: int) -> int | None:
    """`vcpu_mmio_read()`: from the vCPU's own local APIC (enabled, in xAPIC mode) or a device in KVM; None if user space has to answer."""
    lapic = vcpu.lapic
    if lapic is not None and vcpu.apic_base & (_APIC_PAGE | _APIC_MODE) == gpa & _APIC_PAGE | APIC_BASE_ENABLE:
        return lapic.mmio_read(gpa & 0xFFF, size)
    return vcpu.vm.mmio_bus.read(gpa, size)


def mmio_write(vcpu: Vcpu, gpa: int, size: int, value: int) -> bool:
    """`vcpu_mmio_write()`: False if it is for user space."""
    lapic = vcpu.lapic
    if lapic is not None and vcpu.apic_base & (_APIC_PAGE | _APIC_MODE) == gpa & _APIC_PAGE | APIC_BASE_ENABLE:
        lapic.mmio_write(gpa & 0xFFF, size, value)
        return True
    return vcpu.vm.mmio_bus.write(gpa, size, value)


def mmio_exit(vcpu: Vcpu, gpa: int, size: int, write: int, value: int, finish: Callable[[Vcpu], int]) -> int:
    """KVM_EXIT_MMIO; `finish` goes on when user space has made the access."""
    _put_mmio(vcpu.mmap_area, _MMIO_OFFSET, gpa, value, size, write)
    return vcpu.exit_to_user(KVM_EXIT_MMIO, finish)


def mmio_data(vcpu: Vcpu, size: int) -> int:
    """What user space has read for KVM_EXIT_MMIO."""
    return int.from_bytes(vcpu.mmap_area[_MMIO_DATA : _MMIO_DATA + size], "little")


# --- One access, then the rest of the instruction ------------------------------------------------------------------------------------


def read_device(vcpu: Vcpu, gpa: int, size: int, then: Then) -> int:
    """Read memory that is no RAM, in KVM or in user space, and go on."""

    def finish(value: int) -> int:
        if trace.kvm_mmio.enabled:
            trace.kvm_mmio(trace.MMIO_READ, size, gpa, value)
        return then(value)

    value = mmio_read(vcpu, gpa, size)
    if value is not None:
        return finish(value)
    return mmio_exit(vcpu, gpa, size, 0, 0, unless_moved(vcpu, lambda: finish(mmio_data(vcpu, size))))


def write_device(vcpu: Vcpu, gpa: int, size: int, value: int, then: Callable[[], int]) -> int:
    """Write to memory that is no RAM, or no RAM to write, in KVM or in user space, and go on."""
    if trace.kvm_mmio.enabled:
        trace.kvm_mmio(trace.MMIO_WRITE, size, gpa, value)
    if mmio_write(vcpu, gpa, size, value):
        return then()
    return mmio_exit(vcpu, gpa, size, 1, value, unless_moved(vcpu, then))


def read_port(vcpu: Vcpu, port: int, size: int, then: Then) -> int:
    """Read a port, in KVM or in user space, and go on."""
    value = vcpu.vm.pio_bus.read(port, size)
    if value is not None:
        return then(value)
    finish = unless_moved(vcpu, lambda: then(int.from_bytes(vcpu.pio_data[:size], "little")))
    return port_exit(vcpu, KVM_EXIT_IO_IN, port, size, 1, finish)


def write_port(vcpu: Vcpu, port: int, size: int, value: int, then: Callable[[], int]) -> int:
    """Write a port, in KVM or in user space, and go on."""
    if vcpu.vm.pio_bus.write(port, size, value):
        return then()
    vcpu.pio_data[:size] = value.to_bytes(size, "little")
    return port_exit(vcpu, KVM_EXIT_IO_OUT, port, size, 1, unless_moved(vcpu, then))


def unless_moved(vcpu: Vcpu, then: Callable[[], int]) -> Callable[[Vcpu], int]:
    """`then`, unless user space has moved RIP meanwhile: a reset wants neither results nor the rest of the instruction."""
    rip = vcpu.state.rip
    return lambda vcpu: then() if vcpu.state.rip == rip else 1
