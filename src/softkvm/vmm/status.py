"""What is to be seen of a machine from outside: its state at a glance, and its counters."""

from __future__ import annotations

import enum

import msgspec


class Stats(msgspec.Struct, frozen=True):
    """Counters of a machine since it was made, summed over its vCPUs."""

    seconds: float
    """Wall time inside `run()`."""
    instructions: int
    """Instructions that the guest has retired."""
    engine: dict[str, int]
    """What else the silicon counts: blocks of code, TLB, page walks."""
    exits: dict[str, int]
    """VM exits by the vendor's name of the reason, most frequent first."""
    user_exits: dict[str, int]
    """Returns of KVM_RUN by exit reason, most frequent first."""
    vcpu: dict[str, int]
    """KVM's own counters, by the names of its statistics."""


class RunState(enum.Enum):
    """What the vCPUs do."""

    RUNNING = "running"
    PAUSED = "paused"
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
