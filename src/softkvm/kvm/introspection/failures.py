"""The ways in which a message fails."""

from __future__ import annotations

from softkvm.uapi.kvmi import Error


class Refused(Exception):
    """A command that fails; the tool gets the number."""

    def __init__(self, error: Error) -> None:
        """`error` is sent negated."""
        super().__init__(error.name)
        self.error = error


class Broken(Exception):
    """The peer does not keep to the protocol, or is gone: the channel is closed. The text says what it did."""
