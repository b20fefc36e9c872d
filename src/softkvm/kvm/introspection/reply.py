"""What comes back: the tool's answer to an event, and the ways in which a command fails."""

from __future__ import annotations

from dataclasses import dataclass

from softkvm.uapi.kvmi import Action, Error


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an event; `new_value` is what a register shall get, of CR and MSR events."""

    action: Action
    new_value: int = 0


class Refused(Exception):
    """A command that fails; the tool gets the number."""

    def __init__(self, error: Error) -> None:
        """`error` is sent negated."""
        super().__init__(error.name)
        self.error = error


class Broken(Exception):
    """The peer does not keep to the protocol, or is gone: the channel is closed. The text says what it did."""
