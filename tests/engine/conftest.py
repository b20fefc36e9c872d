"""Machines for tests of the engine; without a built engine these tests are skipped."""

from __future__ import annotations

import pytest

from softkvm import _engine
from tests.helpers.one_core import Machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The stand-in for an engine that is not built cannot execute anything."""
    if hasattr(_engine, "EngineBug"):
        return
    for item in items:
        if "tests/engine" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="softkvm._engine is not built"))


@pytest.fixture(params=["cascadelake", "epyc"])
def machine(request: pytest.FixtureRequest) -> Machine:
    """A machine of each CPU model."""
    return Machine(request.param)
