"""`softkvm list`, `pause` and `resume`: against a run whose guest is played by the test, and against peers that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from softkvm.cli import app, guest, vms
from softkvm.vmm import Stop, StopReason
from softkvm.vmm.monitor import names
from tests.helpers.fake_machine import FakeMachine, stop


@contextmanager
def listening(name: str) -> Iterator[None]:
    """A socket of that name behind which nobody answers."""
    listener = names.listen(name)
    try:
        yield
    finally:
        names.release(name, listener)


def test_a_run_can_be_listed_paused_and_resumed(
    machine: type[FakeMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def play(self: FakeMachine) -> Stop:
        listings = []
        for command in ("pause", "resume"):
            assert app.main([command, "web"]) == 0
            assert app.main(["list", "--json"]) == 0
            (listed,) = json.loads(capfd.readouterr().out)
            listings.append((listed["name"], listed["pid"], listed["state"], listed["memory"]))
        assert listings == [("web", os.getpid(), "paused", 512 << 20), ("web", os.getpid(), "running", 512 << 20)]
        assert app.main(["list"]) == 0
        assert "512 MiB" in capfd.readouterr().out
        return stop(StopReason.POWER_OFF)

    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path / "cache"))
    files = guest.Cache(tmp_path / "cache")
    files.store("vmlinuz-cloud", b"kernel", "linux-image", "6.1-1", "./boot/vmlinuz")
    files.store("busybox", b"busybox", "busybox-static", "1.35", "./bin/busybox")
    machine.guest = play
    assert app.main(["run", "--name", "web", "--timeout", "60", "--", "true"]) == 0, capfd.readouterr().err
    assert names.running() == []


def test_a_vm_that_does_not_answer_is_listed_all_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vms, "_PATIENCE", 0.001)
    with listening("deaf"):
        assert app.main(["list"]) == 0
    assert "no answer" in capsys.readouterr().out


def test_without_any_vm(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["list"]) == 0
    assert app.main(["list", "--json"]) == 0
    assert app.main(["pause"]) == 125
    captured = capsys.readouterr()
    assert captured.out == "[]\n"
    assert captured.err == "softkvm: no VM is running\nsoftkvm: no VM is running\n"


def test_names_of_running_vms_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_SOFTKVM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "softkvm pause w")
    monkeypatch.setenv("COMP_CWORD", "2")
    with listening("web"), listening("db"), pytest.raises(SystemExit):
        app.main([])
    assert capsys.readouterr().out == "plain,web\n"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    with pytest.raises(SystemExit):
        app.main([])
    assert "plain" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["pause", "a/b"], "is not a name for a VM"), (["resume", "other"], "no VM named other is running; there are deaf")],
)
def test_mistakes_are_one_sentence_and_125(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with listening("deaf"):
        assert app.main(arguments) == 125
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_name_that_is_taken_ends_the_run_before_it_begins(
    machine: type[FakeMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    machine.guest = lambda _: pytest.fail("the guest must not run")
    with listening("web"):
        assert app.main(["run", "--name", "web", "-k", str(kernel), "-i", str(kernel)]) == 125
    assert "a VM named web is running already" in capsys.readouterr().err


def test_a_run_without_a_name_does_without_a_socket(
    machine: type[FakeMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"kernel")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    machine.guest = lambda _: stop(StopReason.POWER_OFF)
    assert app.main(["run", "-k", str(kernel), "-i", str(kernel)]) == 0
    assert "no control socket: the directory" in capsys.readouterr().err
