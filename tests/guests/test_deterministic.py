"""Runs that repeat: the same seed gives the same boot of an unmodified kernel to the last instruction, exit and byte of RAM."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from softkvm.cli import guest
from softkvm.vmm import Machine
from softkvm.vmm.stats import Repetition

pytestmark = pytest.mark.guest

_SMP_IS_UP = "smpboot: Total of"
"""What the kernel says when all its CPUs have come up."""


def boot(
    cpus: int, seed: int, cpu: str = "cascadelake", until: str | None = _SMP_IS_UP, pause_at: str | None = None, tier: str = "auto"
) -> Repetition:
    """Boot up to a line of the console, with a stop on the way if asked for, or to power-off."""
    image = guest.prepare("cloud", command=["sh", "-c", "nproc; cat /proc/interrupts; od -N 8 /dev/urandom"])
    with Machine(image.kernel, image.initrd, "panic=-1", "256M", cpu, cpus=cpus, deterministic=seed, tier=tier) as vm:
        if pause_at is not None:
            assert vm.run(pause_at, timeout=600).reason.name == "UNTIL"
        stop = vm.run(until, timeout=600)
        assert stop.reason.name == ("UNTIL" if until else "POWER_OFF"), stop
        found = vm.stats().repetition
        assert found is not None
        return found


@pytest.mark.parametrize("cpus", [1, 2])
def test_two_boots_are_the_same(cpus: int) -> None:
    first = boot(cpus, seed=1)
    assert boot(cpus, seed=1) == first
    assert first.instructions > 10_000_000


@pytest.mark.parametrize("tier", ["interpreter", "translator"])
def test_every_tier_runs_the_same(tier: str) -> None:
    assert boot(2, seed=1, tier=tier) == boot(2, seed=1)


def test_another_seed_is_another_run() -> None:
    first, second = boot(2, seed=1), boot(2, seed=2)
    assert first.exits != second.exits
    assert first.memory != second.memory


@pytest.mark.slow
def test_a_run_in_two_parts_repeats_too() -> None:
    assert boot(2, seed=3, pause_at="Memory:") == boot(2, seed=3, pause_at="Memory:")


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_two_boots_to_power_off_are_the_same(cpus: int, cpu: str) -> None:
    assert boot(cpus, seed=5, cpu=cpu, until=None) == boot(cpus, seed=5, cpu=cpu, until=None)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["cascadelake", "epyc"])
def test_every_tier_runs_the_same_to_power_off(cpu: str) -> None:
    runs = [boot(2, seed=6, cpu=cpu, until=None, tier=tier) for tier in ("interpreter", "translator", "auto")]
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
def test_processes_repeat_each_other_with_the_input_of_a_command() -> None:
    """Two processes, so that nothing of one Python process (addresses, hashes of strings) can be what makes two runs equal."""
    data = bytes(range(256)) * 700
    command = [sys.executable, "-m", "softkvm.cli", "run", "--deterministic", "9", "-c", "2", "--stats=json", "--", "sha256sum"]
    runs = [subprocess.run(command, input=data, capture_output=True, check=True) for _ in range(2)]
    marks = [msgspec.json.decode(run.stderr.splitlines()[-1])["repetition"] for run in runs]
    assert marks[0] == marks[1]
    assert runs[0].stdout == runs[1].stdout != b""
