"""Where a guest's output goes: a descriptor of ours, a bounded capture, or the tail that is shown when a guest dies.

Sinks are called on the vCPU's thread. A sink that blocks makes the guest wait, which is how `softkvm run -- CMD | slow-reader` should
behave; none of them grows without bound, whatever a guest prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable

CAPTURE_LIMIT = 16 << 20
TAIL_LIMIT = 64 << 10

Sink = Callable[[bytes], None]


class DescriptorSink:
    """Writes to a file descriptor; calls `on_broken` once when the reader has gone, and drops what follows."""

    def __init__(self, descriptor: int, on_broken: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._on_broken = on_broken
        self._broken = False

    def __call__(self, data: bytes) -> None:
        view = memoryview(data)
        while view and not self._broken:
            try:
                view = view[os.write(self._descriptor, view) :]
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
