"""The audit log: one line for each call, both halves or none."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from softkvm.host import ptrace
from softkvm.host.audit import AuditLog
from softkvm.host.call import Call
from softkvm.host.process import Process
from softkvm.host.task import Task
from softkvm.uapi import kvm as uapi
from tests.host.doubles import NMI, File, nothing


class Audited(File):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = AuditLog(path)
        super().__init__(Process(audit=self.log))

    def lines(self) -> list[dict[str, Any]]:
        self.log.close()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Audited]:
    audited = Audited(tmp_path / "audit")
    yield audited
    audited.log.close()


def test_a_line_tells_who_called_what_and_what_came_back(file: Audited) -> None:
    task, region = Task(), uapi.UserspaceMemoryRegion(slot=2)
    file.call(task, lambda it, *args: 5, 1, region, "text", None, 9, command=NMI)
    (line,) = file.lines()
    assert line.pop("time") > 1e9
    assert line == {
        "seq": 1,
        "tid": task.tid,
        "comm": task.comm,
        "fd": file.fd,
        "file": "vcpu",
        "vm": 4,
        "syscall": "ioctl",
        "call": "KVM_NMI",
        "args": [1, "UserspaceMemoryRegion", "str", None],
        "data": [1, {"UserspaceMemoryRegion": bytes(region).hex()}, "text", None],
        "digest": hashlib.sha256(bytes(region)).hexdigest(),
        "result": 5,
    }


def test_errors_are_results(file: Audited) -> None:
    def fail(it: File) -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(OSError, match="busy"):
        file.call(Task(), fail)
    assert file.lines()[0]["result"] == -errno.EBUSY


def test_structures_are_digested_as_they_were_when_the_call_entered(file: Audited) -> None:
    region = uapi.UserspaceMemoryRegion(slot=2)
    digest = hashlib.sha256(bytes(region)).hexdigest()
    file.call(Task(), lambda it, given: setattr(given, "slot", 3), region)
    assert file.lines()[0]["digest"] == digest


def test_lines_count_without_gaps(file: Audited) -> None:
    threads = [threading.Thread(target=lambda: [file.call(Task(), nothing) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["seq"] for line in file.lines()) == list(range(1, 81))


def test_a_call_that_never_entered_leaves_no_line(file: Audited) -> None:
    class Refuser(ptrace.Tracer):
        def enter(self, call: Call) -> None:
            call.skip(result=1)

    file.process.attach(Refuser())
    file.call(Task(), nothing)
    assert file.lines() == []


def test_the_log_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        one = Audited(tmp_path / "audit")
        one.call(Task(), nothing)
        lines = one.lines()
    assert len(lines) == 2
