"""Traces in trace-cmd's form, taken apart byte by byte; `tests/guests/test_watch.py` lets trace-cmd itself read one."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from softkvm.host import trace
from softkvm.host.ftrace import Trace
from softkvm.host.task import current
from softkvm.host.trace_dat import DatFile

PAGE = 4096
MS = 1_000_000


def pages(path: Path) -> list[tuple[int, bytes]]:
    """(time, data) of the pages of core 0, which are the end of the file."""
    data = path.read_bytes()
    table = data.index(b"flyrecord\0") + 10
    offset, size = struct.unpack_from("<QQ", data, table)
    assert offset % PAGE == size % PAGE == 0
    assert len(data) >= offset + size
    result = []
    for start in range(offset, offset + size, PAGE):
        time, length = struct.unpack_from("<QQ", data, start)
        assert 0 < length <= PAGE - 16
        result.append((time, data[start + 16 : start + 16 + length]))
    return result


def events(path: Path) -> list[tuple[int, bytes]]:
    """(time, record) of all events of core 0."""
    found = []
    for time, data in pages(path):
        now, position = time, 0
        while position < len(data):
            (head,) = struct.unpack_from("<I", data, position)
            kind, delta = head & 31, head >> 5
            position += 4
            if kind == 30:
                (high,) = struct.unpack_from("<I", data, position)
                now += delta | high << 27
                position += 4
                continue
            assert kind == 0
            (length,) = struct.unpack_from("<I", data, position)
            now += delta
            found.append((now, data[position + 4 : position + length]))
            position += length + -length % 4
    return found


def test_the_head_and_the_formats(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    with Trace(["kvm_exit", "sys_enter", "sched_switch"], path):
        trace.kvm_exit(10, 0x1000, trace.ISA_VMX, 0, 0, 0, 0, 1)
    data = path.read_bytes()
    assert data.startswith(b"\x17\x08\x44tracing6\0\0\x08\0\x10\0\0header_page\0")
    for text in (
        b"name: kvm_exit\nID: ",
        b"\tfield:u64 guest_rip;\toffset:16;\tsize:8;\tsigned:0;\n",
        b"\tfield:unsigned long args[6];\toffset:16;\tsize:48;\tsigned:0;\n",
        b"\tfield:char prev_comm[16];\toffset:8;\tsize:16;\tsigned:0;\n",
        f"{current().tid} {current().comm}\n".encode(),
    ):
        assert text in data
    ((_, record),) = events(path)
    assert struct.unpack_from("<HBBi", record)[3] == current().tid
    assert struct.unpack_from("<2Q", record, 8) == (10, 0x1000)


def test_pages_are_full_before_there_is_another_one_and_time_never_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    file = DatFile(path, [trace.kvm_entry])
    times = [1000, 999, 1000 + 100 * MS, 1000 + 700 * MS, 1000 + 3_600_000 * MS]
    times += [times[-1] + number for number in range(1000)]
    for number, now in enumerate(times):
        file.record(current(), 0, now, trace.kvm_entry, (0, number))
    file.close()
    found = events(path)
    assert [now for now, _ in found] == [1000, 1000, *times[2:]]
    assert [struct.unpack_from("<Q", record, 16)[0] for _, record in found] == list(range(len(times)))
    assert all(len(data) > PAGE - 16 - 44 for _, data in pages(path)[:-1])


@pytest.mark.parametrize("text", ["x" * 100, "\0", "\u20ac" * 20])
def test_texts_have_room_for_15_bytes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.dat"
    with Trace(["sched_switch"], path):
        trace.sched_switch(text, 1, 120, "S", "next", 2, 120)
    ((_, record),) = events(path)
    assert record[8:24][:15] == text.encode()[:15].ljust(15, b"\0")
    assert record[23] == 0


def test_bytes_of_an_instruction_are_an_array(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    with Trace(["kvm_emulate_insn"], path):
        trace.kvm_emulate_insn(0x1000, 0, 2, trace.INSN_CR0_PE, b"\x0f\xa2" + bytes(range(13)), True)
    assert b"\tfield:u8 insn[16];\toffset:40;\tsize:16;\tsigned:0;\n\tfield:u64 failed;\toffset:56;" in path.read_bytes()
    ((_, record),) = events(path)
    assert record[40:56] == b"\x0f\xa2" + bytes(range(13)) + b"\0"
    assert struct.unpack_from("<Q", record, 56) == (1,)


def test_a_trace_of_nothing_is_a_file_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "trace.dat"
    with Trace(["*"], path) as one:
        one.close()
    assert pages(path) == []
