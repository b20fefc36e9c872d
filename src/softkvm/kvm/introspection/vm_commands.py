"""Commands that the tool's own thread does: about the VM as a whole, and guest memory.

Answers to `virt/kvm/introspection/kvmi_msg.c` of "VM introspection" v9, patches 41-46, 63, 67 and 77. Each takes the session, the parsed
request, and what trails it; it returns the reply's data or raises Refused.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Mapping
from ctypes import Structure
from typing import TYPE_CHECKING, Any, NamedTuple

from softkvm.host import mm
from softkvm.kvm.introspection.codec import parse
from softkvm.kvm.introspection.failures import Broken, Refused
from softkvm.kvm.introspection.filters import Filter, has_field
from softkvm.kvm.memslots import PAGE_SHIFT, PAGE_SIZE
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Command, Dialect, Error, FilterField

if TYPE_CHECKING:
    from softkvm.kvm.introspection.session import Session


class Data(NamedTuple):
    """A reply with descriptors, which the channel closes when it has sent them."""

    body: bytes
    fds: tuple[int, ...] = ()


_ALL_RIGHTS = int(Access.R | Access.W | Access.X)


def get_version(session: Session, request: None, trailing: bytes) -> bytes:
    """GET_VERSION: never fails."""
    layout = session.dialect.messages[Command.GET_VERSION].reply
    if layout is kvmi.GetVersionReplyV12:
        return bytes(kvmi.GetVersionReplyV12(version=kvmi.VERSION, max_msg_size=kvmi.MAX_MESSAGE))
    if layout is kvmi.GetVersionReplyLibkvmi:
        return bytes(kvmi.GetVersionReplyLibkvmi(version=kvmi.VERSION, singlestep=1))
    return bytes(kvmi.GetVersionReply(version=kvmi.VERSION, singlestep=1))


def check_command(session: Session, request: kvmi.Check, trailing: bytes) -> bytes:
    """VM_CHECK_COMMAND: ENOENT unknown, EPERM disallowed; the id of events counts as a command that is always allowed."""
    dialect = session.dialect
    if request.id in (dialect.vm_event, dialect.vcpu_event, dialect.event_reply):
        return b""
    command = dialect.by_id.get(request.id)
    if command is None:
        raise Refused(Error.ENOENT)
    if command not in session.allowed_commands:
        raise Refused(Error.EPERM)
    return b""


def check_event(session: Session, request: kvmi.Check, trailing: bytes) -> bytes:
    """VM_CHECK_EVENT: ENOENT unknown, EPERM disallowed."""
    event = session.dialect.event_by_id.get(request.id)
    if event is None:
        raise Refused(Error.ENOENT)
    if event not in session.allowed_events:
        raise Refused(Error.EPERM)
    return b""


def get_info(session: Session, request: None, trailing: bytes) -> bytes:
    """VM_GET_INFO."""
    return bytes(kvmi.GetInfoReply(vcpu_count=len(session.vcpus)))


def control_events(session: Session, request: kvmi.ControlEvents, trailing: bytes) -> bytes:
    """VM_CONTROL_EVENTS: EINVAL for what is no event of the VM, EPERM disallowed."""
    event = session.dialect.event_by_id.get(request.event_id)
    if request.enable > 1 or event not in kvmi.VM_EVENTS:
        raise Refused(Error.EINVAL)
    if event not in session.allowed_events:
        raise Refused(Error.EPERM)
    session.vm_events = session.vm_events | {event} if request.enable else session.vm_events - {event}
    return b""


def read_physical(session: Session, request: kvmi.Physical, trailing: bytes) -> bytes:
    """VM_READ_PHYSICAL: EINVAL for a range that is not inside of one page, ENOENT where there is no memory."""
    _check_range(request)
    try:
        return session.vm.mmu.read(request.gpa, request.size)
    except OSError:
        raise Refused(Error.ENOENT) from None


def write_physical(session: Session, request: kvmi.Physical, trailing: bytes) -> bytes:
    """VM_WRITE_PHYSICAL: as VM_READ_PHYSICAL; rights to the page do not count. Broken if the bytes are not there."""
    if len(trailing) < request.size:
        raise Broken(f"VM_WRITE_PHYSICAL of {request.size} bytes has {len(trailing)}")
    _check_range(request)
    try:
        session.vm.mmu.write(request.gpa, trailing[: request.size])
    except OSError:
        raise Refused(Error.ENOENT) from None
    return b""


def _check_range(request: kvmi.Physical) -> None:
    if not request.size or request.gpa % PAGE_SIZE + request.size > PAGE_SIZE:
        raise Refused(Error.EINVAL)


def control_cleanup(session: Session, request: kvmi.ControlCleanup, trailing: bytes) -> bytes:
    """VM_CONTROL_CLEANUP: EINVAL unless 0 or 1. What a tool leaves behind is cleaned up in any case (`Session.end()`)."""
    if request.enable > 1:
        raise Refused(Error.EINVAL)
    return b""


def get_max_gfn(session: Session, request: None, trailing: bytes) -> bytes:
    """VM_GET_MAX_GFN: behind the highest slot."""
    return bytes(kvmi.GetMaxGfnReply(gfn=max((slot.end for slot in session.vm.mmu.slots), default=0) >> PAGE_SHIFT))


def set_page_access(session: Session, request: Any, trailing: bytes) -> bytes:
    """VM_SET_PAGE_ACCESS: every entry is tried, the first error counts. All vCPUs obey when it is answered."""
    layout = session.dialect.messages[Command.VM_SET_PAGE_ACCESS].trailing
    assert layout is kvmi.PageAccessEntry or layout is kvmi.PageAccessEntryV12
    if getattr(request, "view", 0) or len(trailing) < request.count * ctypes.sizeof(layout):
        raise Refused(Error.EINVAL)
    pages: dict[int, int] = {}
    first: Refused | None = None
    for entry in _entries(layout, request.count, trailing):
        try:
            _take_page(session, parse(layout, entry), pages)
        except Refused as error:
            first = first or error
    session.vm.mmu.restrict(pages)
    if first is not None:
        raise first
    return b""


def _take_page(session: Session, entry: Any, pages: dict[int, int]) -> None:
    if entry.access & ~_ALL_RIGHTS or getattr(entry, "visible", 1) > 1:
        raise Refused(Error.EINVAL)
    if session.vm.mmu.slots.find(entry.gpa) is not None:
        pages[entry.gpa >> PAGE_SHIFT] = entry.access
    elif getattr(entry, "visible", 1):
        raise Refused(Error.EINVAL)


def _entries(layout: type[Structure], count: int, trailing: bytes) -> list[bytes]:
    size = ctypes.sizeof(layout)
    return [trailing[n * size : (n + 1) * size] for n in range(count)]


# --- softkvm's own -----------------------------------------------------------------------------------------------------------------


def set_breakpoints(session: Session, request: kvmi.SetBreakpoints, trailing: bytes) -> bytes:
    """VM_SET_BREAKPOINTS: every entry is tried, the first error counts; E2BIG, with nothing changed, for too many."""
    if len(trailing) < request.count * ctypes.sizeof(kvmi.BreakpointEntry):
        raise Refused(Error.EINVAL)
    after = set(session.breakpoints)
    first: Refused | None = None
    for data in _entries(kvmi.BreakpointEntry, request.count, trailing):
        try:
            entry = parse(kvmi.BreakpointEntry, data)
            if entry.enable > 1 or session.vm.mmu.slots.find(entry.gpa) is None:
                raise Refused(Error.EINVAL)
            (after.add if entry.enable else after.discard)(entry.gpa)
        except Refused as error:
            first = first or error
    if len(after) > kvmi.MAX_BREAKPOINTS:
        raise Refused(Error.E2BIG)
    session.set_breakpoints(frozenset(after))
    if first is not None:
        raise first
    return b""


def set_event_filter(session: Session, request: kvmi.SetEventFilter, trailing: bytes) -> bytes:
    """VM_SET_EVENT_FILTER."""
    event = session.dialect.event_by_id.get(request.event_id)
    if event is None:
        raise Refused(Error.ENOENT)
    if request.except_ > 1 or request.field not in FilterField._value2member_map_:
        raise Refused(Error.EINVAL)
    if event not in session.allowed_events:
        raise Refused(Error.EPERM)
    field = FilterField(request.field)
    if event in kvmi.VM_EVENTS or not has_field(event, field) or len(trailing) < request.count * ctypes.sizeof(kvmi.FilterRange):
        raise Refused(Error.EINVAL)
    if request.count > kvmi.MAX_FILTER_RANGES:
        raise Refused(Error.E2BIG)
    ranges = tuple(struct.iter_unpack("<QQ", trailing[: request.count * ctypes.sizeof(kvmi.FilterRange)]))
    if any(first > last for first, last in ranges):
        raise Refused(Error.EINVAL)
    session.filters.set(event, field, Filter(request.mask, bool(request.except_), ranges) if ranges else None)
    session.vm.mmu.pass_same_stores(session.filters.wants_no_same_stores)
    return b""


def read_pages(session: Session, request: kvmi.ReadPages, trailing: bytes) -> bytes:
    """VM_READ_PAGES."""
    if not 0 < request.count <= kvmi.MAX_READ_PAGES or len(trailing) < request.count * 8:
        raise Refused(Error.EINVAL)
    present = 0
    pages: list[bytes | memoryview] = [b""]
    for n, gfn in enumerate(struct.unpack_from(f"<{request.count}Q", trailing)):
        try:
            pages.append(session.vm.mmu.page(gfn))
        except OSError:
            continue
        present |= 1 << n
    pages[0] = bytes(kvmi.ReadPagesReply(present=present))
    return b"".join(pages)


def get_memory_map(session: Session, request: None, trailing: bytes) -> Data:
    """VM_GET_MEMORY_MAP: the slots with memory behind them, each memory with one read-only descriptor."""
    ranges: list[bytes] = []
    numbers: dict[int, int] = {}
    for slot in session.vm.mmu.slots:
        found = mm.mapped(slot.hva)
        if found is not None:
            memory, offset = found
            number = numbers.setdefault(memory.fd, len(numbers))
            entry = kvmi.MemoryRange(gpa=slot.gpa, size=slot.size, offset=offset, fd=number, readonly=slot.readonly)
            ranges.append(bytes(entry))
    fds = tuple(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in numbers)
    return Data(bytes(kvmi.GetMemoryMapReply(count=len(ranges), fds=len(fds))) + b"".join(ranges), fds)


Handler = Callable[["Session", Any, bytes], bytes | Data]

COMMANDS: Mapping[Command, Handler] = {
    Command.GET_VERSION: get_version,
    Command.VM_CHECK_COMMAND: check_command,
    Command.VM_CHECK_EVENT: check_event,
    Command.VM_GET_INFO: get_info,
    Command.VM_CONTROL_EVENTS: control_events,
    Command.VM_READ_PHYSICAL: read_physical,
    Command.VM_WRITE_PHYSICAL: write_physical,
    Command.VM_CONTROL_CLEANUP: control_cleanup,
    Command.VM_GET_MAX_GFN: get_max_gfn,
    Command.VM_SET_PAGE_ACCESS: set_page_access,
    Command.VM_SET_BREAKPOINTS: set_breakpoints,
    Command.VM_SET_EVENT_FILTER: set_event_filter,
    Command.VM_READ_PAGES: read_pages,
    Command.VM_GET_MEMORY_MAP: get_memory_map,
}


def answers_with_data(dialect: Dialect, command: Command) -> bool:
    """Whether a command's answer is more than its error code."""
    message = dialect.messages[command]
    return message.reply is not None or message.trailing_reply is not None
