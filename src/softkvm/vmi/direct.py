"""A tool in the VM's own process: the channel of `Client` without a socket, and the guest's memory as it lies there.

`with DirectLink.open(machine.introspect_direct) as link, Client(link) as vm:` is all that differs from a tool with a socket. Events are
queued by the vCPUs' threads; a command to a vCPU is done by a thread of the link, because the vCPU may not run now, and nobody waits for
ever.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Command, ErrorCode, Event, EventCommon, EventReply, Header, Reply, VcpuHeader
from softkvm.vmi.errors import ChannelClosed
from softkvm.vmi.memory import BufferMemory, Memory

_DIALECT = kvmi.V9
_HEADER, _VCPU, _REPLY = ctypes.sizeof(Header), ctypes.sizeof(VcpuHeader), ctypes.sizeof(EventReply)


class Server(Protocol):
    """KVM's end of the session (`kvm.DirectChannel`)."""

    def request(self, command: Command, body: bytes = b"", vcpu: int | None = None) -> bytes:
        """Do a command; OSError with KVMI's error number, ValueError for what is none."""
        ...

    def reply(self, vcpu: int, seq: int, action: Action = Action.CONTINUE, new_value: int = 0) -> None:
        """Answer an event."""
        ...

    def memory(self) -> Iterable[tuple[int, memoryview]]:
        """Guest memory by guest-physical address."""
        ...

    def detach(self) -> None:
        """End the session."""
        ...


Opener = Callable[[Callable[[Any], Reply | None]], Server]
"""`Machine.introspect_direct`: takes the function that gets every event."""


class DirectLink:
    """As `channel.Channel`; a context manager."""

    def __init__(self) -> None:
        """See `open()`."""
        self._server: Server | None = None
        self._incoming: queue.SimpleQueue[tuple[Header, bytes] | None] = queue.SimpleQueue()
        self._work: queue.SimpleQueue[tuple[int, Command, bytes, int] | None] = queue.SimpleQueue()
        self._closed = False

    @classmethod
    def open(cls, opener: Opener) -> DirectLink:
        """Begin a session; OSError(EEXIST) if the VM is introspected already."""
        link = cls()
        link._server = opener(link._event)
        threading.Thread(target=link._do_work, daemon=True, name="softkvm-vmi").start()
        return link

    def memory(self) -> Memory | None:
        """The guest's memory, in this process."""
        return BufferMemory(self._server.memory()) if self._server is not None else None

    def send(self, message: bytes) -> None:
        """As `Channel.send()`."""
        server = self._server
        if self._closed or server is None:
            raise ChannelClosed("the introspection session has ended")
        header, body = Header.from_buffer_copy(message), message[_HEADER:]
        if header.id == _DIALECT.event_reply:
            self._answer(server, header.seq, body)
            return
        command = _DIALECT.by_id[header.id]
        if command in _DIALECT.vcpu_commands:
            vcpu = VcpuHeader.from_buffer_copy(body).vcpu
            self._work.put((header.seq, command, body[_VCPU:], vcpu))
        else:
            self._do(server, header.seq, command, body, None)

    def _answer(self, server: Server, sequence: int, body: bytes) -> None:
        reply = EventReply.from_buffer_copy(body, _VCPU)
        value = int.from_bytes(body[_VCPU + _REPLY :], "little")
        try:
            server.reply(VcpuHeader.from_buffer_copy(body).vcpu, sequence, Action(reply.action), value)
        except ValueError as error:
            raise ChannelClosed(str(error)) from error

    def _do(self, server: Server, sequence: int, command: Command, body: bytes, vcpu: int | None) -> None:
        try:
            answer = bytes(ErrorCode()) + server.request(command, body, vcpu)
        except ConnectionResetError:
            self._incoming.put(None)
            return
        except OSError as error:
            answer = bytes(ErrorCode(err=-(error.errno or kvmi.Error.EINVAL)))
        except ValueError:
            answer = bytes(ErrorCode(err=-kvmi.Error.EINVAL))
        header = Header(id=_DIALECT.commands[command], size=len(answer) & 0xFFFF, seq=sequence)
        self._incoming.put((header, answer))

    def _do_work(self) -> None:
        while (work := self._work.get()) is not None:
            if self._server is not None:
                self._do(self._server, *work)

    def _event(self, event: Any) -> None:
        """Runs on the vCPU's thread; the event is answered later."""
        data = bytes(event.data) if event.data is not None else b""
        common = EventCommon(size=ctypes.sizeof(EventCommon), vcpu=event.vcpu, event=_DIALECT.events[Event(event.event)])
        ctypes.memmove(ctypes.addressof(common) + EventCommon.arch.offset, event.arch(), ctypes.sizeof(kvmi.EventArch))
        body = bytes(common) + data
        self._incoming.put((Header(id=_DIALECT.vcpu_event, size=len(body), seq=event.seq), body))

    def receive(self, timeout: float | None = None) -> tuple[Header, bytes] | None:
        """As `Channel.receive()`."""
        try:
            message = self._incoming.get(timeout=timeout) if timeout is None or timeout > 0 else self._incoming.get_nowait()
        except queue.Empty:
            return None
        if message is None:
            raise ChannelClosed("the introspection session has ended")
        return message

    def take_descriptors(self) -> list[int]:
        """None come here."""
        return []

    def close(self) -> None:
        """As `Channel.close()`."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
            if self._server is not None:
                self._server.detach()

    def __enter__(self) -> DirectLink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
