"""What a machine counts, and what tells whether two runs were the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from softkvm import kvm
from softkvm.vmm.exits import REASON_NAMES, ExitHandler

_INTERPRETED = "interpreted_"
_SHOWN = 10
"""Instructions that host code leaves to the interpreter, as many as are shown by name."""


class Repetition(msgspec.Struct, frozen=True):
    """The marks of a run of a deterministic machine: a run of the same machine with the same seed has the same."""

    seed: int
    instructions: int
    """Instructions that the guest has retired."""
    virtual_seconds: float
    """Time that has passed for the guest."""
    exits: str
    """Hash of all VM exits: which vCPU left, why, when, and with which registers."""
    memory: str
    """Hash of the guest's RAM."""


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
    repetition: Repetition | None = None
    """Of a deterministic machine."""


def collect(seconds: float, vcpus: Sequence[kvm.Vcpu], handlers: Sequence[ExitHandler]) -> Stats:
    """The counters now; `handlers[n]` goes with `vcpus[n]`."""
    engine, exits, user_exits, counters = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for handler, vcpu in zip(handlers, vcpus, strict=True):
        engine.update(vcpu.engine_counters())
        exits.update(vcpu.exits_by_reason())
        user_exits.update({REASON_NAMES[reason]: count for reason, count in handler.counts.items() if count})
        counters.update(vcpu.statistics())
    instructions = engine.pop("instructions", 0)
    return Stats(seconds, instructions, _shown(engine), dict(exits.most_common()), dict(user_exits.most_common()), dict(+counters))


def _shown(engine: Counter[str]) -> dict[str, int]:
    """The counters of the silicon; of the instructions that host code leaves to the interpreter, the most frequent ones."""
    by_name = {name for name in engine if name.startswith(_INTERPRETED)}
    often = Counter({name: engine[name] for name in by_name}).most_common(_SHOWN)
    return {name: count for name, count in engine.items() if name not in by_name} | dict(often)
