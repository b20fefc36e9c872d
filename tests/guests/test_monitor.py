"""The commands about running VMs, against a Debian guest in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from softkvm import silicon

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SOFTKVM = [sys.executable, "-m", "softkvm.cli"]
CPUS = 4
NAME = "debian"
SCRIPT = "echo up; read -r line; dmesg | grep -ci unstable; echo $line"


@pytest.fixture
def guest() -> Iterator[subprocess.Popen[str]]:
    """A guest that waits for a line on its standard input."""
    options = ["--name", NAME, "-c", str(CPUS), "--timeout", "600"]
    with subprocess.Popen(
        [*SOFTKVM, "run", *options, "--", "sh", "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def ask(*arguments: str) -> Any:
    """A command's JSON."""
    return json.loads(subprocess.run([*SOFTKVM, *arguments, "--json"], capture_output=True, check=True).stdout)


def test_a_running_guest_shows_its_clocks_and_can_be_paused(guest: subprocess.Popen[str]) -> None:
    (listed,) = ask("list")
    assert (listed["name"], listed["pid"], listed["state"], listed["cpus"]) == (NAME, guest.pid, "running", CPUS)
    clocks = ask("tsc", NAME)
    assert clocks["use_master_clock"]
    assert clocks["nr_vcpus_matched_tsc"] == CPUS - 1
    assert clocks["online_vcpus"] == len(clocks["vcpus"]) == CPUS
    (offset,) = {vcpu["tsc_offset"] for vcpu in clocks["vcpus"]}
    for vcpu in clocks["vcpus"]:
        assert vcpu["guest_tsc"] == clocks["host_tsc"] + offset & (1 << 64) - 1
        assert vcpu["hv_clock"]["flags"] & 1, "Linux may trust kvm-clock"
        assert abs(vcpu["virtual_tsc_khz"] - silicon.tsc_khz()) < silicon.tsc_khz() // 1000
    subprocess.run([*SOFTKVM, "pause", NAME], check=True)
    assert ask("list")[0]["state"] == "paused"
    subprocess.run([*SOFTKVM, "resume", NAME], check=True)
    stdout, _ = guest.communicate("goodbye\n")
    assert stdout == "0\ngoodbye\n"
    assert guest.returncode == 0
    assert ask("list") == []
