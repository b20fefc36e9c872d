"""fw_cfg: numbers about the machine for software that runs before, or without, an operating system.

Source of truth: QEMU `docs/specs/fw_cfg.rst` (the traditional interface, without DMA): a word written to the selector port chooses an item,
and each byte read from the data port is its next one; behind the end of an item, and for unknown items, there are zeros.
"""

from __future__ import annotations

import struct
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.state import Record

SIGNATURE, ID, RAM_SIZE, CPUS, MAX_CPUS = 0x00, 0x01, 0x03, 0x05, 0x0F
_TRADITIONAL = 1 << 0

_SELECTOR = 0  # offset of the word; the data byte is at 1


class FwCfgState(Record, frozen=True, kw_only=True):
    """The reading position."""

    version: Literal[1] = 1
    selected: Annotated[int, Meta(ge=0, le=0xFFFF)]
    position: Annotated[int, Meta(ge=0)]


class FwCfg:
    """The two ports."""

    def __init__(self, ram: int, cpus: int) -> None:
        """`ram` is in bytes."""
        self._items = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", _TRADITIONAL),
            RAM_SIZE: struct.pack("<Q", ram),
            CPUS: struct.pack("<H", cpus),
            MAX_CPUS: struct.pack("<H", cpus),
        }
        self._selected = 0
        self._position = 0

    def read(self, offset: int, size: int) -> int:
        """The next byte of the item; a word at the selector reads as 0, as it is write-only."""
        if offset == _SELECTOR:
            return 0
        item = self._items.get(self._selected, b"")
        if self._position >= len(item):
            return 0
        self._position += 1
        return item[self._position - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item; the data port cannot be written."""
        if offset == _SELECTOR and size == 2:
            self._selected, self._position = value, 0

    def save(self) -> FwCfgState:
        """The whole state."""
        return FwCfgState(selected=self._selected, position=self._position)

    def restore(self, state: FwCfgState) -> None:
        """Take over a saved state."""
        self._selected, self._position = state.selected, state.position
