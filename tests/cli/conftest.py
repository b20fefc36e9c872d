"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest

from tests.helpers.fake_machine import FakeMachine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[FakeMachine]:
    """The class of the machines that `softkvm run` will make; a test sets its `guest` and looks at `made`."""

    fresh = type("Machine", (FakeMachine,), {"made": [], "guest": FakeMachine.wait_stopped})
    monkeypatch.setattr("softkvm.cli.run.Machine", fresh)
    monkeypatch.setattr("softkvm.cli.selftest.Machine", fresh)
    return fresh
