"""How messages travel: a connected stream socket, or whatever has the same few methods.

The tool listens and the VMM connects, or somebody hands over a socket that is connected already. Source of truth of the handshake: QEMU's
`qemu_vmi_to_introspector` and `qemu_vmi_from_introspector`, see `softkvm.uapi.kvmi`.
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import os
import select
import socket
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import HandshakeFromTool, HandshakeToTool, Header
from softkvm.vmi.errors import ChannelClosed
from softkvm.vmi.memory import Memory
from softkvm.vmi.session import HEADER_SIZE

_MOST_DESCRIPTORS = 16
_ANCILLARY = socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS)
_CHUNK = 1 << 18
_WITHIN_A_MESSAGE = 15.0
"""Seconds that a message may stand still before it is whole."""
_VSOCK = "vsock:"
_NEEDED_OF_HANDSHAKE = 32
"""Bytes up to the name: what every VMM sends."""


class Channel(Protocol):
    """Carries whole messages in order."""

    def send(self, message: bytes) -> None:
        """Send one message; ChannelClosed if the other end is gone."""
        ...

    def receive(self, timeout: float | None = None) -> tuple[Header, bytes] | None:
        """The next message; None after `timeout` seconds without one; ChannelClosed if there will be none."""
        ...

    def memory(self) -> Memory | None:
        """The guest's memory if it lies in this process."""
        ...

    def take_descriptors(self) -> list[int]:
        """Open file descriptors that came with the messages received so far; the caller closes them."""
        ...

    def close(self) -> None:
        """End the session; nothing happens the second time."""
        ...


class SocketChannel:
    """A stream socket; it belongs to the channel from now on."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.settimeout(None)
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._descriptors: list[int] = []
        self._chunk = memoryview(bytearray(_CHUNK))
        self._buffer = bytearray()

    def fileno(self) -> int:
        """Of the socket, for select(2)."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """As `Channel.send()`."""
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise ChannelClosed(f"the VM is gone: {error.strerror}") from error

    def receive(self, timeout: float | None = None) -> tuple[Header, bytes] | None:
        """As `Channel.receive()`; the time-out is for the beginning of a message."""
        if len(self._buffer) < HEADER_SIZE and not self._fill(HEADER_SIZE, timeout):
            return None
        header = Header.from_buffer_copy(self._buffer)
        end = HEADER_SIZE + header.size
        if len(self._buffer) < end and not self._fill(end, _WITHIN_A_MESSAGE):
            raise ChannelClosed("the VM has stopped in the middle of a message")
        body = bytes(self._buffer[HEADER_SIZE:end])
        del self._buffer[:end]
        return header, body

    def _fill(self, size: int, timeout: float | None) -> bool:
        try:
            while len(self._buffer) < size:
                if timeout is not None and not self._poll.poll(timeout * 1000):
                    return False
                length, ancillary, _, _ = self._socket.recvmsg_into([self._chunk], _ANCILLARY)
                self._keep(ancillary)
                if not length:
                    raise ChannelClosed("the VM has closed the introspection channel")
                self._buffer += self._chunk[:length]
        except OSError as error:
            raise ChannelClosed(f"the VM is gone: {error.strerror}") from error
        return True

    def _keep(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) // 4 * 4])
                self._descriptors += numbers
        while len(self._descriptors) > _MOST_DESCRIPTORS:
            os.close(self._descriptors.pop())

    def memory(self) -> Memory | None:
        """It lies elsewhere."""
        return None

    def take_descriptors(self) -> list[int]:
        """As `Channel.take_descriptors()`."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """As `Channel.close()`."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for descriptor in self.take_descriptors():
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Guest:
    """What a VMM says of its VM when it connects; `start_time` is in seconds of Unix time."""

    name: str
    uuid: uuid.UUID
    start_time: int


def listen(address: str | Path, *, key: bytes | None = None, timeout: float | None = None) -> tuple[SocketChannel, Guest]:
    """Wait on a new socket until a VMM connects, and shake hands; `address` is a path, whose name is gone afterwards, or `vsock:PORT`.

    `key` is the secret that the VMM may ask for. ChannelClosed if nobody comes in `timeout` seconds; OSError if the socket cannot be made,
    ValueError for what is no port.
    """
    with _bound(str(address)) as listener:
        try:
            listener.listen(1)
            listener.settimeout(timeout)
            connection, _ = listener.accept()
        except (TimeoutError, BlockingIOError) as error:
            raise ChannelClosed(f"no VM has connected to {address} in {timeout:g} seconds") from error
    return shake_hands(connection, key, timeout)


@contextmanager
def _bound(address: str) -> Iterator[socket.socket]:
    if address.startswith(_VSOCK):
        port = int(address.removeprefix(_VSOCK), 0)
        if not 0 <= port < 1 << 32:
            raise ValueError(f"{port} is no port of vsock")
        with closing(socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)) as listener:
            listener.bind((socket.VMADDR_CID_ANY, port))
            yield listener
        return
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(address)
        try:
            yield listener
        finally:
            os.unlink(address)


def shake_hands(connection: socket.socket, key: bytes | None = None, timeout: float | None = 10) -> tuple[SocketChannel, Guest]:
    """The tool's side of the handshake on a connected socket. ChannelClosed if the other end does not keep to it."""
    try:
        connection.settimeout(timeout)
        size = int.from_bytes(_exactly(connection, 4), "little")
        if not _NEEDED_OF_HANDSHAKE <= size <= kvmi.HANDSHAKE_MAX:
            raise ChannelClosed(f"the VM begins with a handshake of {size} bytes, which is none")
        data = size.to_bytes(4, "little") + _exactly(connection, size - 4)
        hello = HandshakeToTool.from_buffer_copy(data.ljust(ctypes.sizeof(HandshakeToTool), b"\0"))
        cookie = hashlib.sha1(key, usedforsecurity=False).digest() if key is not None else bytes(20)
        reply = HandshakeFromTool(struct_size=ctypes.sizeof(HandshakeFromTool))
        reply.cookie_hash[:] = list(cookie)
        connection.sendall(bytes(reply))
    except (ChannelClosed, OSError) as error:
        connection.close()
        if isinstance(error, ChannelClosed):
            raise
        raise ChannelClosed(f"the VM did not finish the handshake: {error.strerror or 'timed out'}") from error
    guest = Guest(bytes(hello.name).split(b"\0")[0].decode(errors="replace"), uuid.UUID(bytes=bytes(hello.uuid)), hello.start_time)
    return SocketChannel(connection), guest


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise ChannelClosed("the VM closed the connection during the handshake")
        data += piece
    return data
