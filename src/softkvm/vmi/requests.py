"""What a tool can ask of a KVMI server, as values: `ask()` of either client sends one and returns its typed answer.

Source of truth: the layouts in `softkvm.uapi.kvmi`. What a dialect lays out differently is decided here, when the request is encoded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from softkvm.uapi import kvmi
from softkvm.uapi.kvm import MsrEntry, Regs, Sregs
from softkvm.uapi.kvmi import Access, Command, Dialect, Event, FilterField
from softkvm.vmi.errors import ChannelClosed
from softkvm.vmi.memory import PAGE_SIZE, Range

T = TypeVar("T")
S = TypeVar("S", bound=ctypes.Structure)

Body = Callable[[Dialect], bytes]


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """A command to the VM or, with `vcpu`, to one vCPU; `parse` makes the answer of the reply's bytes."""

    command: Command
    body: Body
    parse: Callable[[Dialect, bytes], T]
    vcpu: int | None = None


@dataclass(frozen=True, slots=True)
class Registers:
    """A vCPU's registers; `mode` is 2, 4 or 8: bytes of an address."""

    mode: int
    regs: Regs
    sregs: Sregs
    msrs: dict[int, int]


@dataclass(frozen=True, slots=True)
class MappedRange:
    """Guest memory that can be mapped: at `offset` of the descriptor number `descriptor` of those that came along."""

    area: Range
    descriptor: int
    offset: int


def decode(layout: type[S], data: bytes, offset: int = 0) -> S:
    """A structure out of a reply; what is missing at the end is zero, as the protocol has it."""
    size = ctypes.sizeof(layout)
    return layout.from_buffer_copy(data[offset : offset + size].ljust(size, b"\0"))


def _nothing(dialect: Dialect, data: bytes) -> None:
    return None


def _fixed(data: bytes) -> Body:
    return lambda dialect: data


def _empty(dialect: Dialect) -> bytes:
    return b""


def _structure(structure: ctypes.Structure) -> Body:
    return _fixed(bytes(structure))


# The VM


def version() -> Request[int]:
    """The server's protocol version; always allowed."""
    return Request(Command.GET_VERSION, _empty, lambda dialect, data: decode(kvmi.GetVersionReply, data).version)


def check_command(command: Command) -> Request[None]:
    """Fails with ENOENT if the server does not know a command, with EPERM if it does not allow it."""

    def body(dialect: Dialect) -> bytes:
        return bytes(kvmi.Check(id=dialect.commands.get(command, 0xFFFF)))

    return Request(Command.VM_CHECK_COMMAND, body, _nothing)


def check_event(event: Event) -> Request[None]:
    """Fails as `check_command()` for an event."""
    return Request(Command.VM_CHECK_EVENT, lambda dialect: bytes(kvmi.Check(id=dialect.events.get(event, 0xFFFF))), _nothing)


def vcpu_count() -> Request[int]:
    """How many vCPUs are online."""
    return Request(Command.VM_GET_INFO, _empty, lambda dialect, data: decode(kvmi.GetInfoReply, data).vcpu_count)


def max_gfn() -> Request[int]:
    """The first guest frame number behind all memory."""
    return Request(Command.VM_GET_MAX_GFN, _empty, lambda dialect, data: decode(kvmi.GetMaxGfnReply, data).gfn)


def read_physical(address: int, size: int) -> Request[bytes]:
    """Memory inside one page."""

    def parse(dialect: Dialect, data: bytes) -> bytes:
        if len(data) != size:
            raise ChannelClosed(f"the server answered a read of {size} bytes with {len(data)}")
        return data

    return Request(Command.VM_READ_PHYSICAL, _structure(kvmi.Physical(gpa=address, size=size)), parse)


def write_physical(address: int, data: bytes) -> Request[None]:
    """Write memory inside one page."""
    return Request(Command.VM_WRITE_PHYSICAL, _fixed(bytes(kvmi.Physical(gpa=address, size=len(data))) + data), _nothing)


def read_pages(frames: Sequence[int]) -> Request[dict[int, bytes]]:
    """Up to MAX_READ_PAGES whole pages by frame number; those that are no memory are left out. An extension."""

    def parse(dialect: Dialect, data: bytes) -> dict[int, bytes]:
        present = decode(kvmi.ReadPagesReply, data).present
        found = [frame for number, frame in enumerate(frames) if present >> number & 1]
        position = ctypes.sizeof(kvmi.ReadPagesReply)
        if len(data) < position + PAGE_SIZE * len(found):
            raise ChannelClosed("the server sent fewer pages than it said")
        return {frame: data[position + PAGE_SIZE * n : position + PAGE_SIZE * (n + 1)] for n, frame in enumerate(found)}

    trailing = b"".join(frame.to_bytes(8, "little") for frame in frames)
    return Request(Command.VM_READ_PAGES, _fixed(bytes(kvmi.ReadPages(count=len(frames))) + trailing), parse)


def memory_map() -> Request[list[MappedRange]]:
    """Where memory is, and where in the descriptors that come along it can be mapped; empty if there are none. An extension."""

    def parse(dialect: Dialect, data: bytes) -> list[MappedRange]:
        head, size = ctypes.sizeof(kvmi.GetMemoryMapReply), ctypes.sizeof(kvmi.MemoryRange)
        count = min(decode(kvmi.GetMemoryMapReply, data).count, (len(data) - head) // size)
        ranges = [decode(kvmi.MemoryRange, data, head + size * number) for number in range(count)]
        return [MappedRange(Range(entry.gpa, entry.gpa + entry.size), entry.fd, entry.offset) for entry in ranges]

    return Request(Command.VM_GET_MEMORY_MAP, _empty, parse)


def set_page_access(entries: Iterable[tuple[int, Access]]) -> Request[None]:
    """Leave the guest only these rights to the pages at these addresses; all three give a page back."""
    pages = list(entries)

    def body(dialect: Dialect) -> bytes:
        message = dialect.messages[Command.VM_SET_PAGE_ACCESS]
        assert message.request is not None
        assert message.trailing is not None
        head = message.request(count=len(pages))
        return bytes(head) + b"".join(bytes(message.trailing(gpa=gpa, access=access)) for gpa, access in pages)  # type: ignore[call-arg]

    return Request(Command.VM_SET_PAGE_ACCESS, body, _nothing)


def set_breakpoints(addresses: Iterable[int], *, enable: bool = True) -> Request[None]:
    """Breakpoints at guest-physical addresses that the guest cannot see. An extension."""
    entries = b"".join(bytes(kvmi.BreakpointEntry(gpa=address, enable=enable)) for address in addresses)
    count = len(entries) // ctypes.sizeof(kvmi.BreakpointEntry)
    return Request(Command.VM_SET_BREAKPOINTS, _fixed(bytes(kvmi.SetBreakpoints(count=count)) + entries), _nothing)


def set_filter(
    event: Event, field: FilterField, ranges: Sequence[tuple[int, int]], *, mask: int = (1 << 64) - 1, outside: bool = False
) -> Request[None]:
    """Send an event only if a field, after `mask`, lies in one of `ranges` (ends included), or with `outside` in none. An extension."""
    entries = b"".join(bytes(kvmi.FilterRange(first=first, last=last)) for first, last in ranges)

    def body(dialect: Dialect) -> bytes:
        head = kvmi.SetEventFilter(event_id=dialect.events[event], field=field, except_=outside, count=len(ranges), mask=mask)
        return bytes(head) + entries

    return Request(Command.VM_SET_EVENT_FILTER, body, _nothing)


def control_vm_event(event: Event, *, enable: bool = True) -> Request[None]:
    """Whether an event of the VM, such as UNHOOK, is sent."""
    return Request(Command.VM_CONTROL_EVENTS, _event_control(event, enable), _nothing)


def control_cleanup(*, enable: bool = True) -> Request[None]:
    """Whether all interceptions end with the session."""
    return Request(Command.VM_CONTROL_CLEANUP, _structure(kvmi.ControlCleanup(enable=enable)), _nothing)


# One vCPU


def pause(vcpu: int, *, wait: bool = True) -> Request[None]:
    """Have the vCPU send a PAUSE_VCPU event; with `wait` the answer comes when it is out of the guest."""

    def body(dialect: Dialect) -> bytes:
        if dialect.split_ids:
            return bytes(kvmi.PauseV12(vcpu=vcpu, wait=wait))
        return bytes(kvmi.Pause(wait=wait))

    return Request(Command.VCPU_PAUSE, body, _nothing, vcpu)


def registers(vcpu: int, msrs: Sequence[int] = ()) -> Request[Registers]:
    """The vCPU's registers, and the MSRs asked for."""

    def parse(dialect: Dialect, data: bytes) -> Registers:
        reply = decode(kvmi.GetRegistersReply, data)
        head, size = ctypes.sizeof(kvmi.GetRegistersReply), ctypes.sizeof(MsrEntry)
        entries = [decode(MsrEntry, data, head + size * number) for number in range(min(reply.nmsrs, (len(data) - head) // size))]
        return Registers(reply.mode, reply.regs, reply.sregs, {entry.index: entry.data for entry in entries})

    trailing = b"".join(index.to_bytes(4, "little") for index in msrs)
    return Request(Command.VCPU_GET_REGISTERS, _fixed(bytes(kvmi.GetRegisters(nmsrs=len(msrs))) + trailing), parse, vcpu)


def set_registers(vcpu: int, regs: Regs) -> Request[None]:
    """General registers of a vCPU that waits for the answer to an event."""
    return Request(Command.VCPU_SET_REGISTERS, _structure(regs), _nothing, vcpu)


def cpuid(vcpu: int, function: int, index: int = 0) -> Request[tuple[int, int, int, int]]:
    """EAX, EBX, ECX and EDX of the guest's CPUID."""

    def parse(dialect: Dialect, data: bytes) -> tuple[int, int, int, int]:
        reply = decode(kvmi.GetCpuidReply, data)
        return reply.eax, reply.ebx, reply.ecx, reply.edx

    return Request(Command.VCPU_GET_CPUID, _structure(kvmi.GetCpuid(function=function, index=index)), parse, vcpu)


def translate(vcpu: int, address: int) -> Request[int | None]:
    """The guest-physical address of a virtual one under the vCPU's CR3; None if there is none."""

    def parse(dialect: Dialect, data: bytes) -> int | None:
        found = decode(kvmi.TranslateGvaReply, data).gpa
        return None if found == kvmi.INVALID_GPA else found

    return Request(Command.VCPU_TRANSLATE_GVA, _structure(kvmi.TranslateGva(gva=address)), parse, vcpu)


def control_event(vcpu: int, event: Event, *, enable: bool = True) -> Request[None]:
    """Whether an event of the vCPU is sent."""
    return Request(Command.VCPU_CONTROL_EVENTS, _event_control(event, enable), _nothing, vcpu)


def _event_control(event: Event, enable: bool) -> Body:
    return lambda dialect: bytes(kvmi.ControlEvents(event_id=dialect.events[event], enable=enable))


def control_cr(vcpu: int, number: int, *, enable: bool = True) -> Request[None]:
    """Whether writes to CR0, CR3 or CR4 are CR events."""

    def body(dialect: Dialect) -> bytes:
        layout = dialect.messages[Command.VCPU_CONTROL_CR].request
        assert layout is not None
        return bytes(layout(cr=number, enable=enable))

    return Request(Command.VCPU_CONTROL_CR, body, _nothing, vcpu)


def control_msr(vcpu: int, index: int, *, enable: bool = True) -> Request[None]:
    """Whether writes to an MSR are MSR events."""
    return Request(Command.VCPU_CONTROL_MSR, _structure(kvmi.ControlMsr(msr=index, enable=enable)), _nothing, vcpu)


def control_singlestep(vcpu: int, *, enable: bool = True) -> Request[None]:
    """Whether each instruction is followed by a SINGLESTEP event."""
    return Request(Command.VCPU_CONTROL_SINGLESTEP, _structure(kvmi.ControlSinglestep(enable=enable)), _nothing, vcpu)


def inject_exception(vcpu: int, vector: int, error_code: int = 0, address: int = 0) -> Request[None]:
    """Raise an exception in the guest; a TRAP event tells what came of it. `address` is CR2 of a page fault."""
    body = _structure(kvmi.InjectException(nr=vector, error_code=error_code, address=address))
    return Request(Command.VCPU_INJECT_EXCEPTION, body, _nothing, vcpu)


def xcr0(vcpu: int) -> Request[int]:
    """XCR0."""
    return Request(Command.VCPU_GET_XCR, _structure(kvmi.GetXcr(xcr=0)), lambda dialect, data: decode(kvmi.GetXcrReply, data).value, vcpu)


def xsave(vcpu: int) -> Request[bytes]:
    """The XSAVE area, in the standard format."""
    return Request(Command.VCPU_GET_XSAVE, _empty, lambda dialect, data: data, vcpu)


def set_xsave(vcpu: int, area: bytes) -> Request[None]:
    """Load the extended state from an XSAVE area."""
    return Request(Command.VCPU_SET_XSAVE, _fixed(area), _nothing, vcpu)


def mtrr_type(vcpu: int, address: int) -> Request[int]:
    """The memory type that the MTRRs give a guest-physical address."""
    body = _structure(kvmi.GetMtrrType(gpa=address))
    return Request(Command.VCPU_GET_MTRR_TYPE, body, lambda dialect, data: decode(kvmi.GetMtrrTypeReply, data).type, vcpu)
