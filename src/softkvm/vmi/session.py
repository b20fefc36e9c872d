"""The client's half of the protocol without any input or output: bytes to send, and what received messages mean.

Source of truth: `Documentation/virt/kvm/kvmi.rst` of the series "VM introspection" v9. The server is not trusted: a message that is not the
protocol's ends the session with ChannelClosed.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Command, Dialect, Event, EventReply, Header, VcpuHeader
from softkvm.vmi.errors import ChannelClosed, CommandFailed
from softkvm.vmi.events import CLASSES, Answer, Unhook, VcpuEvent
from softkvm.vmi.requests import Request, T, decode

HEADER_SIZE = ctypes.sizeof(Header)
_ERROR_SIZE = ctypes.sizeof(kvmi.ErrorCode)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the command with this sequence number."""

    sequence: int
    error: int
    data: bytes


Incoming = Reply | VcpuEvent | Unhook


class Session:
    """Numbers messages and knows the dialect."""

    def __init__(self, dialect: Dialect, answer: Answer) -> None:
        """`answer` sends the reply to an event that `receive()` made."""
        self.dialect = dialect
        self._answer = answer
        self._sequence = 0

    def knows(self, command: Command) -> bool:
        """Whether the dialect has a command at all."""
        return command in self.dialect.commands

    def encode(self, request: Request[T]) -> tuple[int, bytes]:
        """Sequence number and bytes of a command; CommandFailed with ENOSYS if the dialect has no such command."""
        dialect = self.dialect
        number = dialect.commands.get(request.command)
        if number is None:
            raise CommandFailed(f"the dialect {dialect.name} has no command {request.command.name}", kvmi.Error.ENOSYS)
        body = request.body(dialect)
        if request.command in dialect.vcpu_commands:
            body = bytes(VcpuHeader(vcpu=request.vcpu or 0)) + body
        if len(body) > kvmi.MAX_MESSAGE:
            raise CommandFailed(f"{request.command.name} of {len(body)} bytes is too long", kvmi.Error.E2BIG)
        self._sequence = self._sequence + 1 & 0xFFFF_FFFF
        return self._sequence, bytes(Header(id=number, size=len(body), seq=self._sequence)) + body

    def encode_answer(self, event: VcpuEvent, action: Action, data: bytes) -> bytes:
        """The reply to an event."""
        reply = EventReply(action=action, event=self.dialect.events[event.kind])
        body = bytes(VcpuHeader(vcpu=event.vcpu)) + bytes(reply) + data
        return bytes(Header(id=self.dialect.event_reply, size=len(body), seq=event.sequence)) + body

    def result(self, request: Request[T], reply: Reply) -> T:
        """The typed answer; CommandFailed if the server refused."""
        if reply.error:
            raise CommandFailed(f"the server refused {request.command.name}: {error_name(-reply.error)}", -reply.error)
        return request.parse(self.dialect, reply.data)

    def receive(self, header: Header, body: bytes) -> Incoming:
        """What a message is; ChannelClosed if it is none of the protocol's."""
        dialect = self.dialect
        if header.id == dialect.vcpu_event or header.id == dialect.vm_event:
            return self._event_v12(header, body) if dialect.split_ids else self._event(header.seq, body)
        if len(body) < _ERROR_SIZE:
            raise ChannelClosed(f"the server sent a reply of {len(body)} bytes")
        return Reply(header.seq, decode(kvmi.ErrorCode, body).err, body[_ERROR_SIZE:])

    def _event(self, sequence: int, body: bytes) -> Incoming:
        common = decode(kvmi.EventCommon, body)
        return self._make(sequence, common.event, common.vcpu, common.arch, body[max(common.size, 8) :], len(body))

    def _event_v12(self, header: Header, body: bytes) -> Incoming:
        kind, start = decode(kvmi.EventHeaderV12, body).event, ctypes.sizeof(kvmi.EventHeaderV12)
        if header.id == self.dialect.vm_event:
            return self._make(header.seq, kind, 0, kvmi.EventArch(), b"", len(body))
        common = decode(kvmi.EventCommonV12, body, start)
        return self._make(header.seq, kind, common.vcpu, common.arch, body[start + max(common.size, 8) :], len(body))

    def _make(self, sequence: int, number: int, vcpu: int, arch: kvmi.EventArch, data: bytes, length: int) -> Incoming:
        kind = self.dialect.event_by_id.get(number)
        if kind is Event.UNHOOK:
            return Unhook()
        if kind is None or length < ctypes.sizeof(kvmi.EventArch):
            raise ChannelClosed(f"the server sent an event {number} of {length} bytes")
        layout = kvmi.EVENTS[kind].data
        return CLASSES[kind](kind, sequence, vcpu, arch, decode(layout, data) if layout is not None else None, self._answer)


def error_name(code: int) -> str:
    """The name of a positive error number of KVMI's."""
    try:
        return kvmi.Error(code).name
    except ValueError:
        return f"error {code}"
