"""The other end of a running VM's monitor."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec

from softkvm.vmm.monitor import names
from softkvm.vmm.monitor.wire import REPLY_LIMIT, Channel, CommandError, ProtocolError, Reply

TIMEOUT = 30.0
"""Seconds until a VM that does not answer is given up."""


class MonitorError(Exception):
    """There is no such VM, or it did not do what was asked; one plain sentence."""


class Connection:
    """A connection to the monitor of a running VM; a context manager, to be closed."""

    def __init__(self, name: str, connected: socket.socket) -> None:
        """Own `connected`, which leads to the VM `name`."""
        self.name = name
        self._channel = Channel(connected, REPLY_LIMIT)

    @property
    def pid(self) -> int:
        """Process of the VMM, as the kernel knows it."""
        credentials = self._channel.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little")

    def execute(self, command: str, arguments: msgspec.Struct | dict[str, Any] | None = None, descriptors: Sequence[int] = ()) -> Any:
        """What the VM answers to a command, as JSON's types; `descriptors` stay the caller's. MonitorError if it refuses or is gone."""
        try:
            self._channel.send({"execute": command, "arguments": arguments if arguments is not None else {}}, descriptors)
            line = self._channel.receive()
        except TimeoutError as error:
            raise MonitorError(f"the VM {self.name} does not answer") from error
        except (OSError, ProtocolError) as error:
            raise MonitorError(f"the connection to the VM {self.name} failed: {error}") from error
        if line is None:
            raise MonitorError(f"the VM {self.name} has ended")
        try:
            reply = msgspec.json.decode(line, type=Reply)
        except (msgspec.DecodeError, RecursionError) as error:
            raise MonitorError(f"the VM {self.name} gave an answer that is none: {error}") from error
        if reply.error is not msgspec.UNSET:
            raise MonitorError(f"the VM {self.name} refused {command}: {reply.error.desc}")
        return reply.value

    def take_descriptor(self) -> int:
        """The oldest descriptor that came with an answer, which the caller closes; MonitorError if there is none."""
        try:
            return self._channel.descriptors.take()
        except CommandError as error:
            raise MonitorError(f"the VM {self.name} sent no file descriptor") from error

    def close(self) -> None:
        """Leave."""
        self._channel.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def connect(name: str | None = None, timeout: float | None = TIMEOUT) -> Connection:
    """Reach the VM `name`, or the only one that runs; it has `timeout` seconds for each answer. ConfigError, MonitorError."""
    if name is None:
        name = _only_one(names.running())
    path = names.path_of(name)
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.settimeout(timeout)
    try:
        connected.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionRefusedError) as error:
        connected.close()
        raise MonitorError(f"no VM named {name} is running; {_running(names.running())}") from error
    except OSError as error:
        connected.close()
        raise MonitorError(f"the VM {name} cannot be reached: {error}") from error
    return Connection(name, connected)


def _only_one(found: Sequence[str]) -> str:
    if len(found) != 1:
        raise MonitorError("no VM is running" if not found else f"which VM? {_running(found)}")
    return found[0]


def _running(found: Sequence[str]) -> str:
    return f"there are {', '.join(found)}" if found else "none is"
