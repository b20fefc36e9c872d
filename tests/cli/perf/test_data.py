"""perf.data files: records that a reader finds, with names that a guest chose."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from softkvm.cli.perf import data
from softkvm.cli.perf.guest import Process
from softkvm.cli.perf.sampler import Sample, parse_event
from softkvm.host.perf.branches import Branch
from softkvm.uapi.perf import BranchSample, Record, SampleFormat
from softkvm.vmi.linux.maps import Area

PROCESS = Process(7, "prog", [Area(0x1000, 0x2000, "r-xp", 0x400, 1, "/../../etc/prog")])


def records(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    assert content[:8] == b"PERFILE2"
    start, size = struct.unpack_from("<QQ", content, 40)
    position = start
    while position < start + size:
        kind, misc, length = struct.unpack_from("<IHH", content, position)
        assert length % 8 == 0
        yield kind, misc, content[position + 8 : position + length]
        position += length
    assert position == start + size


def test_a_sample_follows_its_process(tmp_path: Path) -> None:
    attr = parse_event("instructions:u")
    assert attr is not None
    attr = replace(attr, sample_period=1000, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY)
    view = cast(Any, SimpleNamespace(kernel=None, files={"/../../etc/prog": b"\x7fELF"}))
    samples = [Sample(0x1234, True, 1, 5, PROCESS, (Branch(0x1100, 0x1200, True, 9),))] * 2
    path = tmp_path / "deep" / "out.data"
    path.parent.mkdir()
    data.write(path, attr, samples, view, "cloud")
    found = list(records(path.read_bytes()))
    assert [kind for kind, _, _ in found] == [Record.COMM, Record.MMAP2, Record.SAMPLE, Record.SAMPLE]
    ip, pid, _tid, time, cpu, _, period, number, source, target, flags = struct.unpack("<QIIQIIQQQQQ", found[2][2])
    assert (ip, pid, time, cpu, period, number) == (0x1234, 7, 5, 1, 1000, 1)
    assert (source, target, flags) == (0x1100, 0x1200, 1 | 9 << 4)
    written = [file.relative_to(tmp_path) for file in tmp_path.rglob("prog")]
    assert written == [Path("deep/out.data.symfs/etc/prog")]  # no name of a guest leaves the directory


def test_events_by_name() -> None:
    kernel = parse_event("cycles:k")
    assert kernel is not None
    assert (kernel.exclude_user, kernel.exclude_kernel) == (True, False)
    assert parse_event("cycles:x") is parse_event("flops") is parse_event("cycles:") is None
