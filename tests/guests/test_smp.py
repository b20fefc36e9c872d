"""Debian's kernels on several vCPUs: all come up, all work, and the kernel finds nothing wrong."""

from __future__ import annotations

import re

import pytest

from softkvm.testing import GuestRun
from tests.guests.test_boot import COMPLAINT

pytestmark = [pytest.mark.guest, pytest.mark.slow]

# Each CPU computes the same sum, all at the same time; then what the kernel says.
SCRIPT = """
nproc
grep apicid /proc/cpuinfo
cpu=0
while [ $cpu -lt $(nproc) ]; do
    taskset -c $cpu sha256sum /bin/busybox &
    cpu=$((cpu + 1))
done
wait
dmesg
"""


# On AMD, Linux trusts the TSCs of several CPUs only where they are invariant, and says so (arch/x86/kernel/tsc.c, unsynchronized_tsc()).
@pytest.mark.parametrize("kernel", ["cloud", "generic"])
@pytest.mark.parametrize("cpu", ["cascadelake", "epyc,+invtsc"])
@pytest.mark.parametrize("cpus", [2, 4])
def test_all_cpus_work(guest_run: GuestRun, kernel: str, cpu: str, cpus: int) -> None:
    result = guest_run("sh", "-c", SCRIPT, options=("-k", kernel, "--cpu", cpu, "-c", str(cpus)))
    assert result.status == 0, result
    assert result.stdout.startswith(f"{cpus}\n")
    assert re.findall(r"^apicid\s*: (\d+)$", result.stdout, re.MULTILINE) == [str(n) for n in range(cpus)]
    sums = re.findall(r"^([0-9a-f]{64})  /bin/busybox$", result.stdout, re.MULTILINE)
    assert len(sums) == cpus
    assert len(set(sums)) == 1
    assert f"Brought up 1 node, {cpus} CPUs" in result.stdout
    assert COMPLAINT.findall(result.stdout) == []


SHARED = """
for cpu in 0 1; do taskset -c $cpu sha256sum /bin/busybox /bin/busybox /bin/busybox & done
wait
grep '^cpu[0-9]' /proc/stat
dmesg
"""


def test_two_cpus_on_one_core_see_their_waiting_as_steal_time(guest_run: GuestRun) -> None:
    result = guest_run("sh", "-c", SHARED, options=("-c", "2", "--cores", "1"))
    assert result.status == 0, result
    assert len(set(re.findall(r"^[0-9a-f]{64}", result.stdout, re.MULTILINE))) == 1
    stolen = re.findall(r"^cpu\d(?: \d+){7} (\d+)", result.stdout, re.MULTILINE)
    assert len(stolen) == 2
    assert all(int(ticks) > 0 for ticks in stolen)
    assert COMPLAINT.findall(result.stdout) == []


def test_as_many_cpus_as_there_can_be(guest_run: GuestRun) -> None:
    result = guest_run("sh", "-c", "nproc; grep -c ^processor /proc/cpuinfo; dmesg", options=("-c", "64", "-m", "1G"), timeout=800)
    assert result.status == 0, result
    assert result.stdout.startswith("64\n64\n")
    assert "Brought up 1 node, 64 CPUs" in result.stdout
    assert COMPLAINT.findall(result.stdout) == []
