"""Debian's kernel on TSCs of another rate than the host's: scaled by the silicon, or catching up where it cannot."""

from __future__ import annotations

import re

import pytest

from softkvm import silicon
from softkvm.testing import GuestRun

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPT = """
grep MHz /proc/cpuinfo
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
dmesg | grep -ci unstable
"""


@pytest.mark.parametrize(
    ("cpu", "parameters", "faster", "scaled"),
    [("cascadelake", (), 2, True), ("epyc,+invtsc", (), 2, True), ("epyc", ("--kvm", "tsc_scaling=0"), 2, False)],
)
def test_guest_at_another_rate(guest_run: GuestRun, cpu: str, parameters: tuple[str, ...], faster: int, scaled: bool) -> None:
    khz = faster * silicon.tsc_khz() // 100 * 100
    result = guest_run("sh", "-c", SCRIPT, options=("--cpu", cpu, "-c", "2", "--tsc-khz", str(khz), *parameters), timeout=200)
    assert result.status == 0, result
    rates = {float(rate) for rate in re.findall(r"MHz\s*: ([\d.]+)", result.stdout)}
    expected = khz if scaled else silicon.tsc_khz()  # kvmclock tells of the rate between two jumps
    assert all(abs(rate * 1000 - expected) < expected / 1000 for rate in rates), rates
    assert result.stdout.splitlines()[-2:] == ["tsc" if "invtsc" in cpu else "kvm-clock", "0"]
