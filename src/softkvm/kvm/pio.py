"""Port I/O: IN and OUT, and their string forms in batches, with devices in KVM or in user space.

Answers to Linux 6.1 `kvm_fast_pio()`, `emulator_pio_in_out()` and the INS/OUTS batching of `pio_in_emulated()`; the data of an exit lie
in page 1 of the vCPU's mapping.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm.host import trace
from softkvm.kvm import emulate, events, exits, regs, string_mmio
from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.kvm.mmu import Fault
from softkvm.kvm.port_exit import port_exit
from softkvm.silicon import RIGHT_R, RIGHT_W
from softkvm.uapi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_PIO_DATA_SIZE = 1024
"""Bytes of string I/O in one exit to user space."""
_IN, _STRING, _REP, _ADDRESS32, _ADDRESS64, _DOWN = 1, 2, 4, 8, 16, 32
_TRANSLATE_USER = 8
_MASK = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF}


def handle_io(vcpu: Vcpu) -> int:
    """IN, OUT, INS and OUTS."""
    info = vcpu.exit
    flags, port, size = info.io_flags, info.io_port, info.io_size
    if flags & _STRING:
        return _string(vcpu, flags, port, size)
    if not flags & _IN:
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


# --- INS and OUTS ------------------------------------------------------------------------------------------------------------------


def _string(vcpu: Vcpu, flags: int, port: int, size: int) -> int:
    """One batch: as many elements as lie in the page and fit the exit; the instruction exits again for the rest."""
    count = vcpu.exit.io_count
    if count == 0:
        return exits.skip(vcpu)
    down, gla = flags & _DOWN, vcpu.exit.io_gla
    room = gla % PAGE_SIZE + size if down else PAGE_SIZE - gla % PAGE_SIZE
    count = max(1, min(count, room // size, _PIO_DATA_SIZE // size))
    addresses = [gla + (-size if down else size) * index for index in range(count)]
    pieces = _translate(vcpu, addresses, size, RIGHT_W if flags & _IN else RIGHT_R)
    if pieces is None:
        return 1
    if isinstance(pieces, int):
        return pieces
    if any(vcpu.vm.mmu.fault(gpa, bool(flags & _IN)) is Fault.MMIO for gpa, _ in pieces[0]):  # no other element reaches another page
        if len(pieces[0]) > 1:
            return emulate.handle_emulation_failure(vcpu, emulate.EMULTYPE_PF)
        return _string_mmio(vcpu, flags, port, size, pieces[0][0][0])
    if flags & _IN:
        return _string_in(vcpu, flags, port, size, pieces)
    return _string_out(vcpu, flags, port, size, pieces)


def _string_mmio(vcpu: Vcpu, flags: int, port: int, size: int, gpa: int) -> int:
    """One element whose memory side is a device."""
    if flags & _IN:
        return string_mmio.transfer_in(vcpu, port, size, gpa, lambda: _advance(vcpu, flags, regs.RDI, 1, size))
    return string_mmio.transfer_out(vcpu, port, size, gpa, lambda: _advance(vcpu, flags, regs.RSI, 1, size))


Piece = tuple[tuple[int, int], ...]
"""Where one element lies: (GPA, bytes), two of them if it crosses a page."""


def _translate(vcpu: Vcpu, addresses: list[int], size: int, access: int) -> list[Piece] | int | None:
    """Guest-physical places of the elements; None after a #PF was queued, -errno if RAM is missing behind a slot."""
    user = _TRANSLATE_USER if regs.cpl(vcpu) == 3 else 0
    pages: dict[int, int] = {}
    for page in dict.fromkeys(linear & -PAGE_SIZE for address in addresses for linear in (address, address + size - 1)):
        gpa = vcpu.translate_gva(page, access | user)
        if gpa is None:
            linear = next(address for address in addresses if page in (address & -PAGE_SIZE, (address + size - 1) & -PAGE_SIZE))
            present = vcpu.translate_gva(page, RIGHT_R) is not None
            events.inject_page_fault(vcpu, max(linear, page), int(present) | (2 if access == RIGHT_W else 0) | (4 if user else 0))
            return None
        if vcpu.vm.mmu.fault(gpa, access == RIGHT_W) is Fault.UNMAPPED:
            return -errno.EFAULT
        pages[page] = gpa
    result: list[Piece] = []
    for address in addresses:
        first = min(size, PAGE_SIZE - address % PAGE_SIZE)
        piece: Piece = ((pages[address & -PAGE_SIZE] + address % PAGE_SIZE, first),)
        if first < size:
            piece += ((pages[address + first], size - first),)
        result.append(piece)
    return result


def _string_in(vcpu: Vcpu, flags: int, port: int, size: int, pieces: list[Piece]) -> int:
    bus = vcpu.vm.pio_bus
    value = bus.read(port, size)
    if value is not None:
        values = [value]
        while len(values) < len(pieces) and (value := bus.read(port, size)) is not None:
            values.append(value)
        return _store_string(vcpu, flags, pieces, b"".join(value.to_bytes(size, "little") for value in values), size)
    rip = vcpu.state.rip

    def finish(vcpu: Vcpu) -> int:
        if vcpu.state.rip != rip:
            return 1
        left = _remaining(vcpu, flags)  # user space may have lowered the count
        return _store_string(vcpu, flags, pieces[:left], bytes(vcpu.pio_data[: min(left, len(pieces)) * size]), size)

    return port_exit(vcpu, KVM_EXIT_IO_IN, port, size, len(pieces), finish)


def _store_string(vcpu: Vcpu, flags: int, pieces: list[Piece], data: bytes, size: int) -> int:
    position = 0
    for piece in pieces[: len(data) // size]:
        for gpa, count in piece:
            vcpu.vm.memory.write(gpa, data[position : position + count])
            position += count
    return _advance(vcpu, flags, regs.RDI, len(data) // size, size)


def _string_out(vcpu: Vcpu, flags: int, port: int, size: int, pieces: list[Piece]) -> int:
    values = [b"".join(vcpu.vm.memory.read(gpa, count) for gpa, count in piece) for piece in pieces]
    done = 0
    while done < len(values) and vcpu.vm.pio_bus.write(port, size, int.from_bytes(values[done], "little")):
        done += 1
    if done:
        return _advance(vcpu, flags, regs.RSI, done, size)
    data = b"".join(values)
    vcpu.pio_data[: len(data)] = data
    rip = vcpu.state.rip

    def finish(vcpu: Vcpu) -> int:
        return _advance(vcpu, flags, regs.RSI, len(values), size) if vcpu.state.rip == rip else 1

    return port_exit(vcpu, KVM_EXIT_IO_OUT, port, size, len(values), finish)


def _address_mask(flags: int) -> int:
    if flags & _ADDRESS64:
        return (1 << 64) - 1
    return 0xFFFF_FFFF if flags & _ADDRESS32 else 0xFFFF


def _remaining(vcpu: Vcpu, flags: int) -> int:
    return vcpu.gpr[regs.RCX] & _address_mask(flags) if flags & _REP else 1


def _advance(vcpu: Vcpu, flags: int, pointer: int, count: int, size: int) -> int:
    """Move the pointer, count RCX down, and step over the instruction if it is finished."""
    gpr, mask = vcpu.gpr, _address_mask(flags)
    moved = gpr[pointer] + (-count if flags & _DOWN else count) * size
    gpr[pointer] = _merge(gpr[pointer], moved, mask)
    if flags & _REP:
        left = max(0, _remaining(vcpu, flags) - count)
        gpr[regs.RCX] = _merge(gpr[regs.RCX], left, mask)
        if left:
            return 1
    return exits.skip(vcpu)


def _merge(old: int, new: int, mask: int) -> int:
    """A register after a write of address size: 16 bits keep the rest, 32 bits clear it."""
    return old & ~mask | new & mask if mask == 0xFFFF else new & mask
