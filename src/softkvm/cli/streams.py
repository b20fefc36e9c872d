"""Where a guest's output goes: a descriptor of ours, a bounded capture, or the tail that is shown when a guest dies.

Sinks are called on the vCPU's thread. A sink that blocks makes the guest wait, which is how `softkvm run -- CMD | slow-reader` should
behave, until a signal asks it to give up; none of them grows without bound, whatever a guest prints.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable

CAPTURE_LIMIT = 16 << 20
TAIL_LIMIT = 64 << 10

Sink = Callable[[bytes], None]


class Surrender:
    """A switch that makes every sink stop waiting for its reader; thrown once, from any thread."""

    def __init__(self) -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """A descriptor that is readable once the switch is thrown."""
        return self._event

    def throw(self) -> None:
        """Let no sink wait any more."""
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._event)


class DescriptorSink:
    """Writes to a file descriptor, waiting for its reader until `surrender` is thrown.

    Calls `on_broken` once when the reader has gone, and drops what follows.
    """

    def __init__(self, descriptor: int, surrender: Surrender, on_broken: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._surrender = surrender
        self._on_broken = on_broken
        self._broken = False

    def __call__(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._broken:
            given_up, _, _ = select.select([self._surrender], [self._descriptor], [])
            if given_up:
                return
            try:
                # A pipe that can be written takes this much without blocking (POSIX, PIPE_BUF).
                view = view[os.write(self._descriptor, view[: select.PIPE_BUF]) :]
            except BrokenPipeError:
                self._broken = True
                self._on_broken()


class Capture:
    """Keeps the first CAPTURE_LIMIT bytes; `truncated` tells whether there were more."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.truncated = False

    def __call__(self, data: bytes) -> None:
        room = CAPTURE_LIMIT - len(self._data)
        self._data += data[:room]
        self.truncated |= len(data) > room

    @property
    def text(self) -> str:
        """The kept bytes as text, with anything that is not UTF-8 replaced."""
        return self._data.decode(errors="replace")


class ConsoleTail:
    """Keeps the last TAIL_LIMIT bytes of the console, and hands all of them on to `forward`."""

    def __init__(self, forward: Sink | None = None) -> None:
        self._forward = forward
        self._data = bytearray()

    def __call__(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * TAIL_LIMIT:
            del self._data[:-TAIL_LIMIT]
        if self._forward is not None:
            self._forward(data)

    @property
    def data(self) -> bytes:
        """The last of the console's output."""
        return bytes(self._data[-TAIL_LIMIT:])
