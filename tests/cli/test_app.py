"""The command tree: help, version, doctor, completion."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softkvm.cli import app, doctor, report
from softkvm.cli.options import RunOptions
from softkvm.vmm import config


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("run", "doctor", "version"))


def test_help_of_run_shows_options_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    short = ("-k, --kernel", "-i, --initrd", "-p, --append", "-m, --memory", "-c, --cpus")
    long = ("--cpu", "--kvm", "--timeout", "--stats", "--json", "--selftest")
    assert all(option in text for option in short + long)
    assert "[default: 512M]" in text


def test_defaults_are_those_of_the_machine() -> None:
    assert (RunOptions().memory, RunOptions().cpu) == (config.DEFAULT_MEMORY, config.DEFAULT_CPU)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["version"]) == 0
    assert capsys.readouterr().out == f"softkvm {report.softkvm_version()}\n"


def test_unknown_command_is_125(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["fly"]) == 125
    assert "No such command 'fly'" in capsys.readouterr().err


def test_only_a_process_of_its_own_collects_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds: list[int] = []
    monkeypatch.setattr(gc, "set_threshold", thresholds.append)
    assert app.main(["version"]) == 0
    assert thresholds == []
    monkeypatch.setattr(sys, "argv", ["softkvm", "version"])
    assert app.main() == 0
    assert thresholds[0] > gc.get_threshold()[0]


def test_doctor_lists_every_requirement(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path))
    app.main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["requirement"] for row in rows] == ["Python", "engine", "translator", "shared memory", "cache", "apt", "guests"]
    assert all(row["remedy"] for row in rows if row["state"] != "ok")


def test_doctor_tells_what_makes_host_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(translator: str) -> doctor.Finding:
        monkeypatch.setattr(report, "versions", lambda: {"engine.version": "1", "engine.translator": translator})
        return next(finding for finding in doctor.examine() if finding.requirement == "translator")

    assert found("x86_64").state is doctor.State.OK
    missing = found("none: no back end for aarch64 hosts")
    assert missing.state is doctor.State.OPTIONAL
    assert "aarch64" in missing.found
    assert missing.remedy


def test_doctor_fails_only_for_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("apt", doctor.State.OPTIONAL, "no apt-get", "Do without.")])
    assert app.main(["doctor"]) == 0
    assert "Do without." in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("engine", doctor.State.MISSING, "not loadable", "Build it.")])
    assert app.main(["doctor"]) == 1


def test_doctor_names_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path / "file"))
    finding = next(finding for finding in doctor.examine() if finding.requirement == "cache")
    assert finding.state is doctor.State.MISSING
    assert "SOFTKVM_CACHE" in finding.remedy


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed(shell: str) -> None:
    environment = os.environ | {"_SOFTKVM_COMPLETE": f"{shell}_source"}
    script = "from softkvm.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "_softkvm" in result.stdout


def test_closed_standard_input_is_an_empty_one() -> None:
    script = "import os; from softkvm.cli import app; app.main(['version']); os.fstat(0); assert os.read(0, 1) == b''"
    result = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "{script}" <&-'], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_does_not_load_the_machine() -> None:
    script = (
        "import sys; from softkvm.cli import app; app.main(['--help']); sys.exit('softkvm.vmm' in sys.modules or 'rich' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
