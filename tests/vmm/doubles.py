"""Stand-ins for what a device is wired to."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref

from softkvm.host.clock import VirtualClock
from softkvm.vmm.timers import Timers


class Wire:
    """An interrupt output that remembers its level and every change."""

    def __init__(self) -> None:
        self.changes: list[bool] = []

    def __call__(self, level: bool) -> None:
        self.changes.append(level)

    @property
    def level(self) -> bool:
        return bool(self.changes) and self.changes[-1]


class Time(VirtualClock):
    """A clock in ns that stands still, and its timers."""

    def __init__(self) -> None:
        super().__init__()
        self.timers = Timers(self, threading.RLock())

    @property
    def now(self) -> int:
        """The time; setting it rings no timer."""
        return self.monotonic_ns()

    @now.setter
    def now(self, ns: int) -> None:
        self._now = ns


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
    fd: int

    def __new__(cls, size: int) -> HostBlock:
        descriptor = os.memfd_create("ram")
        os.ftruncate(descriptor, size)
        block = super().__new__(cls, descriptor, size)
        block.fd = descriptor
        block.address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        weakref.finalize(block, os.close, descriptor)
        return block
