"""A KVMI server for the client's tests: a table of answers, in a thread behind a socket pair.

It knows no virtual machine; `softkvm.kvm.introspection` is the real one, and the guests' tests use it.
"""

from __future__ import annotations

import ctypes
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Dialect, ErrorCode, Header

Handler = Callable[[bytes], "bytes | int | None"]
"""Takes a request's body; gives reply data, a positive error number, or None for no answer."""


class FakeServer:
    """Answers commands and sends events; `received` keeps what came in, by command or, for event replies, None."""

    def __init__(self, dialect: Dialect = kvmi.V9) -> None:
        self.dialect = dialect
        self.handlers: dict[Command, Handler] = {Command.VM_GET_INFO: lambda body: bytes(kvmi.GetInfoReply(vcpu_count=2))}
        self.received: list[tuple[Command | None, int, bytes]] = []
        self.arrived = threading.Condition()
        self.client_end, self.server_end = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.server_end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.server_end.close()
        self.client_end.close()

    def send(self, number: int, sequence: int, body: bytes) -> None:
        """Any message."""
        self.server_end.sendall(bytes(Header(id=number, size=len(body), seq=sequence)) + body)

    def send_event(
        self, event: kvmi.Event, sequence: int = 1, vcpu: int = 0, data: bytes = b"", arch: kvmi.EventArch | None = None
    ) -> None:
        """An event as the dialect lays it out."""
        arch = arch or kvmi.EventArch()
        number = self.dialect.events[event]
        if self.dialect.split_ids:
            common = kvmi.EventCommonV12(size=ctypes.sizeof(kvmi.EventCommonV12), vcpu=vcpu, arch=arch)
            body = bytes(kvmi.EventHeaderV12(event=number)) + bytes(common) + data
        else:
            body = bytes(kvmi.EventCommon(size=ctypes.sizeof(kvmi.EventCommon), vcpu=vcpu, event=number, arch=arch)) + data
        self.send(self.dialect.vcpu_event, sequence, body)

    def wait_for(self, command: Command | None) -> bytes:
        """The body of the next request (None: event reply) that comes or has come; each is given once."""
        with self.arrived:
            while True:
                for number, (name, _, body) in enumerate(self.received):
                    if name is command:
                        del self.received[number]
                        return body
                assert self.arrived.wait(60), f"no {command} came"

    def _serve(self) -> None:
        with suppress(OSError):
            while header := self._exactly(ctypes.sizeof(Header)):
                message = Header.from_buffer_copy(header)
                body = self._exactly(message.size)
                self._take(message.id, message.seq, body)

    def _take(self, number: int, sequence: int, body: bytes) -> None:
        command = None if number == self.dialect.event_reply else self.dialect.by_id[number]
        with self.arrived:
            self.received.append((command, sequence, body))
            self.arrived.notify_all()
        if command is None:
            return
        handler = self.handlers.get(command)
        answer = handler(body) if handler is not None else kvmi.Error.ENOSYS
        if isinstance(answer, int):
            self.send(number, sequence, bytes(ErrorCode(err=-answer)))
        elif answer is not None:
            self.send(number, sequence, bytes(ErrorCode()) + answer)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.server_end.recv(size - len(data))
            if not piece:
                return b""
            data += piece
        return data
