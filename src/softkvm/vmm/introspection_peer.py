"""A tool that listens: connect to it, shake hands, give it the VM, and start again when it leaves.

Answers to QEMU's `accel/kvm/vmi.c` and `include/sysemu/vmi-handshake.h` of the KVM-VMI tree, and to libkvmi's side of it. The VMM says who
it is; the tool answers with the hash of a secret that both know. Nothing that the tool does here harms the machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import logging
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn
from uuid import UUID

from softkvm.uapi import kvmi
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.introspection import AUTO, Introspection, check_dialect, recognise

HANDSHAKE_TIMEOUT = 10.0
"""Seconds (QEMU's `handshake_timeout`)."""
RECONNECT = 5.0
"""Seconds between two attempts to reach a tool."""
_VSOCK = "vsock:"
_U32 = (1 << 32) - 1
_NAME_SIZE = 63

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PeerOptions:
    """`--introspection SOCKET[,dialect=D][,key=SECRET][,reply-timeout=S][,reconnect=S]`."""

    address: str
    """A path, or `vsock:CID:PORT`."""
    dialect: str = AUTO
    key: str | None = None
    reply_timeout: float | None = None
    reconnect: float = RECONNECT

    @classmethod
    def parse(cls, text: str) -> PeerOptions:
        """From the command line; ConfigError, one sentence."""
        address, *settings = text.split(",")
        if not address:
            raise ConfigError("`--introspection` needs the socket on which the tool listens")
        values: dict[str, str] = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if name not in ("dialect", "key", "reply-timeout", "reconnect") or not equals:
                raise ConfigError(f"{setting!r} is no setting of `--introspection`; there are dialect, key, reply-timeout and reconnect")
            values[name] = value
        timeout = values.get("reply-timeout")
        options = cls(
            address,
            check_dialect(values.get("dialect", AUTO)),
            values.get("key"),
            None if timeout is None else _seconds("reply-timeout", timeout),
            _seconds("reconnect", values.get("reconnect", str(RECONNECT))),
        )
        options.resolve()
        return options

    def resolve(self) -> tuple[socket.AddressFamily, str | tuple[int, int]]:
        """Address family and address; ConfigError."""
        if not self.address.startswith(_VSOCK):
            return socket.AF_UNIX, self.address
        try:
            cid, port = (int(part, 0) for part in self.address.removeprefix(_VSOCK).split(":"))
        except ValueError:
            cid = port = -1
        if not (0 <= cid <= _U32 and 0 <= port <= _U32):
            raise ConfigError(f"{self.address!r} is no vsock address; write vsock:CID:PORT")
        return socket.AF_VSOCK, (cid, port)


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name} is a number of seconds, not {text!r}")
    return value


class HandshakeError(Exception):
    """The tool does not shake hands as it should; one sentence."""


class Peer:
    """Keeps a machine connected to a tool, in a thread of its own, from `start()` to `close()`."""

    def __init__(self, introspection: Introspection, options: PeerOptions, name: str, uuid: UUID, max_gpa: int) -> None:
        """`name` and `uuid` are what the tool is told, and the highest guest-physical address if it speaks v12."""
        self._introspection = introspection
        self._options = options
        self._hello = _hello(options.dialect, name, uuid, max_gpa)
        self._closing = threading.Event()
        self._current: socket.socket | None = None
        self._thread = threading.Thread(target=self._live, name="softkvm-introspection", daemon=True)
        introspection.reply_timeout = options.reply_timeout

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def close(self) -> None:
        """Un-hook, and stop to connect."""
        self._closing.set()
        if self._current is not None:
            with suppress(OSError):  # not connected, or closed
                self._current.shutdown(socket.SHUT_RDWR)
        self._introspection.end()
        self._thread.join(2 * HANDSHAKE_TIMEOUT)

    def _live(self) -> None:
        said = ""
        while not self._closing.is_set():
            try:
                self._serve_one()
                said = ""
            except (OSError, HandshakeError, EOFError) as error:
                reason = (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
                if reason != said:
                    _log.warning("no introspection by %s: %s", self._options.address, reason)
                    said = reason
            self._closing.wait(self._options.reconnect)

    def _serve_one(self) -> None:
        family, address = self._options.resolve()
        with socket.socket(family, socket.SOCK_STREAM) as peer:
            self._current = peer
            if self._closing.is_set():
                return
            peer.settimeout(HANDSHAKE_TIMEOUT)
            peer.connect(address)
            self.shake_hands(peer)
            peer.settimeout(None)
            self._hook(peer)
        self._introspection.wait_for_end()

    def _hook(self, peer: socket.socket) -> None:
        dialect = self._options.dialect
        if dialect == AUTO:
            peer.settimeout(HANDSHAKE_TIMEOUT)
            dialect = recognise(peer)
            peer.settimeout(None)
        if not self._closing.is_set():
            self._introspection.hook(peer, dialect)

    def shake_hands(self, peer: socket.socket) -> None:
        """Say who we are, and look who answers; HandshakeError, OSError, EOFError."""
        peer.sendall(self._hello)
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        size = int.from_bytes(_receive(peer, 4, deadline), "little")
        needed = ctypes.sizeof(kvmi.HandshakeFromTool)
        if not needed <= size <= kvmi.HANDSHAKE_MAX:
            raise HandshakeError(f"the tool's answer claims to have {size} bytes")
        answer = kvmi.HandshakeFromTool.from_buffer_copy(size.to_bytes(4, "little") + _receive(peer, needed - 4, deadline))
        _receive(peer, size - needed, deadline)
        if self._options.key is None:
            _log.warning("introspection without a key: any tool that listens on %s is accepted", self._options.address)
        elif not hmac.compare_digest(bytes(answer.cookie_hash), hashlib.sha1(self._options.key.encode()).digest()):
            raise HandshakeError("the tool does not know the key")


def _hello(dialect: str, name: str, uuid: UUID, max_gpa: int) -> bytes:
    layout = kvmi.HandshakeToToolV12 if dialect == kvmi.V12.name else kvmi.HandshakeToTool
    base = kvmi.HandshakeToTool(struct_size=ctypes.sizeof(layout), start_time=int(time.time()), name=name.encode()[:_NAME_SIZE])
    base.uuid[:] = list(uuid.bytes)
    return bytes(base) if layout is kvmi.HandshakeToTool else bytes(kvmi.HandshakeToToolV12(base=base, max_gpa=max_gpa))


def _receive(peer: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly so many bytes, in small pieces if they come so, and in time."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            _late()
        peer.settimeout(left)
        piece = peer.recv(size - len(data))
        if not piece:
            raise EOFError("the tool has hung up")
        data += piece
    return data


def _late() -> NoReturn:
    raise HandshakeError("the tool does not answer in time")
