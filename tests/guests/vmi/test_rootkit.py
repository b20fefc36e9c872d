"""A module that does what rootkits do, in a Debian guest with two CPUs: found by the check, and stopped by the lock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from softkvm.vmi.linux import tasks
from softkvm.vmi.linux.modules import ModuleView
from softkvm.vmi.linux.modules import modules as list_modules
from softkvm.vmi.linux.patching import Site
from softkvm.vmi.linux.tasks import View
from softkvm.vmi.tools.check import check
from softkvm.vmi.tools.lock import KernelLock
from tests.guests import packages
from tests.guests.vmi.live import LiveGuest, live_guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

ROOTKIT = Path(__file__).with_name("rootkit.c")
GETPID = 39
DEBIAN_MODULES = ("drivers/net/dummy", "drivers/net/ifb", "drivers/block/loop", "crypto/xor")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The rootkit, compiled with Debian's headers, and some of Debian's own modules."""
    found = {"/rootkit.ko": packages.module(ROOTKIT, tmp_path_factory.mktemp("rootkit"))}
    found |= {f"/{name.rsplit('/', 1)[-1]}.ko": packages.debian_module(name) for name in DEBIAN_MODULES}
    return found


@pytest.fixture
def live(files: dict[str, bytes]) -> Iterator[LiveGuest]:
    """A guest at its shell."""
    with live_guest(files, cpus=2) as made:
        yield made


def hide_and_hook(live: LiveGuest, *more: str) -> int:
    """Load the rootkit; the PID of the process that it hides."""
    pid = live.background("sleep 1000")
    table = live.target.kernel.symbols["sys_call_table"]
    live.shell(f"insmod /rootkit.ko pid={pid} table={table} number={GETPID} {' '.join(more)}")
    return pid


def test_a_healthy_guest_has_nothing_to_find(live: LiveGuest) -> None:
    live.shell("insmod /dummy.ko; insmod /loop.ko")
    report = live.still(check)
    assert report.findings == []
    assert report.checked["modules"] == 2
    assert all(count for count in report.checked.values())


def test_a_rootkit_is_found(live: LiveGuest) -> None:
    live.look(lambda target: target.kernel)
    pid = hide_and_hook(live, "hide=1")
    assert str(pid) in live.shell("ls /proc").split()  # /proc asks the table of PIDs
    report = live.still(check)
    found = {finding.check: finding for finding in report.findings}
    assert set(found) == {"modules", "processes", "system calls"}
    assert f"process {pid} (sleep) is hidden" in found["processes"].what
    assert found["processes"].detail == f"missing from {View.TASKS.value}"
    assert found["modules"].what == "module rootkit is hidden"
    assert "getpid (39)" in found["system calls"].what
    assert found["system calls"].detail.startswith("rootkit+")
    hidden = {process.pid: process for process in live.still(lambda target: tasks.processes(target.kernel))}[pid]
    assert hidden.hidden_from == (View.TASKS,)
    (module,) = (module for module in live.still(lambda target: list_modules(target.kernel)) if module.hidden_from)
    assert (module.name, module.hidden_from, module.taints) == ("rootkit", (ModuleView.LIST,), "OE")


def test_a_rootkit_is_stopped_and_the_guest_lives_on(live: LiveGuest) -> None:
    lock = KernelLock(live.target)
    live.look(lambda target: lock.engage_when_booted())
    with live.watched(lock) as attempts:
        hide_and_hook(live, "entry=1", "descriptors=1")
        assert "gdt whole, idt whole" in live.shell("dmesg | grep rootkit")
        assert "uid=0" in live.shell("id")
        assert "rootkit" in live.shell("lsmod")
    (table,) = (attempt for attempt in attempts if attempt.what == "read-only data")
    assert table.where == f"sys_call_table+{8 * GETPID:#x}"
    assert table.process == "insmod"
    assert table.pid > 1
    assert table.code.startswith("rootkit:init+")
    assert table.stopped
    (entry,) = (attempt for attempt in attempts if attempt.what == "MSR LSTAR")
    assert entry.stopped
    assert entry.process == "insmod"
    descriptors = [attempt.where for attempt in attempts if attempt.what == "global descriptor table"]
    assert [re.sub(r"CPU [01]", "CPU", where) for where in descriptors] == ["descriptor 7 of CPU", "descriptor 12 of CPU"]
    (idtr,) = (attempt for attempt in attempts if attempt.what == "IDTR")
    assert idtr.where.startswith("rootkit+")
    assert {attempt.what for attempt in attempts} == {"read-only data", "MSR LSTAR", "CR0", "global descriptor table", "IDTR"}
    assert all(attempt.stopped for attempt in attempts if attempt.what != "CR0")
    report = live.still(check)
    assert {finding.check for finding in report.findings} == {"processes"}
    assert re.search(r"Oops|BUG|general protection", live.machine.text) is None


def test_what_a_kernel_does_itself_is_no_attack(files: dict[str, bytes]) -> None:
    with live_guest(files, boot=False, cpus=2) as live:
        lock = KernelLock(live.target, verbose=True)
        lock.engage_when_booted()
        assert not lock.engaged
        with live.watched(lock) as attempts:
            live.machine.run(until="# ", timeout=600)
            assert lock.engaged
            for name in DEBIAN_MODULES:
                module = name.rsplit("/", 1)[-1]
                live.shell(f"insmod /{module}.ko; rmmod {module}; insmod /{module}.ko")
            live.shell("echo 1 > /proc/sys/kernel/sched_schedstats; echo 0 > /proc/sys/kernel/sched_schedstats")
            live.shell("echo 0 > /sys/devices/system/cpu/cpu1/online; echo 1 > /sys/devices/system/cpu/cpu1/online")
            assert live.shell("cat /sys/devices/system/cpu/online").strip() == "0-1"
            assert live.shell("cut -d' ' -f1 /proc/modules").split() == [name.rsplit("/", 1)[-1] for name in reversed(DEBIAN_MODULES)]
        assert [attempt for attempt in attempts if not attempt.legal] == []
        assert Site.JUMP_LABEL.value in {attempt.legal for attempt in attempts}
        assert live.still(check).findings == []
