"""The file of a snapshot: what of memory is in it, that it is written whole or not at all, and every way in which it can be wrong."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softkvm.vmm import StateError
from softkvm.vmm.layout import MIB, RAM_ABOVE_4G
from softkvm.vmm.memory import Block, GuestMemory
from softkvm.vmm.snapshot import MachineState, SnapshotFile, write
from softkvm.vmm.snapshot.records import ClockState, HardwareState
from tests.vmm.doubles import HostBlock

PAGE = 4096
HEADING = 19 + 8
STATE = MachineState(
    hardware=HardwareState(cpu="epyc", cpus=1, memory=4 * MIB, parameters=[], cpuid=b""),
    clock=ClockState(kvmclock=1, realtime=2),
    vcpus=[],
    irqchips=[],
    pit=b"",
    pit_ages=[],
    devices={},
)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """4 MB of RAM at 0, and one more at 4 GB."""
    made = GuestMemory(4 * MIB, HostBlock)
    high = HostBlock(MIB)
    made.blocks.append(Block(RAM_ABOVE_4G.base, high, memoryview(high).cast("B")))
    yield made
    made.close()


def runs_of(path: Path) -> list[tuple[int, int]]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data, HEADING - 8)
    _, runs = msgspec.msgpack.decode(data[HEADING : HEADING + length])
    return [(address, size) for address, size in runs]


def load(path: Path) -> GuestMemory:
    fresh = GuestMemory(4 * MIB, HostBlock)
    high = HostBlock(MIB)
    fresh.blocks.append(Block(RAM_ABOVE_4G.base, high, memoryview(high).cast("B")))
    with SnapshotFile(path) as saved:
        assert saved.state == STATE
        saved.load(fresh)
    return fresh


def test_only_pages_that_hold_something_are_in_the_file(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    memory.write(0, b"first")
    memory.write(2 * PAGE, bytes(PAGE))  # touched, and zero
    memory.write(3 * PAGE + PAGE - 1, b"xy")  # over a boundary
    memory.write(4 * MIB - 1, b"z")
    memory.write(RAM_ABOVE_4G.base + 5 * PAGE, b"high")
    size = write(path, STATE, memory)
    assert runs_of(path) == [
        (0, PAGE),
        (3 * PAGE, 2 * PAGE),
        (4 * MIB - PAGE, PAGE),
        (RAM_ABOVE_4G.base + 5 * PAGE, PAGE),
    ]
    assert size == path.stat().st_size == 6 * PAGE
    fresh = load(path)
    for old, new in zip(memory.blocks, fresh.blocks, strict=True):
        assert bytes(old.view) == bytes(new.view)
    fresh.close()


@settings(max_examples=25)
@given(st.sets(st.integers(0, 4 * MIB // PAGE - 1), max_size=40))
def test_any_pages_come_back(tmp_path: Path, pages: set[int]) -> None:
    path = tmp_path / "snapshot"
    memory = GuestMemory(4 * MIB, HostBlock)
    for page in pages:
        memory.write(page * PAGE + page % PAGE, b"\x01")
    write(path, STATE, memory)
    fresh = GuestMemory(4 * MIB, HostBlock)
    with SnapshotFile(path) as saved:
        saved.load(fresh)
    assert bytes(memory.blocks[0].view) == bytes(fresh.blocks[0].view)
    assert sum(size for _, size in runs_of(path)) == PAGE * len(pages)
    memory.close()
    fresh.close()


def test_failure_leaves_the_old_file_and_no_other(memory: GuestMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, STATE, memory)
    assert [entry.name for entry in tmp_path.iterdir()] == ["snapshot"]
    assert path.read_bytes() == b"old"
    with pytest.raises(OSError, match="No such file"):
        write(tmp_path / "missing" / "snapshot", STATE, memory)


def content(runs: list[tuple[int, int]], state: object = STATE) -> bytes:
    record = msgspec.msgpack.encode((state, runs))
    return b"softkvm snapshot 1\n" + struct.pack("<Q", len(record)) + record


def padded(data: bytes, pages: int) -> bytes:
    return data + bytes(-len(data) % PAGE) + b"\x01" * PAGE * pages


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is not a snapshot, or it ends too early"),
        (b"root:x:0:0:root:/root:/bin/bash\n", "is not a snapshot of this version"),
        (b"softkvm snapshot 2\n" + bytes(100), "is not a snapshot of this version"),
        (b"softkvm snapshot 1\n" + b"\xff" * 8, "damaged: its record is too long"),
        (b"softkvm snapshot 1\n" + struct.pack("<Q", 1000), "ends too early"),
        (b"softkvm snapshot 1\n" + struct.pack("<Q", 1) + b"\xc1", "is damaged: MessagePack data is malformed"),
        (b"softkvm snapshot 1\n" + struct.pack("<Q", 5000) + b"\x91" * 5000, "is damaged"),
        (padded(content([], state={"version": 1}), 0), "is damaged: Object missing required field"),
        (padded(content([(0, PAGE)]), 0), "another size than it should have"),
        (padded(content([(0, PAGE)]), 2), "another size than it should have"),
        (padded(content([(1, PAGE)]), 1), "pages is in disorder"),
        (padded(content([(0, PAGE + 1)]), 1), "pages is in disorder"),
        (padded(content([(PAGE, PAGE), (0, PAGE)]), 2), "pages is in disorder"),
        (padded(content([(0, 2 * PAGE), (PAGE, PAGE)]), 3), "pages is in disorder"),
        (padded(content([(-PAGE, PAGE)]), 1), "is damaged"),
        (padded(content([(1 << 61, PAGE)]), 1), "memory where the machine has none"),
        (padded(content([(4 * MIB - PAGE, 2 * PAGE)]), 2), "memory where the machine has none"),
    ],
)
def test_every_wrong_file_is_one_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = tmp_path / "snapshot"
    path.write_bytes(data)
    memory = GuestMemory(4 * MIB, HostBlock)
    with pytest.raises(StateError, match=sentence) as error, SnapshotFile(path) as saved:
        saved.load(memory)
    assert "\n" not in str(error.value)
    memory.close()


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "missing", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(StateError, match=f"cannot be read: {reason}"):
            SnapshotFile(path)
