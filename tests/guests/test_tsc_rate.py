"""Debian's kernel on TSCs of another rate than the host's: scaled by the silicon, or catching up where it cannot."""

from __future__ import annotations

import re

import pytest

from softkvm import silicon
from softkvm.testing import GuestRun

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SCRIPT = """
grep MHz /proc/cpuinfo
cat /sys/devices/system/clocksource/clocksource0/current_clocksource
dmesg | grep -i unstable
true
"""
KHZ = 2 * silicon.tsc_khz()


def boot(guest_run: GuestRun, *options: str) -> tuple[set[float], str]:
    """The rates in kHz that the guest believes in, and what it says of its clocks."""
    result = guest_run("sh", "-c", SCRIPT, options=("--tsc-khz", str(KHZ), *options))
    assert result.status == 0, result
    rates, said = re.findall(r"MHz\s*: ([\d.]+)", result.stdout), re.sub(r".*MHz.*\n", "", result.stdout)
    return {float(rate) * 1000 for rate in rates}, said


@pytest.mark.parametrize(("cpu", "clocksource"), [("cascadelake", "kvm-clock"), ("epyc,+invtsc", "tsc")])
def test_guest_at_another_rate(guest_run: GuestRun, cpu: str, clocksource: str) -> None:
    rates, said = boot(guest_run, "--cpu", cpu, "-c", "2")
    assert all(abs(rate - KHZ) < KHZ / 1000 for rate in rates), rates
    assert said == f"{clocksource}\n"


def test_guest_whose_tsc_catches_up(guest_run: GuestRun) -> None:
    """It jumps, and Linux may call it unstable for that: kvm-clock is what a guest goes by then."""
    rates, said = boot(guest_run, "--cpu", "epyc", "--kvm", "tsc_scaling=0")
    assert all(abs(rate - KHZ / 2) < KHZ / 1000 for rate in rates), "kvm-clock tells of the rate between two jumps"
    assert said.startswith("kvm-clock\n")
