"""An unmodified Debian kernel on AMD silicon of which KVM does not learn where instructions end: each exit is skipped by decoding."""

from __future__ import annotations

import pytest

from softkvm.testing import GuestRun
from tests.guests.test_boot import IN_VIRTUAL_TIME

pytestmark = [pytest.mark.guest, pytest.mark.slow]


@pytest.mark.parametrize(
    "options", [("--cpu", "epyc,-nrip-save"), ("--cpu", "epyc", "--kvm", "nrips=0")], ids=["silicon without NRIPS", "nrips=0"]
)
def test_debian_boots_without_the_next_rip(guest_run: GuestRun, options: tuple[str, ...]) -> None:
    result = guest_run("sh", "-c", "dmesg -l emerg,alert,crit,err,warn; cat /proc/cpuinfo", options=(*options, *IN_VIRTUAL_TIME))
    assert result.status == 0, result
    messages, _, cpuinfo = result.stdout.partition("processor")
    assert messages == ""
    assert "AuthenticAMD" in cpuinfo
