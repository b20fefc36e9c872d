"""The host's side of `softkvm run -- CMD`: the guest's /init (`guest/init.sh`) is the other side and shows the lines in use.

Whatever arrives here was written by a guest and may be anything: an unknown or endless line is dropped, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

STDOUT_PORT, STDERR_PORT, CONTROL_PORT = 1, 2, 3

# Half of the guest's terminal buffer (N_TTY_BUF_SIZE, 4096), so that a block and its heading always fit.
BLOCK_SIZE = 2048
_LINE_LIMIT = 64
_STATUS = re.compile(rb"status (\d{1,3})")


class ControlLine:
    """Parser of what the guest writes to the control port.

    `on_shell` is called when the guest's shell is about to read the console, `on_stdin` when the command can take a block of its
    standard input, and `on_status` once, with the command's exit status (0..255), when it has ended.
    """

    def __init__(self, on_shell: Callable[[], None], on_stdin: Callable[[], None], on_status: Callable[[int], None]) -> None:
        self._on_shell = on_shell
        self._on_stdin = on_stdin
        self._on_status = on_status
        self._partial = b""
        self._ended = False

    def write(self, data: bytes) -> None:
        """Take bytes from the guest, in whatever pieces they come."""
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest[-_LINE_LIMIT:]
        for line in lines:
            self._line(line.rstrip(b"\r"))

    def _line(self, line: bytes) -> None:
        if self._ended:
            return
        if line == b"shell":
            self._on_shell()
        elif line == b"stdin":
            self._on_stdin()
        elif (match := _STATUS.fullmatch(line)) and int(match[1]) <= 255:
            self._ended = True
            self._on_status(int(match[1]))


def frame(block: bytes) -> bytes:
    """`block` as the guest expects it on its input line; an empty block is the end of the input."""
    return b"%d\n" % len(block) + block
