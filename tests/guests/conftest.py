"""Real guests are fetched once, before the first test that boots one."""

from __future__ import annotations

import fcntl

import pytest

from softkvm.cli import guest


@pytest.fixture(scope="session", autouse=True)
def fetched_guests() -> None:
    """Both kernels and busybox in the cache; workers of pytest-xdist take turns, so that only the first one fetches."""
    directory = guest.default_directory()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for flavour in guest.KERNELS:
            guest.prepare(flavour)
