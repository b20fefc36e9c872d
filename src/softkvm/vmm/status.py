"""A machine at a glance."""

from __future__ import annotations

import enum

import msgspec


class RunState(enum.Enum):
    """What the vCPUs do."""

    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    """The guest has suspended itself to RAM."""
    STOPPED = "stopped"
    """Nobody is inside `Machine.run()`."""


class Status(msgspec.Struct, frozen=True):
    """A machine at a glance."""

    state: RunState
    cpu: str
    """The model with the features that were switched."""
    cpus: int
    memory: int
    """Bytes of RAM."""
