"""`softkvm run --trace --audit --ioctl-filter` with a real guest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from softkvm.host.ftrace import HEADER
from tests.guests import packages

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SOFTKVM = [sys.executable, "-m", "softkvm.cli", "run", "--timeout", "600"]
LINE = re.compile(r" *\S.*-\d+ +\[\d{3}\] [d.][N.][hs.][\d.]\. +\d+\.\d{6}: (?P<event>\w+): .*")
REPORTED = re.compile(r" *(?P<comm>\S+)-\d+ +\[\d{3}\] +(?P<time>\d+\.\d{6}): (?P<event>\w+): +(?P<fields>.*)")
"""A line of `trace-cmd report`."""
PERMISSIVE = {
    "default_action": "allow",
    "rules": [
        {"fd": "vcpu", "ioctl": "KVM_SET_DEBUGREGS", "action": "kill_process"},
        {"fd": "vm", "ioctl": "KVM_IRQ_LINE", "args": [{"field": "gsi", "op": "gt", "val": 23}], "action": {"errno": 22}},
    ],
}


def softkvm(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*SOFTKVM, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def test_a_boot_is_traced_audited_and_filtered(tmp_path: Path) -> None:
    traced, audited, filtered = tmp_path / "trace", tmp_path / "audit", tmp_path / "filter"
    filtered.write_text(json.dumps(PERMISSIVE))
    options = ("--trace", "kvm_*", "--trace", "raw_syscalls", "--trace-file", traced, "--audit", audited, "--ioctl-filter", filtered)
    # An APIC of the silicon injects interrupts without KVM.
    result = softkvm("--kvm", "enable_apicv=0", *options, "--", "uname", "-r")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"6.1.")
    text = traced.read_text()
    assert text.startswith(HEADER)
    events = [LINE.fullmatch(line) for line in text[len(HEADER) :].splitlines()]
    assert all(events)
    names = {event["event"] for event in events if event}
    assert names >= {"sys_enter", "sys_exit", "kvm_entry", "kvm_exit", "kvm_msr", "kvm_pio", "kvm_mmio", "kvm_inj_virq", "kvm_cpuid"}
    assert names >= {"kvm_cr", "kvm_emulate_insn"}
    assert names >= {"kvm_write_tsc_offset", "kvm_track_tsc", "kvm_update_master_clock", "kvm_pvclock_update"}
    records = [json.loads(line) for line in audited.read_text().splitlines()]
    assert records[0]["call"] == "KVM_CREATE_VM"
    assert sum(record["call"] == "KVM_RUN" for record in records) == text.count(": kvm_userspace_exit: ")


def test_trace_cmd_reads_the_trace_of_a_boot(tmp_path: Path, trace_cmd: Path) -> None:
    """An independent reader, with libtraceevent's own decoders of KVM's events."""
    traced = tmp_path / "trace.dat"
    result = softkvm("--trace", "kvm:*", "--trace", "raw_syscalls", "--trace-file", traced, "-c", "2", "--", "true")
    assert result.returncode == 0, result.stderr
    libraries = trace_cmd / "usr/lib/x86_64-linux-gnu"
    environment = {"LD_LIBRARY_PATH": str(libraries), "TRACEEVENT_PLUGIN_DIR": str(libraries / "traceevent/plugins")}
    command: list[str | Path] = [trace_cmd / "usr/bin/trace-cmd", "report", "-i", traced]
    report = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert report.stderr == ""
    lines = report.stdout.splitlines()
    assert lines[0] == "cpus=2"
    events = [REPORTED.fullmatch(line) for line in lines[1:]]
    assert all(events)
    times = [float(event["time"]) for event in events if event]
    assert times == sorted(times)
    exits = [event for event in events if event and event["event"] == "kvm_exit"]
    assert any(event["fields"].startswith("reason CPUID rip 0x") for event in exits)
    assert {event["comm"] for event in exits} == {"softkvm-vcpu0", "softkvm-vcpu1"}
    emulated = [event["fields"] for event in events if event and event["event"] == "kvm_emulate_insn"]
    assert emulated
    assert all(re.match(r"[0-9a-f]+:[0-9a-f]+: ", fields) for fields in emulated), "as libtraceevent shows them"
    entries = sum(event["event"] == "kvm_entry" for event in events if event)
    assert abs(entries - len(exits)) <= 2


@pytest.fixture(scope="module")
def trace_cmd() -> Path:
    """Debian's trace-cmd with its libraries, unpacked."""
    return packages.unpacked("trace-cmd", "libtraceevent1", "libtraceevent1-plugin", "libtracefs1")


def test_a_vmm_that_is_killed_ends_as_by_sigsys(tmp_path: Path) -> None:
    path = tmp_path / "filter"
    path.write_text('{"default_action": "allow", "rules": [{"fd": "vcpu", "ioctl": "KVM_RUN", "action": "kill_process"}]}')
    result = softkvm("--ioctl-filter", path, "--", "true")
    assert result.returncode == 128 + 31
    assert b"the VMM was killed: the ioctl filter does not allow KVM_RUN on a vcpu file" in result.stderr
    assert b"Traceback" not in result.stderr
