"""The hosts of the skip matrix: silicon with and without NRIP save, and KVM with and without its use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """A silicon, and KVM's use of it. Intel silicon has no NRIPS to leave out, and its module no such parameter."""

    model: str
    saves_next_rip: bool
    nrips: bool

    def __str__(self) -> str:
        return f"{self.model}{'' if self.saves_next_rip else '-nrip'} nrips={int(self.nrips)}"

    @property
    def vendor(self) -> str:
        return "amd" if self.model == "epyc" else "intel"


HOSTS = [
    Host("cascadelake", True, True),
    Host("cascadelake", True, False),
    Host("epyc", True, True),
    Host("epyc", True, False),
    Host("epyc", False, True),
    Host("epyc", False, False),
]
