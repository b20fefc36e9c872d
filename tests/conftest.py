"""What all tests share: hypothesis profiles, the softkvm plugin where softkvm is not installed, and fair turns for real guests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

settings.register_profile("default", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure(config: pytest.Config) -> None:
    """An installed softkvm registers its plugin by entry point; a source tree on the path has none."""
    if not config.pluginmanager.has_plugin("softkvm"):
        from softkvm.testing import plugin

        config.pluginmanager.register(plugin, "softkvm")
