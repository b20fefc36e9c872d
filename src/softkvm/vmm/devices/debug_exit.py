"""Debug exit: a port through which a test guest ends the run with a status.

Behaviour as kvm-unit-tests (`lib/x86/io.c`, `x86/README`) know it from QEMU's isa-debug-exit: writing v gives the exit status v << 1 | 1,
so 0 never means success by accident. Reads give zero.
"""

from __future__ import annotations

from collections.abc import Callable


class DebugExit:
    """The port; it keeps no state."""

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        """`on_exit(status)` ends the run."""
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """Always 0."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """End the run."""
        self._on_exit(value << 1 | 1)
