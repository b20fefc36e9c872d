"""Real guests are fetched once, before the first test that boots one."""

from __future__ import annotations

import pytest

from softkvm.cli import guest


@pytest.fixture(scope="session", autouse=True)
def fetched_guests() -> None:
    """Both kernels and busybox in the cache."""
    for flavour in guest.KERNELS:
        guest.prepare(flavour)
