"""Tiny guests need the engine; they are skipped where it is not built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from softkvm import _engine, kvm, silicon
from tests.helpers.hosts import Host
from tests.helpers.long_guest import Guest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The stand-in for an engine that is not built cannot execute anything."""
    if hasattr(_engine, "EngineBug"):
        return
    for item in items:
        if "tests/kvm_guests" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="softkvm._engine is not built"))


Boot = Callable[..., Guest]


def system_of(host: Host) -> kvm.System:
    """KVM on new silicon of a host."""
    features = {} if host.saves_next_rip else {"nrip-save": False}
    return kvm.System(silicon.Model(host.model, features), kvm.Parameters(nrips=host.nrips))


@pytest.fixture
def boot() -> Iterator[Boot]:
    """Make guests on new silicon of a host."""
    guests: list[Guest] = []

    def make(host: Host, code: bytes, **registers: int) -> Guest:
        guests.append(Guest(system_of(host), code, **registers))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
