"""Why a run of the machine came to its end."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class StopReason(enum.Enum):
    """What ended `Machine.run()`."""

    POWER_OFF = "power-off"
    """The guest entered the ACPI soft-off state."""
    RESET = "reset"
    """The guest asked the board for a reset."""
    PANIC = "panic"
    """A Linux guest printed its panic message and then halted or rebooted."""
    TRIPLE_FAULT = "triple fault"
    """A vCPU shut down because it could not deliver an exception."""
    TIMEOUT = "timeout"
    """The time given to `run()` is over; the guest can run on."""
    UNTIL = "until"
    """The text that `run()` waited for is on the console; the guest can run on."""
    EXIT = "exit"
    """The guest wrote to the debug-exit port; `Stop.status` is the status it asked for."""
    INTERRUPTED = "interrupted"
    """`Machine.stop()` was called; the guest can run on."""
    INTERNAL_ERROR = "internal error"
    """KVM cannot run the vCPU any further; `Stop.detail` says why."""

    @property
    def final(self) -> bool:
        """True if the guest is over; False if `run()` can continue it."""
        return self not in _RESUMABLE


_RESUMABLE = frozenset({StopReason.TIMEOUT, StopReason.UNTIL, StopReason.INTERRUPTED})


@dataclass(frozen=True)
class Stop:
    """The end of a run: what, on which vCPU and where in the guest."""

    reason: StopReason
    vcpu: int
    """Id of the vCPU that caused the stop; 0 if none did."""
    rip: int
    """Its instruction pointer."""
    detail: str
    """One line for a person."""
    status: int | None = None
    """Exit status of an `EXIT`, otherwise None."""
