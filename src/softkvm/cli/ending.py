"""How a run ended, and the exit status that follows from it (`status.py` lists them all)."""

from __future__ import annotations

from dataclasses import dataclass

from softkvm.cli import status
from softkvm.vmm import Stop, StopReason

_BY_REASON = {
    StopReason.POWER_OFF: status.SUCCESS,
    StopReason.RESET: status.SUCCESS,
    StopReason.UNTIL: status.SUCCESS,
    StopReason.INTERRUPTED: status.SUCCESS,  # Ctrl-A X
    StopReason.PANIC: status.GUEST_FAILED,
    StopReason.TRIPLE_FAULT: status.GUEST_FAILED,
    StopReason.TIMEOUT: status.TIMED_OUT,
    StopReason.INTERNAL_ERROR: status.OWN_ERROR,
}


@dataclass(frozen=True)
class Ending:
    """Why the machine stopped, and what else decides the status.

    `signal` is the number of a signal that was sent to us; `output_lost` says that the reader of our output has gone; `command_status` is
    the exit status that a command in the guest reported.
    """

    stop: Stop
    signal: int | None = None
    output_lost: bool = False
    command_status: int | None = None

    def exit_status(self, has_command: bool) -> int:
        """The exit status; `has_command` if the guest was booted to run one, which makes a reset before its end a failure."""
        if self.output_lost:
            return status.BROKEN_PIPE
        if self.signal is not None:
            return status.SIGNALLED + self.signal
        if self.command_status is not None:
            return self.command_status
        if has_command and self.stop.reason is StopReason.RESET:
            return status.GUEST_FAILED
        if self.stop.reason is StopReason.EXIT:
            return status.GUEST_FAILED if self.stop.status is None else self.stop.status & 0xFF
        return _BY_REASON[self.stop.reason]

    @property
    def is_guest_failure(self) -> bool:
        """Whether the guest itself failed, so that a person wants to know where."""
        return self.signal is None and self.command_status is None and not self.output_lost
