"""Unmodified Debian kernels on both CPU models, judged by what the guest itself says."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from softkvm.cli import guest
from softkvm.testing import GuestResult, GuestRun, VmFactory
from softkvm.vmm import StopReason

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SCRIPT = Path(__file__).with_name("facts.sh").read_text()
VENDORS = {"cascadelake": "GenuineIntel", "epyc": "AuthenticAMD"}
COMMON_FLAGS = {
    "fpu",
    "tsc",
    "msr",
    "pae",
    "apic",
    "pge",
    "pat",
    "fxsr",
    "sse2",
    "syscall",
    "nx",
    "lm",
    "cpuid",
    "hypervisor",
    "x2apic",
    "smep",
}
VENDOR_FLAGS = {"cascadelake": {"ss", "md_clear", "movdiri"}, "epyc": {"mmxext", "topoext", "extd_apicid", "vmmcall"}}

# What Linux prints when it finds something wrong.
COMPLAINT = re.compile(r"WARNING:|BUG\b|Oops|Call Trace|general protection|unchecked MSR|[Uu]nstable|segfault|soft lockup|stall")

IN_VIRTUAL_TIME = ("--deterministic", "1")
"""So that the load of the host cannot make the kernel complain of late interrupts."""


class Facts:
    """What the guest said about itself, by section."""

    def __init__(self, result: GuestResult) -> None:
        self.result = result
        parts = re.split(r"^== (\w+)\n", result.stdout, flags=re.MULTILINE)
        self.sections = dict(zip(parts[1::2], parts[2::2], strict=True))

    def __getitem__(self, name: str) -> str:
        return self.sections[name].strip()


@pytest.fixture(scope="module", params=list(VENDORS))
def cpu(request: pytest.FixtureRequest) -> str:
    """Each CPU model in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def facts(cpu: str, guest_run: GuestRun) -> Facts:
    """One boot of the cloud kernel on `cpu`."""
    result = guest_run("sh", "-c", SCRIPT, options=("--cpu", cpu))
    assert result.status == 0, result
    return Facts(result)


def test_kernel_is_the_packages_own(facts: Facts) -> None:
    record = guest.Cache(guest.default_directory()).record("vmlinuz-cloud")
    assert record is not None
    assert record.member == f"./boot/vmlinuz-{facts['release']}"


def test_vendor_is_the_models(facts: Facts, cpu: str) -> None:
    assert re.search(r"^vendor_id\s*: (\w+)$", facts["cpuinfo"], re.MULTILINE)[1] == VENDORS[cpu]  # type: ignore[index]


def test_flags_are_the_models(facts: Facts, cpu: str) -> None:
    flags = set(re.search(r"^flags\s*: (.*)$", facts["cpuinfo"], re.MULTILINE)[1].split())  # type: ignore[index]
    assert COMMON_FLAGS | VENDOR_FLAGS[cpu] <= flags


def test_hypervisor_is_kvm(facts: Facts) -> None:
    assert "Hypervisor detected: KVM" in facts["dmesg"]


def test_clocksource_is_kvm_clock(facts: Facts) -> None:
    assert facts["clocksource"] == "kvm-clock"


def test_memory_is_512_megabytes(facts: Facts) -> None:
    total = int(re.search(r"^MemTotal:\s+(\d+) kB$", facts["meminfo"], re.MULTILINE)[1])  # type: ignore[index]
    assert 440 << 10 < total < 512 << 10


def test_one_cpu(facts: Facts) -> None:
    assert facts["cpus"] == "1"


def test_timer_and_serial_interrupts_arrive(facts: Facts) -> None:
    counts = {line.split()[0]: int(line.split()[1]) for line in facts["interrupts"].splitlines()[1:]}
    assert counts["LOC:"] > 10
    assert counts["3:"] > 0
    assert counts.get("ERR:", 0) == 0
    assert counts.get("MIS:", 0) == 0


def test_interrupts_go_through_the_ioapic(facts: Facts) -> None:
    assert re.search(r"IO-APIC", facts["interrupts"])


def test_host_bridge_is_on_the_pci_bus(facts: Facts) -> None:
    assert "0000:00:00.0" in facts["pci"].split()


def test_four_serial_ports(facts: Facts) -> None:
    assert facts["ports"].count(": serial") == 4


def test_wall_clock_is_the_hosts(facts: Facts) -> None:
    assert abs(int(facts["date"]) - time.time()) < 3600


def test_time_moves(facts: Facts) -> None:
    assert 0.29 <= float(facts["later"]) - float(facts["uptime"]) < 60


def test_floating_point_is_right(facts: Facts) -> None:
    assert facts["arithmetic"].startswith("3.1415926535897932384")


def test_checksum_is_right(facts: Facts) -> None:
    assert facts["checksum"].split()[0] == "d29751f2649b32ff572b5e0a9f541ea660a50f94ff0beedfb0b692b924cc8025"


def test_kernel_has_no_complaint(facts: Facts) -> None:
    assert [line for line in facts["dmesg"].splitlines() if COMPLAINT.search(line)] == []


def test_kernel_log_has_nothing_at_warning_level(cpu: str, guest_run: GuestRun) -> None:
    result = guest_run("sh", "-c", SCRIPT, options=("--cpu", cpu, *IN_VIRTUAL_TIME))
    assert result.status == 0, result
    assert Facts(result)["warnings"] == ""


def test_shell_on_the_console_and_power_off(vm_factory: VmFactory, cpu: str) -> None:
    vm = vm_factory(cpu=cpu)
    assert vm.run(until="# ", timeout=600).reason is StopReason.UNTIL
    vm.send("echo $((6*7))-on-$(uname -s)\n")
    assert vm.run(until="42-on-Linux", timeout=600).reason is StopReason.UNTIL
    vm.send("poweroff -f\n")
    assert vm.run(timeout=600).reason is StopReason.POWER_OFF


def test_generic_kernel_boots_without_complaint(guest_run: GuestRun) -> None:
    result = guest_run("sh", "-c", SCRIPT, options=("-k", "generic"))
    facts = Facts(result)
    assert result.status == 0
    assert facts["release"].endswith("-amd64")
    assert facts["clocksource"] == "kvm-clock"
    assert [line for line in facts["dmesg"].splitlines() if COMPLAINT.search(line)] == []
