"""`softkvm run` from its arguments to its exit status, with a guest played by the test."""

from __future__ import annotations

import json
import os
import pty
import signal
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softkvm.cli import app, guest
from softkvm.vmm import ConfigError, Stop, StopReason
from tests.helpers.fake_machine import FakeMachine, stop


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a guest, so that nothing is fetched."""
    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path / "cache"))
    files = guest.Cache(tmp_path / "cache")
    files.store("vmlinuz-cloud", b"kernel", "linux-image-6.1-cloud", "6.1-1", "./boot/vmlinuz")
    files.store("busybox", b"busybox", "busybox-static", "1.35", "./bin/busybox")
    return files.directory


@contextmanager
def descriptor(number: int, source: int) -> Iterator[None]:
    """`source` in the place of descriptor `number` for the time of the block."""
    saved = os.dup(number)
    os.dup2(source, number)
    try:
        yield
    finally:
        os.dup2(saved, number)
        os.close(saved)


@contextmanager
def standard_input(data: bytes) -> Iterator[None]:
    """A pipe with `data` as standard input."""
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    with descriptor(0, reader):
        os.close(reader)
        yield


def test_command_status_and_streams_are_passed_through(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    def play(self: FakeMachine) -> Stop:
        self.print("kernel log\n")
        self.print("stdin\n", port=3)
        assert self.read(1) == b"5\ninput"
        self.print("stdin\n", port=3)
        assert self.read(1) == b"0\n"
        self.print("out\n", port=1)
        self.print("err\n", port=2)
        self.print("status 7\n", port=3)
        return self.wait_stopped()

    machine.guest = play
    with standard_input(b"input"):
        assert app.main(["run", "--", "sh", "-c", "exit 7"]) == 7
    captured = capfd.readouterr()
    assert captured.out == "out\n"
    assert captured.err == "softkvm: software CPU cascadelake, 512M of memory; linux-image-6.1-cloud 6.1-1, busybox-static 1.35\nerr\n"
    assert machine.made[0].closed


def test_machine_gets_the_options(machine: type[FakeMachine]) -> None:
    machine.guest = lambda _: stop(StopReason.POWER_OFF)
    with standard_input(b""):
        options = ["-m", "1G", "-c", "2", "--cores", "1", "--cpu", "epyc,-pcid", "-p", "nokaslr", "--timeout", "9"]
        assert app.main(["run", *options, "--", "true"]) == 0
    made = machine.made[0]
    assert (made.configuration["memory"], made.configuration["cpu"], made.timeout) == ("1G", "epyc,-pcid", 9.0)
    assert (made.configuration["cpus"], made.configuration["cores"]) == (2, 1)
    assert made.configuration["append"] == "panic=-1 quiet nokaslr"


def test_a_snapshot_is_restored_in_place_of_a_boot(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    def play(self: FakeMachine) -> Stop:
        assert self.read(0) == b"typed at once"
        self.print("status 7\n", port=3)  # of the command that was running when the machine was saved
        return self.wait_stopped()

    machine.guest = play
    with standard_input(b"typed at once"):
        assert app.main(["run", "--restore", "file"]) == 7
    assert machine.made[0].configuration["restored"] == "file"
    assert capfd.readouterr().err == "softkvm: going on from file\n"


@pytest.mark.parametrize(
    ("ended", "status", "sentence"),
    [
        (stop(StopReason.PANIC, "Kernel panic - not syncing: test"), 255, "ended by panic at 0xffffffff81000000: Kernel panic"),
        (stop(StopReason.TRIPLE_FAULT), 255, "ended by triple fault"),
        (stop(StopReason.RESET), 255, "ended by reset"),
        (stop(StopReason.TIMEOUT), 124, "was stopped after 3 seconds"),
    ],
)
def test_guest_failure_has_a_status_and_a_sentence(
    machine: type[FakeMachine], capfd: pytest.CaptureFixture[str], ended: Stop, status: int, sentence: str
) -> None:
    def play(self: FakeMachine) -> Stop:
        self.print("last words\n")
        return ended

    machine.guest = play
    with standard_input(b""):
        assert app.main(["run", "--timeout", "3", "--", "true"]) == status
    captured = capfd.readouterr()
    assert sentence in captured.err
    assert captured.out == ""
    assert ("last words" in captured.err) == (status == 255)


def test_internal_error_leaves_a_report(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str], cache: Path) -> None:
    machine.guest = lambda _: stop(StopReason.INTERNAL_ERROR, "vmentry failed")
    with standard_input(b""):
        assert app.main(["run"]) == 125
    (path,) = (cache / "reports").iterdir()
    assert str(path) in capfd.readouterr().err
    report = json.loads(path.read_bytes())
    assert report["message"] == "vmentry failed"
    assert report["state"]["stop"]["rip"] == 0xFFFFFFFF81000000


def test_exception_in_the_machine_leaves_a_report_and_no_traceback(
    machine: type[FakeMachine], capfd: pytest.CaptureFixture[str], cache: Path
) -> None:
    def play(self: FakeMachine) -> Stop:
        raise AssertionError("impossible")

    machine.guest = play
    with standard_input(b""):
        assert app.main(["run"]) == 125
    error = capfd.readouterr().err
    assert "this is a bug in softkvm (AssertionError: impossible)" in error
    assert "Traceback" not in error
    (path,) = (cache / "reports").iterdir()
    assert any("impossible" in line for line in json.loads(path.read_bytes())["traceback"])


def test_interrupt_stops_the_machine(machine: type[FakeMachine]) -> None:
    def play(self: FakeMachine) -> Stop:
        os.kill(os.getpid(), signal.SIGINT)
        return self.wait_stopped()

    machine.guest = play
    before = signal.getsignal(signal.SIGINT)
    with standard_input(b""):
        assert app.main(["run", "--", "true"]) == 130
    assert machine.made[0].closed
    assert signal.getsignal(signal.SIGINT) is before


def test_reader_that_has_gone_stops_the_machine(machine: type[FakeMachine]) -> None:
    def play(self: FakeMachine) -> Stop:
        self.print("line\n", port=1)
        return self.wait_stopped()

    machine.guest = play
    reader, writer = os.pipe()
    os.close(reader)
    with standard_input(b""), descriptor(1, writer):
        os.close(writer)
        assert app.main(["run", "--", "yes"]) == 141


def test_pipe_into_the_console_waits_for_the_shell(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    def play(self: FakeMachine) -> Stop:
        assert self.inputs[0].empty()
        self.print("shell\n", port=3)
        assert self.read(0) == b"uname\n"
        assert self.read(0) == b"\x04"
        self.print("Linux\n")
        return stop(StopReason.POWER_OFF)

    machine.guest = play
    with standard_input(b"uname\n"):
        assert app.main(["run"]) == 0
    assert capfd.readouterr().out == "Linux\n"


def test_keyboard_quits_and_the_terminal_is_restored(machine: type[FakeMachine]) -> None:
    outside, inside = pty.openpty()
    before = termios.tcgetattr(inside)
    states: list[int] = []

    def play(self: FakeMachine) -> Stop:
        states.append(termios.tcgetattr(inside)[3] & termios.ICANON)
        os.write(outside, b"ls\r\x01x")
        assert self.read(0) == b"ls\r"
        return self.wait_stopped()

    machine.guest = play
    with descriptor(0, inside), descriptor(1, inside):
        assert app.main(["run"]) == 0
    assert states == [0]
    assert termios.tcgetattr(inside) == before
    assert "SOFTKVM_ROWS=" in machine.made[0].configuration["append"]
    os.close(outside)
    os.close(inside)


def test_terminal_is_restored_when_the_machine_fails(machine: type[FakeMachine]) -> None:
    outside, inside = pty.openpty()
    before = termios.tcgetattr(inside)

    def play(self: FakeMachine) -> Stop:
        raise RuntimeError

    machine.guest = play
    with descriptor(0, inside), descriptor(1, inside):
        assert app.main(["run"]) == 125
    assert termios.tcgetattr(inside) == before
    os.close(outside)
    os.close(inside)


def test_json_is_one_object_and_nothing_else(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str]) -> None:
    def play(self: FakeMachine) -> Stop:
        self.print("log\n")
        self.print("out\n", port=1)
        self.print("err\n", port=2)
        self.print("status 3\n", port=3)
        return self.wait_stopped()

    machine.guest = play
    with standard_input(b""):
        assert app.main(["run", "--json", "--", "true"]) == 3
    outcome = json.loads(capfd.readouterr().out)
    assert outcome.pop("seconds") >= 0
    assert outcome == {
        "status": 3,
        "reason": "interrupted",
        "detail": "detail",
        "console": "log\n",
        "stdout": "out\n",
        "stderr": "err\n",
        "truncated": False,
        "stats": {"seconds": 1.5, "exits": {"io": 12345}},
    }


@pytest.mark.parametrize(("option", "expected"), [("--stats", "12,345"), ("--stats=json", '"exits":{"io":12345}')])
def test_counters_are_printed_at_the_end(machine: type[FakeMachine], capfd: pytest.CaptureFixture[str], option: str, expected: str) -> None:
    machine.guest = lambda _: stop(StopReason.POWER_OFF)
    with standard_input(b""):
        assert app.main(["run", option]) == 0
    assert expected in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-k", "/no/such/kernel"], "there is no kernel /no/such/kernel"),
        (["-i", "/no/such/initrd"], "there is no initial RAM disk /no/such/initrd"),
        (["-i", __file__, "--", "true"], "`-i` and `-- CMD` exclude each other"),
        (["--timeout", "0"], "more than 0 seconds"),
        (["--timeout", "soon"], "not a valid float"),
        (["--selftest", "-k", "cloud"], "so it excludes kernel"),
        (["--selftest", "--", "true"], "so it excludes command"),
        (["--no-such-option"], "No such option"),
        (["--restore", "x", "-m", "1G"], "`--restore` excludes memory"),
        (["--restore", "x", "--", "true"], "`--restore` and `-- CMD` exclude each other"),
        (["--name", "a/b"], "'a/b' is not a name for a VM"),
        (["--introspection", "tool,dialect=v8"], "'v8' is no dialect of KVMI; there are auto, v9, libkvmi, v12"),
        (["--introspection", "vsock:1"], "'vsock:1' is no vsock address; write vsock:CID:PORT"),
    ],
)
def test_bad_input_is_one_sentence_and_125(
    machine: type[FakeMachine], capfd: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert app.main(["run", *arguments]) == 125
    captured = capfd.readouterr()
    assert sentence in captured.err
    assert "Traceback" not in captured.err
    assert machine.made == []


def test_bad_configuration_is_one_sentence_and_125(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(**_: object) -> None:
        raise ConfigError("'8X' is not a memory size; write for example 512M or 2G")

    monkeypatch.setattr("softkvm.cli.run.Machine", refuse)
    with standard_input(b""):
        assert app.main(["run", "-m", "8X"]) == 125
    assert capfd.readouterr().err == "softkvm: '8X' is not a memory size; write for example 512M or 2G\n"


def test_full_disk_while_caching_is_one_sentence_and_125(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fetch(*_: object) -> None:
        guest.Cache(tmp_path).store("vmlinuz-generic", b"kernel", "linux-image", "1", "./boot/vmlinuz")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guest.Provider, "kernel", fetch)
    monkeypatch.setattr(os, "fsync", full)
    assert app.main(["run", "-k", "generic"]) == 125
    assert capfd.readouterr().err.endswith("cannot be written: No space left on device\n")


def test_no_thread_is_left(machine: type[FakeMachine]) -> None:
    machine.guest = lambda _: stop(StopReason.POWER_OFF)
    with standard_input(b""):
        app.main(["run"])
    assert [thread.name for thread in threading.enumerate() if thread.name == "machine"] == []
