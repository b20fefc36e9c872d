"""The monitor of a running VM: a table of commands behind a socket.

Each connection has a thread, so that a command that takes its time (`save`) keeps nobody else waiting; handlers are called on it. A peer
can make its own connection end, and nothing else.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar, overload

import msgspec

from softkvm.vmm.errors import ConfigError, StateError
from softkvm.vmm.monitor import client, names
from softkvm.vmm.monitor.wire import REQUEST_LIMIT, Channel, CommandError, Descriptors, Failure, NoArguments, ProtocolError, Reply, Request

MOST_CONNECTIONS = 16
_OUT_OF_DESCRIPTORS_PAUSE = 0.1
"""Seconds until accept(2) is tried again when it failed for want of something."""

_Arguments = TypeVar("_Arguments", bound=msgspec.Struct)
Handler = Callable[[_Arguments, Descriptors], object]
"""Carries a command out: gets its arguments and the descriptors that wait, and returns what JSON can hold, None for nothing. What it raises
of CommandError, OSError, ConfigError and StateError is the answer; anything else is a bug."""


class Monitor:
    """Serves one VM's commands from `start()` to `close()`; a context manager of both."""

    def __init__(self, name: str, on_bug: Callable[[Exception], object]) -> None:
        """Take the name `name`; `on_bug` is told, on some thread, what a handler raised by mistake. ConfigError."""
        self.name = name
        self._on_bug = on_bug
        self._commands: dict[str, tuple[type[Any], Handler[Any]]] = {}
        self._lock = threading.Lock()
        self._channels: dict[Channel, threading.Thread] = {}
        self._closing = threading.Event()
        self._listener = names.listen(name)
        self._acceptor = threading.Thread(target=self._accept, name=f"monitor-{name}", daemon=True)

    @staticmethod
    def connect(name: str | None = None, timeout: float | None = client.TIMEOUT) -> client.Connection:
        """Reach the monitor of a running VM: see `client.connect()`."""
        return client.connect(name, timeout)

    @overload
    def command(self, name: str) -> Callable[[Handler[NoArguments]], Handler[NoArguments]]: ...
    @overload
    def command(self, name: str, arguments: type[_Arguments]) -> Callable[[Handler[_Arguments]], Handler[_Arguments]]: ...
    def command(self, name: str, arguments: type[Any] = NoArguments) -> Callable[[Handler[Any]], Handler[Any]]:
        """Register what is called with it as the handler of the command `name`, whose arguments are a Struct of type `arguments`."""

        def register(handler: Handler[Any]) -> Handler[Any]:
            self._commands[name] = (arguments, handler)
            return handler

        return register

    def start(self) -> None:
        """Begin to answer."""
        self._acceptor.start()

    def close(self) -> None:
        """Give the name back and end every connection, after the commands that are under way; nothing happens the second time."""
        if self._closing.is_set():
            return
        self._closing.set()
        with suppress(OSError):  # it wakes accept(2), and says that the socket is not connected
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._acceptor.ident is not None:
            self._acceptor.join()
        names.release(self.name, self._listener)
        with self._lock:
            open_channels = dict(self._channels)
        for channel in open_channels:
            with suppress(OSError):  # the peer was quicker
                channel.socket.shutdown(socket.SHUT_RDWR)
        for thread in open_channels.values():
            thread.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connected, _ = self._listener.accept()
            except OSError:  # closing, or out of descriptors
                self._closing.wait(_OUT_OF_DESCRIPTORS_PAUSE)
                continue
            channel = Channel(connected, REQUEST_LIMIT)
            thread = threading.Thread(target=self._serve, args=(channel,), name=self._acceptor.name, daemon=True)
            with self._lock:
                full = len(self._channels) >= MOST_CONNECTIONS
                if not full:
                    self._channels[channel] = thread
            if full:
                channel.close()
            else:
                thread.start()

    def _serve(self, channel: Channel) -> None:
        try:
            while (line := channel.receive()) is not None:
                channel.send(self._answer(line, channel.descriptors))
        except ProtocolError as error:
            with suppress(OSError):
                channel.send(Reply(error=Failure("GenericError", str(error))))
        except OSError:  # the peer has gone, or we are closing
            pass
        finally:
            with self._lock:
                del self._channels[channel]
            channel.close()

    def _answer(self, line: bytes, descriptors: Descriptors) -> Reply:
        try:
            request = msgspec.json.decode(line, type=Request)
            if request.execute not in self._commands:
                known = ", ".join(sorted(self._commands))
                return Reply(error=Failure("CommandNotFound", f"there is no command {request.execute!r}; there are {known}"))
            kind, handler = self._commands[request.execute]
            arguments = msgspec.json.decode(request.arguments, type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return Reply(error=Failure("GenericError", f"this is not a command: {error}"))
        try:
            value = handler(arguments, descriptors)
            return Reply(value={} if value is None else msgspec.to_builtins(value))
        except OSError as error:
            return Reply(error=Failure("GenericError", describe(error)))
        except (CommandError, ConfigError, StateError) as error:
            return Reply(error=Failure("GenericError", str(error)))
        except Exception as error:  # a bug of the handler's: the VM runs on, and whoever started it is told
            self._on_bug(error)
            return Reply(error=Failure("InternalError", f"this is a bug in softkvm ({type(error).__name__}: {error})"))

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def describe(error: OSError) -> str:
    """The file, where there is one, and what the system says."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename is not None else reason
