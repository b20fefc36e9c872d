"""Machines on the real KVM and engine, saved and restored, with guests of a few instructions."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.host.clock import VirtualClock
from softkvm.vmm import ConfigError, Machine, RunState, StateError, Stop, StopReason, layout
from softkvm.vmm.layout import MIB
from softkvm.vmm.snapshot import SnapshotFile
from tests.vmm.boot import images
from tests.vmm.test_on_engine import HALT, out

CELL = 0x100000
"""Memory that the program writes; its last value is the exit status."""
SAY = out(layout.COM1.base, ord("x"))
KEEP = b"\xbb" + CELL.to_bytes(4, "little") + bytes.fromhex("c70315000000")
"""mov ebx, CELL; mov dword [rbx], 21"""
WAIT_FOR_A_KEY = b"\x66\xba" + (layout.COM1.base + 5).to_bytes(2, "little") + bytes.fromhex("ec a801 74fb")
"""mov dx, LSR; again: in al, dx; test al, 1; jz again"""
ADD_KEY = b"\x66\xba" + layout.COM1.base.to_bytes(2, "little") + bytes.fromhex("ec 0fb6c0 0103")
"""mov dx, RBR; in al, dx; movzx eax, al; add [rbx], eax"""
EXIT = bytes.fromhex("8b03 e7f4")
"""mov eax, [rbx]; out 0xF4, eax"""
PROGRAM = KEEP + SAY + WAIT_FOR_A_KEY + ADD_KEY + EXIT + HALT
KEY = 7
STATUS = (21 + KEY) << 1 | 1

Boot = Callable[..., Machine]


@pytest.fixture(params=["cascadelake,-pcid", "epyc,+invtsc"])
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Boot]:
    """Make machines with the program, or from a snapshot."""
    machines: list[Machine] = []

    def make(snapshot: Path | None = None, **options: Any) -> Machine:
        if snapshot is not None:
            machine = Machine.restore(snapshot, **options)
        else:
            path = tmp_path / "program"
            path.write_bytes(images.program(PROGRAM))
            machine = Machine(path, memory="16M", cpu=request.param, **options)
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.close()


def press(machine: Machine) -> int | None:
    """Let the program have its key; its exit status."""
    machine.send(bytes([KEY]))
    stop = machine.run(timeout=60)
    assert stop.reason is StopReason.EXIT, stop
    return stop.status


def test_saved_and_restored_machines_go_on_alike(boot: Boot, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    first = boot(cpus=2, kvm_parameters=["nrips=0"], test_device=True)
    assert first.run(until="x", timeout=60).reason is StopReason.UNTIL
    size = first.save(path)
    assert size == path.stat().st_size < MIB
    printed: list[bytes] = []
    second = boot(path, serial={0: printed.append})
    assert second.status() == first.status()
    third = boot(path)
    assert press(second) == STATUS
    assert press(first) == STATUS
    assert press(third) == STATUS
    with pytest.raises(StateError, match="has ended"):
        first.save(path)


def test_save_restore_save_gives_equal_bytes(boot: Boot, tmp_path: Path) -> None:
    machine = boot(cpus=2, clock=VirtualClock())
    machine.run(until="x", timeout=60)
    files = []
    for number in range(3):
        machine.save(tmp_path / str(number))
        files.append((tmp_path / str(number)).read_bytes())
        machine = boot(tmp_path / str(number), clock=VirtualClock())
    assert files[0] == files[1] == files[2]
    assert press(machine) == STATUS


def test_a_running_machine_is_saved_and_runs_on(boot: Boot, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"

    printed = threading.Event()
    machine = boot(serial={0: lambda data: printed.set()})
    outcome: list[Stop] = []
    runner = threading.Thread(target=lambda: outcome.append(machine.run(timeout=60)))
    runner.start()
    assert printed.wait(60)
    machine.save(path)
    machine.pause()
    machine.save(path)
    assert machine.status().state is RunState.PAUSED, "a paused machine stays paused"
    machine.resume()
    machine.send(bytes([KEY]))
    runner.join()
    assert [stop.status for stop in outcome] == [STATUS]
    assert press(boot(path)) == STATUS


def test_a_deterministic_machine_is_not_saved(boot: Boot, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="lives in a time of its own"):
        boot(deterministic=1).save(tmp_path / "snapshot")
    assert not (tmp_path / "snapshot").exists()


def test_clocks_are_ahead_by_the_time_on_the_shelf(boot: Boot, tmp_path: Path) -> None:
    shelf = 3_600_000_000_000
    path = tmp_path / "snapshot"
    before = VirtualClock(tsc_khz=2_000_000)
    machine = boot(clock=before, cpus=2)
    machine._vcpus[1].set_tsc_offset(12345)  # a vCPU that is out of phase stays so
    old = machine.tsc_status()
    machine.save(path)
    after = VirtualClock(tsc_khz=2_000_100, start_ns=before.monotonic_ns() // 3, realtime_ns=before.realtime_ns() + shelf)
    restored = boot(path, clock=after)
    new = restored.tsc_status()
    assert new.kvmclock - old.kvmclock == new.realtime - old.realtime == shelf
    for then, now in zip(old.vcpus, new.vcpus, strict=True):
        assert now.guest_tsc - then.guest_tsc == shelf * 2_000_000 // 1_000_000
        assert now.virtual_tsc_khz == 2_000_000
    assert [vcpu.matched for vcpu in new.vcpus] == [False, True]
    for device, time in (("rtc", "time_ns"), ("pm", "timer_ns")):
        was, is_ = (getattr(each._board.stateful()[device].save(), time) for each in (machine, restored))
        assert abs(is_ - was - shelf) <= 1, "a cycle of the TSC is no whole number of ns"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot to be spoiled."""
    directory = tmp_path_factory.mktemp("saved")
    (directory / "program").write_bytes(images.program(PROGRAM))
    with Machine(directory / "program", memory="16M") as machine:
        machine.run(until="x", timeout=60)
        machine.save(directory / "snapshot")
    return directory / "snapshot"


def try_restore(path: Path) -> None:
    """It is refused, or it is a machine that runs, whatever becomes of it."""
    with suppress(StateError, ConfigError), Machine.restore(path, clock=VirtualClock()) as machine:
        machine.run(timeout=0)


@given(data=st.data())
def test_spoiled_bytes_are_refused_or_harmless(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    (length,) = struct.unpack_from("<Q", content, 19)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 27 + length))] = data.draw(st.integers(0, 255))
    spoiled = tmp_path / "spoiled"
    spoiled.write_bytes(content[: data.draw(st.one_of(st.none(), st.integers(0, len(content))))])
    try_restore(spoiled)


VALUES = st.one_of(
    st.integers(-(1 << 63), (1 << 64) - 1), st.sampled_from([0, 1, -1, (1 << 64) - 1]), st.binary(max_size=40), st.booleans(), st.none()
)


def spoil(data: st.DataObject, value: Any) -> Any:
    """`value` with one thing in it replaced."""
    if isinstance(value, dict) and value:
        key = data.draw(st.sampled_from(sorted(value)))
        return value | {key: spoil(data, value[key])}
    if isinstance(value, list | tuple) and value:
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], spoil(data, value[index]), *value[index + 1 :]]
    if isinstance(value, bytes) and value and data.draw(st.booleans()):
        index = data.draw(st.integers(0, len(value) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))[: len(value) - index]
        return value[:index] + piece + value[index + len(piece) :]
    return data.draw(VALUES)


@given(data=st.data())
def test_spoiled_fields_are_refused_or_harmless(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    with SnapshotFile(saved) as original:
        state = msgspec.to_builtins(original.state, builtin_types=(bytes,))
        runs = original._runs
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["vcpus", "irqchips", "pit", "pit_ages", "devices", "clock", "hardware"]))
        state = state | {part: spoil(data, state[part])}
    record = msgspec.msgpack.encode((state, runs))
    heading = b"softkvm snapshot 1\n" + struct.pack("<Q", len(record)) + record
    pages = saved.read_bytes()[-sum(size for _, size in runs) :]
    spoiled = tmp_path / "spoiled"
    spoiled.write_bytes(heading + bytes(-len(heading) % 4096) + pages)
    try_restore(spoiled)


def change(path: Path, saved: Path, **parts: Any) -> Path:
    """The snapshot with parts of its state replaced."""
    with SnapshotFile(saved) as original:
        record = msgspec.msgpack.encode((msgspec.structs.replace(original.state, **parts), original._runs))
        pages = saved.read_bytes()[-sum(size for _, size in original._runs) :]
    heading = b"softkvm snapshot 1\n" + struct.pack("<Q", len(record)) + record
    path.write_bytes(heading + bytes(-len(heading) % 4096) + pages)
    return path


def test_snapshots_of_other_machines_are_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    with SnapshotFile(saved) as original:
        state = original.state
    replace = msgspec.structs.replace
    refused: list[tuple[dict[str, Any], str]] = [
        ({"hardware": replace(state.hardware, cpu="pentium")}, "pentium"),
        ({"hardware": replace(state.hardware, cpu="epyc")}, "is of another softkvm, whose CPU epyc has other features"),
        ({"hardware": replace(state.hardware, cpu="cascadelake,pcid")}, "is not [+]feature or -feature"),
        ({"hardware": replace(state.hardware, memory=1)}, "too small for the memory"),
        ({"hardware": replace(state.hardware, parameters=["nrips=maybe"])}, "is 0 or 1, not 'maybe'"),
        ({"vcpus": []}, "0 vCPUs for 1 CPUs"),
        ({"devices": {}}, "a board with other devices"),
        ({"vcpus": [replace(state.vcpus[0], regs=b"")]}, "0 bytes are no Regs structure"),
        ({"vcpus": [replace(state.vcpus[0], msrs=[(0x277, 0xFF)])]}, "the MSR 0x277 cannot be 0xff"),
        ({"vcpus": [replace(state.vcpus[0], tsc_khz=(1 << 31) - 1)]}, "KVM refuses the snapshot's state: TSC frequency out of range"),
    ]
    for parts, sentence in refused:
        with pytest.raises((StateError, ConfigError), match=sentence):
            Machine.restore(change(tmp_path / "other", saved, **parts))
