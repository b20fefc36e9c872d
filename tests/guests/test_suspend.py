"""Suspend to RAM of Debian's kernels, and the way back by the RTC's alarm. In virtual time, where an hour's sleep takes no time."""

from __future__ import annotations

import re

import pytest

from softkvm.testing import GuestRun
from tests.guests.test_boot import COMPLAINT

pytestmark = pytest.mark.guest

SLEEP = 3000
"""Seconds."""
SCRIPT = f"""
date +%s
echo +{SLEEP} >/sys/class/rtc/rtc0/wakealarm && echo mem >/sys/power/state || exit 9
date +%s
nproc
sha256sum /bin/busybox | md5sum
dmesg
"""


@pytest.mark.parametrize(("kernel", "cpu"), [("cloud", "cascadelake"), pytest.param("generic", "epyc,+invtsc", marks=pytest.mark.slow)])
def test_sleeps_and_wakes_by_the_alarm(guest_run: GuestRun, kernel: str, cpu: str) -> None:
    options = ("-k", kernel, "--cpu", cpu, "-c", "2", "--deterministic", "1")
    result = guest_run("sh", "-c", SCRIPT, options=options)
    assert result.status == 0, result
    before, after, cpus, *_ = result.stdout.split()
    assert SLEEP <= int(after) - int(before) <= SLEEP + 3
    assert int(cpus) == 2
    assert re.search(r"ACPI: PM: \(supports S0 S3 S5\)|ACPI: \(supports S0 S3 S5\)", result.stdout)
    assert "Waking up from system sleep state S3" in result.stdout
    assert [line for line in result.stdout.splitlines() if COMPLAINT.search(line)] == []
