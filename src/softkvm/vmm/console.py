"""What the guest prints on ttyS0: a bounded record, a watch for text that a caller waits for, and a watch for a Linux panic."""

from __future__ import annotations

import re

DEFAULT_LIMIT = 16 << 20
"""How much output is kept, in bytes; the oldest goes first."""
WINDOW = 4096
"""A text that is waited for is found only if it is no longer than this, in bytes."""

_PANIC = re.compile(rb"^(?:\[ *\d+\.\d+\](?:\[[^\]]*\])? )?(Kernel panic - not syncing: [^\r\n]*)")
_PANIC_END = re.compile(rb"^(?:\[ *\d+\.\d+\](?:\[[^\]]*\])? )?---\[ end Kernel panic")


class Console:
    """Collects the output; `feed()` tells its caller what the new bytes completed."""

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        """Keep the last `limit` bytes, or a little more."""
        self._limit = limit
        self._data = bytearray()
        self._dropped = 0
        self._consumed = 0
        self._wanted: re.Pattern[bytes] | None = None
        self._line = bytearray()
        self.panic: str | None = None
        """The message of the last Linux panic, or None."""
        self.halted = False
        """True once Linux has printed the end of its panic report: it will not reboot by itself."""

    @property
    def data(self) -> bytes:
        """The output that is kept."""
        return bytes(self._data)

    def feed(self, data: bytes) -> str | None:
        """Add output; returns the text that was waited for if it is complete now."""
        self._data += data
        if len(self._data) > self._limit + WINDOW:
            excess = len(self._data) - self._limit
            del self._data[:excess]
            self._dropped += excess
        self._watch_for_panic(data)
        return self._search()

    def expect(self, wanted: str | bytes | re.Pattern[str] | re.Pattern[bytes] | None) -> str | None:
        """Wait for this text in output after the last one found; returns it if it is there already. None waits for nothing."""
        self._wanted = None if wanted is None else _compile(wanted)
        return self._search(everything=True)

    def _search(self, everything: bool = False) -> str | None:
        if self._wanted is None:
            return None
        start = max(self._consumed - self._dropped, 0)
        if not everything:
            start = max(start, len(self._data) - WINDOW)
        found = self._wanted.search(self._data, start)
        if found is None:
            return None
        self._wanted = None
        self._consumed = self._dropped + found.end()
        return found.group().decode(errors="replace")

    def _watch_for_panic(self, data: bytes) -> None:
        *complete, rest = data.split(b"\n")
        for piece in complete:
            self._line += piece[:WINDOW]
            if found := _PANIC.match(self._line):
                self.panic = found.group(1).decode(errors="replace")
            elif self.panic is not None and _PANIC_END.match(self._line):
                self.halted = True
            self._line.clear()
        if len(self._line) < WINDOW:
            self._line += rest[:WINDOW]


def _compile(wanted: str | bytes | re.Pattern[str] | re.Pattern[bytes]) -> re.Pattern[bytes]:
    """A pattern over bytes; text is taken as UTF-8."""
    if isinstance(wanted, str):
        return re.compile(re.escape(wanted.encode()))
    if isinstance(wanted, bytes):
        return re.compile(re.escape(wanted))
    source = wanted.pattern
    if isinstance(source, str):
        return re.compile(source.encode(), wanted.flags & ~re.UNICODE)
    return re.compile(source, wanted.flags)
