"""What travels on a monitor's socket: lines of JSON, and file descriptors beside them.

The messages are those of QEMU's QMP (`docs/interop/qmp-spec.txt`) without its greeting and events: `{"execute": NAME, "arguments": {...}}`
is answered by `{"return": VALUE}` or `{"error": {"class": ..., "desc": ...}}`. Descriptors come as SCM_RIGHTS (unix(7)); a stream has no
message boundaries to bind them to, so they wait until a command takes them, oldest first.

The peer may be anybody who can open the socket. Whatever it sends costs at most one line and a few descriptors of memory.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

REQUEST_LIMIT = 1 << 16
"""Bytes of a request, with its end of line."""
REPLY_LIMIT = 1 << 20
"""Bytes of a reply."""
MOST_DESCRIPTORS = 8
"""How many may wait on one connection."""

_PIECE = 1 << 14


class ProtocolError(Exception):
    """What the peer sent cannot be followed by anything: the connection is over. One sentence."""


class CommandError(Exception):
    """A command cannot be carried out; the message is one sentence for the person who gave it."""


class NoArguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of a command that takes none."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One command."""

    execute: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class Failure(msgspec.Struct, rename={"kind": "class"}):
    """Why a command failed; the classes are GenericError, CommandNotFound, and InternalError for a bug of the server's."""

    kind: str
    desc: str


class Reply(msgspec.Struct, rename={"value": "return"}, omit_defaults=True):
    """The answer to a command: one of the two is there."""

    value: Any = msgspec.UNSET
    error: Failure | msgspec.UnsetType = msgspec.UNSET


class Descriptors:
    """What a peer has sent and no command has taken yet."""

    def __init__(self) -> None:
        """None."""
        self._waiting: deque[int] = deque()

    def add(self, received: Iterable[int]) -> None:
        """Own the descriptors `received`; ProtocolError if more wait than anybody needs."""
        self._waiting.extend(received)
        if len(self._waiting) > MOST_DESCRIPTORS:
            raise ProtocolError(f"more than {MOST_DESCRIPTORS} file descriptors wait for a command that takes them")

    def take(self) -> int:
        """The oldest one, which the caller closes; CommandError if there is none."""
        if not self._waiting:
            raise CommandError("this command needs a file descriptor, sent with it as SCM_RIGHTS")
        return self._waiting.popleft()

    def close(self) -> None:
        """Close all that wait."""
        while self._waiting:
            os.close(self._waiting.popleft())


class Channel:
    """One end of a connection."""

    def __init__(self, connected: socket.socket, limit: int) -> None:
        """Own `connected`; a line that comes in has at most `limit` bytes."""
        self.socket = connected
        self.descriptors = Descriptors()
        self._limit = limit
        self._buffer = bytearray()

    def receive(self) -> bytes | None:
        """The next line that is not blank, or None when the peer has gone; OSError, ProtocolError."""
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= self._limit or (end < 0 and len(self._buffer) >= self._limit):
                raise ProtocolError(f"a line has at most {self._limit} bytes")
            if end >= 0:
                line = bytes(self._buffer[:end]).strip()
                del self._buffer[: end + 1]
                searched = 0
                if line:
                    return line
            else:
                searched = len(self._buffer)
                if not self._fill():
                    return None

    def _fill(self) -> bool:
        """Read a piece; False at the end."""
        data, received, flags, _ = socket.recv_fds(self.socket, _PIECE, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        self.descriptors.add(received)
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError(f"at most {MOST_DESCRIPTORS} file descriptors come with one message")
        self._buffer += data
        return bool(data)

    def send(self, message: msgspec.Struct | dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Send one message, and `descriptors`, which stay the caller's, with its first bytes; OSError."""
        line = msgspec.json.encode(message) + b"\n"
        sent = socket.send_fds(self.socket, [line], list(descriptors)) if descriptors else 0
        self.socket.sendall(line[sent:])

    def close(self) -> None:
        """Close the connection and every descriptor that waits."""
        self.socket.close()
        self.descriptors.close()
