"""Stand-ins for what a device is wired to."""

from __future__ import annotations

import ctypes
import mmap

from softkvm.vmm.timers import TimerQueue


class Wire:
    """An interrupt output that remembers its level and every change."""

    def __init__(self) -> None:
        self.changes: list[bool] = []

    def __call__(self, level: bool) -> None:
        self.changes.append(level)

    @property
    def level(self) -> bool:
        return bool(self.changes) and self.changes[-1]


class Time:
    """A clock in ns that stands still, and its timers."""

    def __init__(self, now: int = 5_000_000_000) -> None:
        self.now = now
        self.timers = TimerQueue(lambda: self.now)

    def pass_(self, ns: int) -> None:
        """Let time pass, ringing every timer on the way at its own time."""
        end = self.now + ns
        while (deadline := self.timers.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.timers.run_expired()
        self.now = end


class Ram:
    """A device of plain bytes that records its accesses."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)
        self.log: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


class HostBlock(mmap.mmap):
    """Host memory for guest RAM, without an engine."""

    address: int

    def __new__(cls, size: int) -> HostBlock:
        block = super().__new__(cls, -1, size)
        block.address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        return block
