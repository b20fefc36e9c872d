"""The two ways by which software resets a PC.

The reset control register at 0xCF9 (Intel ICH9 data sheet, 13.7.5), which the FADT also names as the ACPI reset register; and the pulse
command of the 8042 keyboard controller at 0x64 (IBM PC/AT technical reference). There is no other part of a keyboard controller: its
status always says "input buffer empty", so that a guest which waits before it pulses does not wait for long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta

from softkvm.vmm.state import Record

RST_SYS = 1 << 1  # system reset instead of INIT
RST_CPU = 1 << 2  # going from 0 to 1 does it
FULL_RST = 1 << 3
RST_MASK = RST_SYS | RST_CPU | FULL_RST

RESET_VALUE = RST_SYS | RST_CPU
"""What the FADT tells the guest to write."""

PULSE_RESET = 0xFE  # pulse output line 0, which is the CPU's reset
PULSE_COMMANDS = 0xF0  # commands 0xF0..0xFF pulse the lines whose bits are 0


class ResetState(Record, frozen=True, kw_only=True):
    """The reset control register."""

    version: Literal[1] = 1
    control: Annotated[int, Meta(ge=0, le=RST_MASK)]


class ResetControl:
    """Port 0xCF9."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """`on_reset()` resets the machine."""
        self._on_reset = on_reset
        self._control = 0

    def read(self, offset: int, size: int) -> int:
        """The register as last written."""
        return self._control

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset if RST_CPU goes from 0 to 1."""
        rising = value & ~self._control & RST_CPU
        self._control = value & RST_MASK
        if rising:
            self._on_reset()

    def save(self) -> ResetState:
        """The whole state."""
        return ResetState(control=self._control)

    def restore(self, state: ResetState) -> None:
        """Take over a saved state."""
        self._control = state.control & RST_MASK


class KeyboardReset:
    """Port 0x64; it keeps no state."""

    def __init__(self, on_reset: Callable[[], None]) -> None:
        """`on_reset()` resets the machine."""
        self._on_reset = on_reset

    def read(self, offset: int, size: int) -> int:
        """The status register: nothing to read, ready for a command."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Reset on a pulse of line 0; other commands have nobody to act on them."""
        if value & PULSE_COMMANDS == PULSE_COMMANDS and not value & ~PULSE_RESET & 0x0F:
            self._on_reset()
