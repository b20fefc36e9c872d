"""KVM_X86_SET_MCE, as a VMM uses it that has lost a page: Debian's kernel finds the error, and dies of one that it cannot survive."""

from __future__ import annotations

import pytest

from softkvm.cli import guest
from softkvm.uapi.kvm import X86Mce
from softkvm.vmm import Machine, StopReason

pytestmark = [pytest.mark.guest, pytest.mark.slow]

VALID, UNCORRECTED, ENABLED, CORRUPT = 1 << 63, 1 << 61, 1 << 60, 1 << 57
POLL = "cd /sys/devices/system/machinecheck/machinecheck0 && echo 1 >check_interval && echo polling >/dev/ttyS0 && sleep 1000"
"""Linux looks for corrected errors every second."""


def test_linux_finds_a_corrected_error_and_panics_of_a_fatal_one() -> None:
    image = guest.prepare("generic", command=["sh", "-c", POLL])
    with Machine(image.kernel, image.initrd, "panic=-1", "256M", deterministic=1) as vm:
        assert vm.run("polling", timeout=600).reason is StopReason.UNTIL
        vm.vcpus[0].x86_set_mce(X86Mce(status=VALID | ENABLED | 0x135, bank=3))
        assert vm.run("Machine check events logged", timeout=600).reason is StopReason.UNTIL, vm.text[-1000:]
        vm.vcpus[0].x86_set_mce(X86Mce(status=VALID | UNCORRECTED | ENABLED | CORRUPT | 0x135, mcg_status=4, bank=3))
        stop = vm.run(timeout=600)
        assert stop.reason is StopReason.PANIC, vm.text[-1000:]
        assert "machine check" in stop.detail.lower()
