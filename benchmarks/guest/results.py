"""What was measured, and what follows from it: medians, and the ratio of pairs that were taken one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from benchmarks.guest.cases import Case

TCG, SOFTKVM, NATIVE = "TCG", "softkvm", "native"
WALL, CPU = "wall", "CPU"
MEMORY_ALLOWANCE = 64.0
"""MiB that softkvm may use beyond what TCG uses."""


class Sample(NamedTuple):
    """One measurement."""

    wall: float
    """Nanoseconds of an operation, by the clock of whoever did it."""
    cpu: float
    """Nanoseconds of the host's CPUs that the machine's process has used for an operation."""
    checksum: str
    """Of what was computed."""
    memory: float
    """Peak of the process, MiB."""
    events: dict[str, float]
    """What the machine counted for an operation."""


class Ratio(NamedTuple):
    """How many times as fast softkvm is: the median over the rounds, the least and the greatest."""

    median: float
    low: float
    high: float


class Result(msgspec.Struct, frozen=True):
    """One case: nanoseconds of an operation by round, and peak MiB, each by who ran it."""

    name: str
    group: str
    goal: float
    operation: str
    clock: str
    """Which times are compared, WALL or CPU."""
    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]
    memory: dict[str, float]
    events: dict[str, float]
    """What softkvm counted for an operation of the last round, by name."""

    def median(self, who: str) -> float | None:
        """Nanoseconds by the case's clock, None where nobody measured it; without a machine the two clocks are one."""
        times = self.wall if who == NATIVE else self._times()
        return statistics.median(times[who]) if who in times else None

    def ratio(self) -> Ratio:
        """TCG's time to softkvm's of the same round."""
        times = self._times()
        ratios = [tcg / softkvm for tcg, softkvm in zip(times[TCG], times[SOFTKVM], strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def _times(self) -> dict[str, list[float]]:
        return self.wall if self.clock == WALL else self.cpu

    def is_met(self) -> bool:
        """Whether the ratio is what the goal asks."""
        return self.ratio().median >= self.goal

    def extra_memory(self) -> float:
        """MiB that softkvm used beyond TCG."""
        return self.memory[SOFTKVM] - self.memory[TCG]


class Report(msgspec.Struct, frozen=True):
    """A whole run: when and where, and its results in the order of the table."""

    facts: dict[str, str]
    rounds: int
    results: list[Result]


class ChecksumError(Exception):
    """Two runs of one case computed different things."""


def check(name: str, samples: dict[str, list[Sample]]) -> None:
    """Raise ChecksumError if not all have computed the same."""
    seen = {who: sorted({sample.checksum for sample in taken}) for who, taken in samples.items()}
    if len({checksum for checksums in seen.values() for checksum in checksums}) > 1:
        text = ", ".join(f"{who} {' '.join(checksums)}" for who, checksums in seen.items())
        raise ChecksumError(f"{name} computes different things: {text}")


def summarise(case: Case, samples: dict[str, list[Sample]]) -> Result:
    """The result of a case from its samples by who ran it; ChecksumError if they disagree."""
    check(case.name, samples)
    wall = {who: [sample.wall for sample in taken] for who, taken in samples.items()}
    machines = {who: taken for who, taken in samples.items() if who != NATIVE}
    cpu = {who: [sample.cpu for sample in taken] for who, taken in machines.items()}
    memory = {who: max(sample.memory for sample in taken) for who, taken in machines.items()}
    return Result(
        case.name, case.group, case.goal, case.operation, CPU if case.is_busy else WALL, wall, cpu, memory, samples[SOFTKVM][-1].events
    )


def duration(nanoseconds: float | None) -> str:
    """A time for people, three digits and a unit."""
    if nanoseconds is None:
        return ""
    for limit, unit in ((1e3, "ns"), (1e6, "µs"), (1e9, "ms")):
        if nanoseconds < limit * 0.9995:
            return f"{three_digits(nanoseconds / limit * 1e3)} {unit}"
    return f"{three_digits(nanoseconds / 1e9)} s"


def three_digits(value: float) -> str:
    """A positive number, rounded."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"


def groups(results: Sequence[Result]) -> list[str]:
    """The groups that occur, in order."""
    return list(dict.fromkeys(result.group for result in results))
