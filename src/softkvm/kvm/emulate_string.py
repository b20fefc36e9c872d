"""INS and OUTS, which only KVM's emulator can do: a port on one side, the guest's memory on the other, in batches.

Answers to Linux 6.1 `em_in()`, `em_out()`, `pio_in_emulated()` and `writeback()` of `arch/x86/kvm/emulate.c`. Each exit of the instruction
is one batch: as many elements as lie in the page and fit the exit to user space. Elements whose memory is a device go one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from softkvm.host import trace
from softkvm.kvm import emulator_ops as ops
from softkvm.kvm import exits, regs
from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.kvm.port_exit import IO_DOWN, IO_IN, IO_REP, PIO_DATA_SIZE, address_mask, port_exit
from softkvm.silicon import RIGHT_R, RIGHT_W
from softkvm.uapi.kvm import KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu


class Transfer(NamedTuple):
    """One batch of an instruction."""

    flags: int
    port: int
    size: int
    pieces: list[ops.Piece]
    """Where the elements lie."""

    @property
    def into_memory(self) -> bool:
        """INS."""
        return bool(self.flags & IO_IN)


def transfer(vcpu: Vcpu) -> int | None:
    """Do a batch of the string instruction that has exited, as an exit handler does; None for an element from RAM into a device."""
    info = vcpu.exit
    flags, size, count = info.io_flags, info.io_size, info.io_count
    if count == 0:
        return exits.skip(vcpu)
    access = RIGHT_W if flags & IO_IN else RIGHT_R
    pieces = ops.translate(vcpu, _addresses(info.io_gla, size, count, bool(flags & IO_DOWN)), size, access)
    if isinstance(pieces, int):
        return pieces
    batch = Transfer(flags, info.io_port, size, pieces)
    if ops.is_device(vcpu, pieces[0], batch.into_memory):  # no other element reaches another page
        return _with_device(vcpu, batch, pieces[0][0][0]) if len(pieces[0]) == 1 else None
    return _in(vcpu, batch) if batch.into_memory else _out(vcpu, batch)


def _addresses(gla: int, size: int, count: int, down: bool) -> list[int]:
    """Of the elements of one batch: to the end of the page, as the first one's address counts bytes there, but at least one."""
    room = gla % PAGE_SIZE + size if down else PAGE_SIZE - gla % PAGE_SIZE
    count = max(1, min(count, room // size, PIO_DATA_SIZE // size))
    return [gla + (-size if down else size) * index for index in range(count)]


def _in(vcpu: Vcpu, batch: Transfer) -> int:
    port, size, pieces = batch.port, batch.size, batch.pieces
    bus = vcpu.vm.pio_bus
    value = bus.read(port, size)
    if value is not None:
        values = [value]
        while len(values) < len(pieces) and (value := bus.read(port, size)) is not None:
            values.append(value)
        return _store(vcpu, batch, b"".join(value.to_bytes(size, "little") for value in values))

    def finish() -> int:
        left = min(_remaining(vcpu, batch.flags), len(pieces))  # user space may have lowered the count
        return _store(vcpu, batch, bytes(vcpu.pio_data[: left * size]))

    return port_exit(vcpu, KVM_EXIT_IO_IN, port, size, len(pieces), ops.unless_moved(vcpu, finish))


def _store(vcpu: Vcpu, batch: Transfer, data: bytes) -> int:
    size = batch.size
    count = len(data) // size
    _trace(KVM_EXIT_IO_IN, batch, count, data)
    for index, piece in enumerate(batch.pieces[:count]):
        ops.write_memory(vcpu, piece, data[index * size : index * size + size])
    return _advance(vcpu, batch, regs.RDI, count)


def _out(vcpu: Vcpu, batch: Transfer) -> int:
    port, size, pieces = batch.port, batch.size, batch.pieces
    values = [ops.read_memory(vcpu, piece) for piece in pieces]
    done = 0
    while done < len(values) and vcpu.vm.pio_bus.write(port, size, int.from_bytes(values[done], "little")):
        done += 1
    data = b"".join(values[:done] if done else values)
    _trace(KVM_EXIT_IO_OUT, batch, done or len(values), data)
    if done:
        return _advance(vcpu, batch, regs.RSI, done)
    vcpu.pio_data[: len(data)] = data
    finish = ops.unless_moved(vcpu, lambda: _advance(vcpu, batch, regs.RSI, len(values)))
    return port_exit(vcpu, KVM_EXIT_IO_OUT, port, size, len(values), finish)


def _with_device(vcpu: Vcpu, batch: Transfer, gpa: int) -> int:
    """One element whose memory is a device, or a write to a read-only slot: each half in KVM or in user space."""
    port, size = batch.port, batch.size
    if batch.into_memory:

        def store(value: int) -> int:
            _trace(KVM_EXIT_IO_IN, batch, 1, value.to_bytes(size, "little"))
            return ops.write_device(vcpu, gpa, size, value, lambda: _advance(vcpu, batch, regs.RDI, 1))

        return ops.read_port(vcpu, port, size, store)

    def send(value: int) -> int:
        _trace(KVM_EXIT_IO_OUT, batch, 1, value.to_bytes(size, "little"))
        return ops.write_port(vcpu, port, size, value, lambda: _advance(vcpu, batch, regs.RSI, 1))

    return ops.read_device(vcpu, gpa, size, send)


def _trace(direction: int, batch: Transfer, count: int, data: bytes) -> None:
    """A batch of port accesses; the event shows the first value."""
    if trace.kvm_pio.enabled:
        trace.kvm_pio(direction, batch.port, batch.size, count, int.from_bytes(data[: batch.size], "little"))


def _remaining(vcpu: Vcpu, flags: int) -> int:
    return vcpu.gpr[regs.RCX] & address_mask(flags) if flags & IO_REP else 1


def _advance(vcpu: Vcpu, batch: Transfer, pointer: int, count: int) -> int:
    """Move the pointer, count RCX down, and step over the instruction if it is finished."""
    gpr, flags = vcpu.gpr, batch.flags
    mask = address_mask(flags)
    moved = gpr[pointer] + (-count if flags & IO_DOWN else count) * batch.size
    gpr[pointer] = _merge(gpr[pointer], moved, mask)
    if flags & IO_REP:
        left = max(0, _remaining(vcpu, flags) - count)
        gpr[regs.RCX] = _merge(gpr[regs.RCX], left, mask)
        if left:
            return 1
    return exits.skip(vcpu)


def _merge(old: int, new: int, mask: int) -> int:
    """A register after a write of address size: 16 bits keep the rest, 32 bits clear it."""
    return old & ~mask | new & mask if mask == 0xFFFF else new & mask
