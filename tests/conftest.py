"""What all tests share: hypothesis profiles, the softkvm plugin where it is not installed, a stand-in where the engine is not built."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

import softkvm

# The same examples in every run, so that a change is judged and no luck; `make fuzz` looks for new ones. Nothing depends
# on how fast the machine is, and the fixtures that a test's examples share are meant to be shared.
ALL = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("default", ALL, max_examples=50, derandomize=True, database=None)
settings.register_profile("thorough", ALL, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

if importlib.util.find_spec("softkvm._engine") is None:
    from tests import fake_engine

    sys.modules["softkvm._engine"] = fake_engine
    softkvm._engine = fake_engine


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[None]:
    """A place of the tests' own for control sockets, with a path that is short enough for one."""
    with tempfile.TemporaryDirectory(prefix="softkvm-") as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", directory)
        yield


def pytest_configure(config: pytest.Config) -> None:
    """An installed softkvm registers its plugin by entry point; a source tree on the path has none."""
    if not config.pluginmanager.has_plugin("softkvm"):
        from softkvm.testing import plugin

        config.pluginmanager.register(plugin, "softkvm")
