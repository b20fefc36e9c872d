"""Messages as bytes, in the dialect of the peer.

Answers to `kvmi_msg_*()` of "VM introspection" v9, patches 40 and 52, and to v12 and libkvmi where they differ (`uapi/kvmi.py`). What is
shorter than its structure reads as if zeros followed; padding must be zero.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import Structure
from functools import cache
from typing import TypeVar

from softkvm.kvm.introspection.failures import Broken, Refused
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Dialect, Error, Event, Reply
from softkvm.uapi.layout import offset_of

HEADER = struct.Struct("<HHI")
_ERROR = struct.Struct("<iI")
_VCPU = struct.Struct("<HHI")
_EVENT = struct.Struct("<HHB3x")
_EVENT_V12 = struct.Struct("<H6xHHI")
_EVENT_SIZE = ctypes.sizeof(kvmi.EventCommon)
_REPLY_SIZE = _VCPU.size + ctypes.sizeof(kvmi.EventReply)
_REPLY = struct.Struct("<BBHI")
_PLAIN = {int(action): Reply(action) for action in Action}

_Structure = TypeVar("_Structure", bound=Structure)


@cache
def _padding(layout: type[Structure]) -> tuple[tuple[int, int], ...]:
    """Where the layout has padding."""
    names = [name for name in layout.__annotations__ if name.startswith("padding")]
    return tuple((at, at + getattr(layout, name).size) for name in names for at in (offset_of(layout, name),))


def parse(layout: type[_Structure], body: bytes) -> _Structure:
    """The structure at the beginning of `body`; Refused(EINVAL) for padding that is not zero."""
    size = ctypes.sizeof(layout)
    data = body[:size].ljust(size, b"\0")
    if any(any(data[start:end]) for start, end in _padding(layout)):
        raise Refused(Error.EINVAL)
    return layout.from_buffer_copy(data)


def command_reply(number: int, seq: int, error: int, data: bytes = b"") -> bytes:
    """The answer to a command; data follow only if `error` is 0."""
    return HEADER.pack(number, _ERROR.size + len(data), seq) + _ERROR.pack(-error, 0) + data


def vm_event(dialect: Dialect, event: Event, seq: int) -> bytes:
    """An event without a vCPU."""
    if dialect.split_ids:
        return HEADER.pack(dialect.vm_event, 8, seq) + struct.pack("<H6x", dialect.events[event])
    common = _EVENT.pack(_EVENT_SIZE, 0, dialect.events[event]).ljust(_EVENT_SIZE, b"\0")
    return HEADER.pack(dialect.vm_event, len(common), seq) + common


def vcpu_event(dialect: Dialect, event: Event, seq: int, vcpu: int, arch: bytes, data: bytes) -> bytes:
    """An event of a vCPU."""
    if dialect.split_ids:
        head = _EVENT_V12.pack(dialect.events[event], _EVENT_SIZE, vcpu, 0)
    else:
        head = _EVENT.pack(_EVENT_SIZE, vcpu, dialect.events[event])
    body = head + arch + data
    return HEADER.pack(dialect.vcpu_event, len(body), seq) + body


def event_reply(dialect: Dialect, event: Event, body: bytes) -> Reply:
    """The tool's answer to `event`; Broken if it is none."""
    extra = dialect.reply_layout(event)
    limit = _REPLY_SIZE + (ctypes.sizeof(extra) if extra is not None else 0)
    if not _REPLY_SIZE <= len(body) <= limit:
        raise Broken(f"the reply to a {event.name} event has {len(body)} bytes")
    number, _, padding1, padding2 = _REPLY.unpack_from(body, _VCPU.size)
    if padding1 or padding2:
        raise Broken("padding of an event's reply is not zero")
    if number not in kvmi.EVENTS[event].actions:
        raise Broken(f"action {number} is none for a {event.name} event")
    plain = _PLAIN[number]
    if extra is kvmi.PfReplyLibkvmi:
        _check_unused(body[_REPLY_SIZE:])
    elif extra is kvmi.NewValueReply:
        return Reply(plain.action, int.from_bytes(body[_REPLY_SIZE : _REPLY_SIZE + 8], "little"))
    return plain


def _check_unused(extra: bytes) -> None:
    """libkvmi can ask for other data than memory has and for single-stepping in the reply to a PF event, which are not offered."""
    reply = kvmi.PfReplyLibkvmi.from_buffer_copy(extra.ljust(ctypes.sizeof(kvmi.PfReplyLibkvmi), b"\0"))
    if reply.ctx_size or reply.singlestep:
        raise Broken("the reply to a PF event wants other data than memory has")


def vcpu_header(body: bytes) -> tuple[int, bool]:
    """Index of the vCPU, and whether the padding is zero."""
    vcpu, padding1, padding2 = _VCPU.unpack(body[: _VCPU.size].ljust(_VCPU.size, b"\0"))
    return vcpu, not (padding1 or padding2)
