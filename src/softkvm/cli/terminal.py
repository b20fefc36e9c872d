"""The host's terminal as the guest's console: raw mode that is always undone, and the Ctrl-A keys.

Source of truth: termios(3); the keys are those that QEMU's and kvmtool's users have in their fingers.
"""

from __future__ import annotations

import os
import shutil
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

ESCAPE = 0x01  # Ctrl-A

HELP = "Ctrl-A X quits, Ctrl-A H shows this help, Ctrl-A Ctrl-A sends Ctrl-A to the guest."


class Key(Enum):
    """What a person asked of softkvm itself with a Ctrl-A key."""

    QUIT = "x"
    HELP = "h"


class EscapeKeys:
    """Splits typed bytes into input for the guest and keys for softkvm; remembers a Ctrl-A at the end of a piece."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> Iterator[bytes | Key]:
        """What `data` means, in order. A Ctrl-A with an unknown key is dropped, with the key."""
        pending = bytearray()
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    pending.append(byte)
                continue
            self._escaped = False
            if byte == ESCAPE:
                pending.append(ESCAPE)
            elif (key := _KEYS.get(byte)) is not None:
                if pending:
                    yield bytes(pending)
                    pending.clear()
                yield key
        if pending:
            yield bytes(pending)


_KEYS = {ord(case): key for key in Key for case in (key.value, key.value.upper())}


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Raw mode on the terminal `descriptor` for the time of the block; the old settings return however the block ends."""
    saved = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, saved)


def environment() -> str:
    """The kernel parameters that tell the guest's /init the kind and size of this terminal (the kernel hands them on as environment)."""
    size = shutil.get_terminal_size()
    kind = os.environ.get("TERM", "vt100")
    # The value becomes part of a command line: only what terminfo names consist of may pass.
    safe_kind = kind if kind.replace("-", "").replace("+", "").replace(".", "").isalnum() else "vt100"
    return f"TERM={safe_kind} SOFTKVM_ROWS={size.lines} SOFTKVM_COLUMNS={size.columns}"
