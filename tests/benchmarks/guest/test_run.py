"""A short case under both machines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.guest import machines, run
from benchmarks.guest.cases import Case
from benchmarks.guest.results import NATIVE, SOFTKVM, TCG


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.skipif(shutil.which(machines.QEMU) is None or shutil.which("gcc") is None, reason="needs QEMU and gcc")
def test_both_machines_compute_what_the_host_does(tmp_path: Path) -> None:
    cases = [Case("crc32", "g", 1.0, "byte", "case crc32 1 1", is_native=True), Case("echo", "g", 1.0, "run", "shell echo hello")]
    crc, echo = run.measure(cases, 1, None, tmp_path)
    assert set(crc.wall) == {NATIVE, TCG, SOFTKVM}
    assert set(echo.wall) == set(echo.memory) == {TCG, SOFTKVM}
    assert min(echo.memory.values()) > 32, "a machine has memory of its guest's"
