"""Saved state of devices: one typed, versioned record per device.

A record is complete: restored into a fresh device of the same wiring it gives a device that the guest cannot tell from the saved one, and
that saves to equal bytes. Times are stored relative to the moment of saving, because the clock of the restoring host is another one.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from softkvm.vmm.errors import StateError


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the device records; a subclass narrows `version` to the literal that its device writes."""

    version: int


_State = TypeVar("_State", bound=Record)


class Stateful(Protocol[_State]):
    """A device that can be saved and restored."""

    def save(self) -> _State:
        """The whole state now."""
        ...

    def restore(self, state: _State) -> None:
        """Take over a state; interrupt outputs follow."""
        ...


def encode(state: Record) -> bytes:
    """The record as bytes (MessagePack)."""
    return msgspec.msgpack.encode(state)


def decode(data: bytes, kind: type[_State]) -> _State:
    """A record of type `kind` from `encode()`d bytes; StateError if they are not one of a version this device knows."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StateError(f"not a {kind.__name__} record of this version: {error}") from error
