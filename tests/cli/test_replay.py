"""Replay of audit logs: the same calls give the same results, another KVM gives others, and no log is trusted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import kvm, silicon
from softkvm.cli import app
from softkvm.cli.replay import Replay, ReplayError, load
from softkvm.host.audit import AuditLog, Record
from softkvm.uapi import kvm as uapi

RECORD = {"seq": 1, "time": 0.0, "tid": 1, "comm": "", "fd": 3, "file": "system", "syscall": "ioctl", "args": [], "result": 0}


def calls_of_a_vmm(system: kvm.System) -> None:
    """Some of each kind: values, structures, lists, mappings, sets, eventfds, new files, and calls that fail."""
    vm = system.create_vm()
    vm.create_irqchip()
    with contextlib.suppress(OSError):
        vm.create_irqchip()
    memory = kvm.allocate_memory(1 << 20)
    vm.set_user_memory_region(uapi.UserspaceMemoryRegion(memory_size=memory.size, userspace_addr=memory.address))
    fd = os.eventfd(0)
    for _ in range(2):
        with contextlib.suppress(OSError):
            vm.irqfd(uapi.Irqfd(fd=fd, gsi=4))
    os.close(fd)
    entry = uapi.IrqRoutingEntry(gsi=4, type=uapi.KVM_IRQ_ROUTING_MSI)
    vm.set_gsi_routing([entry])
    for number in (0, 1, 1):
        with contextlib.suppress(OSError):
            vcpu = vm.create_vcpu(number)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    vcpu.set_msrs({0x10: 5, 0x1234_5678: 1})
    vcpu.set_signal_mask({10})
    vcpu.set_sregs(vcpu.get_sregs())
    bad = vcpu.get_sregs()
    bad.cr4 = 1 << 40
    with contextlib.suppress(OSError):
        vcpu.set_sregs(bad)
    vcpu.kvm_run.immediate_exit = 1
    with contextlib.suppress(OSError):
        vcpu.run()
    vm.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit:
        calls_of_a_vmm(kvm.System(process=kvm.Process(audit=audit)))
    return path


def replay(path: Path, model: str = "cascadelake") -> Any:
    with Replay(kvm.System(silicon.Model(model))) as one:
        return one.run(load(path))


def test_every_call_gives_what_it_gave(log: Path) -> None:
    report = replay(log)
    assert report.differences == []
    assert report.skipped == 1  # KVM_RUN
    assert report.calls == len(log.read_bytes().splitlines()) - 1
    results = {record.result for record in load(log)}
    assert {-errno.EEXIST, -errno.EBUSY, -errno.EINVAL} <= results


def change(path: Path, call: str, edit: Callable[[dict[str, Any]], None]) -> int:
    """Edit the first line of a call; its number."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    record = next(line for line in lines if line["call"] == call)
    edit(record)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(record["seq"])


def test_a_call_with_another_result_is_told(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seq = change(log, "KVM_SET_MSRS", lambda record: record.update(result=2))
    (difference,) = replay(log).differences
    assert (difference.seq, difference.call, difference.recorded, difference.replayed) == (seq, "KVM_SET_MSRS", 2, 1)
    assert app.main(["audit", "replay", str(log)]) == 1
    assert "1 with another result" in capsys.readouterr().out
    assert app.main(["audit", "replay", "--json", str(log)]) == 1
    assert json.loads(capsys.readouterr().out)["differences"][0]["call"] == "KVM_SET_MSRS"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        ({"data": [{"Nonsense": "00"}]}, "there is no structure Nonsense"),
        ({"data": [{"UserspaceMemoryRegion": "00"}]}, "1 bytes are no UserspaceMemoryRegion"),
        ({"data": [{"UserspaceMemoryRegion": "zz"}]}, "non-hexadecimal"),
        ({"data": []}, "has not the arguments of KVM_SET_USER_MEMORY_REGION"),
        ({"data": [{"a": 1, "b": 2}]}, "an object with one name"),
        ({"data": [[[[[[1]]]]]]}, "not nested so deep"),
    ],
)
def test_a_line_that_no_vmm_has_made_is_one_sentence(
    log: Path, capsys: pytest.CaptureFixture[str], edit: dict[str, Any], sentence: str
) -> None:
    change(log, "KVM_SET_USER_MEMORY_REGION", lambda record: record.update(edit))
    assert app.main(["audit", "replay", str(log)]) == 125
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_no_log_at_all(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="cannot be read"):
        load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ReplayError, match="is no audit log"):
        load(tmp_path / "text")


CALLS = sorted(
    {
        f"KVM_{operation.method.__name__.upper()}"
        for file in (kvm.System, kvm.Vm, kvm.Vcpu)
        for operation in file.operations.values()
        if operation.method.__name__ not in ("run", "create_vm")
    }
)
arguments = st.recursive(
    st.none() | st.integers(0, (1 << 64) - 1) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["map", "set", "Regs", "Irqfd"]), inner, max_size=1),
    max_leaves=6,
)


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.sampled_from([3, 4, 5]), st.lists(arguments, max_size=2)), max_size=4))
def test_no_log_does_more_than_to_be_refused(calls: list[tuple[str, int, list[Any]]]) -> None:
    lines = [
        {**RECORD, "call": "KVM_CREATE_VM", "result": 4},
        {**RECORD, "call": "KVM_CREATE_VCPU", "fd": 4, "file": "vm", "args": [0], "result": 5},
    ]
    for call, fd, data in calls:
        lines.append({**RECORD, "call": call, "fd": fd, "file": "vm" if fd > 3 else "system", "data": data})
    records = [msgspec.convert(line, Record) for line in lines]
    with contextlib.suppress(ReplayError), Replay(kvm.System(silicon.Model("cascadelake"))) as one:
        one.run(records)
