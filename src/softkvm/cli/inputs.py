"""Where a guest's input comes from: a person's keyboard, a pipe into the console, or a pipe into a command.

Each input owns one descriptor of ours, says whether it can take bytes now, and turns what was read into what the guest receives. An
empty piece is the end of the input.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from typing import Protocol

from softkvm.cli import command, terminal
from softkvm.cli.streams import Surrender

_CONSOLE_PIECE = 4096
_END_OF_TRANSMISSION = b"\x04"

Send = Callable[[bytes], None]


class Input(Protocol):
    """One source of guest input."""

    descriptor: int
    piece_size: int  # the most bytes to read at once

    def wanted(self) -> bool:
        """Whether the guest can take a piece now."""

    def feed(self, data: bytes) -> None:
        """Hand over a piece that was read; empty at the end."""


class Keyboard:
    """A terminal in raw mode: everything goes to the guest but the Ctrl-A keys. A terminal that goes away quits."""

    piece_size = _CONSOLE_PIECE

    def __init__(self, descriptor: int, send: Send, quit_: Callable[[], None]) -> None:
        self.descriptor = descriptor
        self._send = send
        self._quit = quit_
        self._keys = terminal.EscapeKeys()

    def wanted(self) -> bool:
        return True

    def feed(self, data: bytes) -> None:
        if not data:
            self._quit()
        for item in self._keys.feed(data):
            if isinstance(item, bytes):
                self._send(item)
            elif item is terminal.Key.QUIT:
                self._quit()
            else:
                sys.stderr.write(f"\r\n{terminal.HELP}\r\n")


class ConsolePipe:
    """A pipe or file into the console; its end is typed as Ctrl-D.

    Before the guest's shell reads the line the kernel may drop what arrives, so a guest that says when it is ready (ours does) is
    waited for: `ready` starts the flow.
    """

    piece_size = _CONSOLE_PIECE

    def __init__(self, descriptor: int, send: Send, is_ready: bool) -> None:
        self.descriptor = descriptor
        self._send = send
        self._is_open = is_ready

    def ready(self) -> None:
        """The guest reads the console from now on."""
        self._is_open = True

    def wanted(self) -> bool:
        return self._is_open

    def feed(self, data: bytes) -> None:
        if not data:
            self._is_open = False
        self._send(data or _END_OF_TRANSMISSION)


class CommandInput:
    """The standard input of a command in the guest: one block for each that the guest asks for."""

    piece_size = command.BLOCK_SIZE

    def __init__(self, descriptor: int, send: Send) -> None:
        self.descriptor = descriptor
        self._send = send
        self._requested = False

    def request(self) -> None:
        """The guest has consumed the last block."""
        self._requested = True

    def wanted(self) -> bool:
        return self._requested

    def feed(self, data: bytes) -> None:
        self._requested = False
        self._send(command.frame(data))


class Prompt:
    """Feeds an input on the guest's own thread at the moment at which the guest asks for it: at the same point of each run.

    The guest stands still meanwhile. Pieces are full, up to the last one, however their writer divides them.
    """

    def __init__(self, source: CommandInput | ConsolePipe, surrender: Surrender) -> None:
        """`surrender` ends a wait for a writer."""
        self._source = source
        self._surrender = surrender

    def serve(self) -> None:
        """Hand over what the guest can take now."""
        while self._source.wanted() and (piece := self._read()) is not None:
            self._source.feed(piece)

    def _read(self) -> bytes | None:
        descriptor, piece = self._source.descriptor, b""
        while len(piece) < self._source.piece_size:
            ready, _, _ = select.select([descriptor, self._surrender.fileno()], [], [])
            if self._surrender.fileno() in ready:
                return None
            data = os.read(descriptor, self._source.piece_size - len(piece))
            if not data:
                break
            piece += data
        return piece
