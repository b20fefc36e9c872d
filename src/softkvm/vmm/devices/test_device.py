"""The test device: registers by which a test suite provokes exits, moves interrupt lines and makes KVM forget a page.

Behaviour as kvm-unit-tests (`x86/README`, `lib/x86/`) know it from QEMU's pc-testdev. It is on the board only if asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.bus import Device
from softkvm.vmm.irq import SetLevel
from softkvm.vmm.layout import TEST_MEMORY
from softkvm.vmm.state import Record


class TestDeviceState(Record, frozen=True, kw_only=True):
    """What a guest has left in the registers and in the memory."""

    version: Literal[1] = 1
    ioport: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
    memory: bytes


class TestDevice:
    """Four ranges, each a device for a bus: `ioport`, `flush`, `lines` and `memory`."""

    __test__ = False  # no test case, whatever pytest makes of its name

    def __init__(self, lines: Sequence[SetLevel], flush_page: Callable[[int], None]) -> None:
        """`lines` are the interrupt outputs by number; `flush_page(address)` drops the nested mapping of a page."""
        self._ioport = _Bytes(4)
        self._memory = _Bytes(TEST_MEMORY.size)
        self.ioport: Device = self._ioport
        self.memory: Device = self._memory
        self.flush: Device = _Trigger(lambda offset, value: flush_page(value))
        self.lines: Device = _Trigger(lambda offset, value: lines[offset](bool(value)))

    def save(self) -> TestDeviceState:
        """The whole state; the levels of the lines are KVM's."""
        return TestDeviceState(ioport=self._ioport.read(0, 4), memory=bytes(self._memory.content))

    def restore(self, state: TestDeviceState) -> None:
        """Take over a saved state."""
        self._ioport.write(0, 4, state.ioport)
        self._memory.content[:] = state.memory[: TEST_MEMORY.size].ljust(TEST_MEMORY.size, b"\0")


class _Bytes:
    """Bytes that keep what was written."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)

    def read(self, offset: int, size: int) -> int:
        """The bytes."""
        return int.from_bytes(self.content[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Keep the bytes."""
        self.content[offset : offset + size] = value.to_bytes(size, "little")


class _Trigger:
    """Registers that act when they are written, and read as zero."""

    def __init__(self, act: Callable[[int, int], None]) -> None:
        self._act = act

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Act on the value."""
        self._act(offset, value)
