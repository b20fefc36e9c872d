"""Debian's kernels with the checks that their command line can switch on: they find nothing here that they do not find under QEMU.

SLUB's red zones, poison and consistency checks, poisoned free pages, a test of all memory (which Debian's generic kernel has, as it has the
check of poisoned pages), pages in random order, a panic where a cryptographic self-test fails or anything warns, and the comparison of
the CPUs' clocksources (Linux 6.1 `Documentation/admin-guide/kernel-parameters.txt`). Other self-tests are not in these kernels.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from softkvm.cli import guest
from softkvm.testing import GuestRun
from tests.guests.test_boot import COMPLAINT, IN_VIRTUAL_TIME

QEMU = "qemu-system-x86_64"
CHECKS = "panic_on_warn=1 slub_debug=FZPU init_on_alloc=1 init_on_free=1 cryptomgr.panic_on_fail=1 clocksource.verify_n_cpus=-1"
MEMORY_CHECKS = "memtest=1 page_poison=1 page_alloc.shuffle=1"
LOG = ("sh", "-c", "dmesg -r")
_WARNING = re.compile(r"^<[0-4]>\[ *[\d.]+\] (.*)$", re.MULTILINE)
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")

pytestmark = [
    pytest.mark.guest,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
]


def warnings(log: str) -> set[str]:
    """What the log has at warning level or above, numbers left out."""
    return {_NUMBER.sub("N", line) for line in _WARNING.findall(log)}


def qemu_log(kernel: str, cpus: int, folder: Path) -> str:
    """The kernel's log of the same guest under QEMU's TCG."""
    image = guest.prepare(kernel, command=LOG)
    assert isinstance(image.initrd, bytes)
    initrd, output = folder / "initrd", folder / "output"
    initrd.write_bytes(image.initrd)
    command: list[str | Path] = [QEMU, "-accel", "tcg", "-cpu", "max", "-m", "256M", "-smp", str(cpus), "-no-reboot", "-nodefaults"]
    command += ["-kernel", image.kernel, "-initrd", initrd, "-append", f"console=ttyS0 panic=-1 quiet {CHECKS} {MEMORY_CHECKS}"]
    command += ["-display", "none", "-monitor", "none"]
    for line in ("null", f"file:{output}", "null", "null"):
        command += ["-serial", line]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return output.read_text(errors="replace")


@pytest.mark.parametrize("cpus", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["cloud", "generic"])
def test_checks_of_the_kernel_find_nothing_new(guest_run: GuestRun, tmp_path: Path, kernel: str, cpus: int) -> None:
    result = guest_run(*LOG, options=("-k", kernel, "-c", str(cpus), "-m", "256M", "-p", f"{CHECKS} {MEMORY_CHECKS}", *IN_VIRTUAL_TIME))
    assert result.status == 0, result
    assert "Command line" in result.stdout
    if kernel == "generic":
        assert "early_memtest: # of tests: 1" in result.stdout
    assert [line for line in result.stdout.splitlines() if COMPLAINT.search(line)] == []
    assert warnings(result.stdout) - warnings(qemu_log(kernel, cpus, tmp_path)) == set()
