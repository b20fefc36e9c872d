"""`--trace`, `--audit` and `--ioctl-filter`: where things go, and one sentence for what cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from softkvm import kvm, silicon
from softkvm.cli import app
from softkvm.cli.errors import CliError
from softkvm.cli.options import RunOptions
from softkvm.cli.watch import print_contexts, watched
from softkvm.host import context_tracking, entry, ftrace, trace


def test_nothing_is_watched_unless_asked_for() -> None:
    with watched(RunOptions()) as process:
        assert process.cross is entry.syscall_bare


def test_events_go_to_the_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with watched(RunOptions(trace=("kvm_entry",), trace_file=str(path))):
        trace.kvm_entry(0, 0xFFF0)
    assert not trace.kvm_entry.enabled
    assert path.read_text().startswith(ftrace.HEADER)
    assert path.read_text().endswith("kvm_entry: vcpu 0, rip 0xfff0\n")


def test_events_go_to_standard_error_without_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with watched(RunOptions(trace=("kvm_entry",))):
        trace.kvm_entry(0, 0xFFF0)
    assert "kvm_entry: vcpu 0, rip 0xfff0" in capsys.readouterr().err


def test_filter_and_audit_are_upon_the_process(tmp_path: Path) -> None:
    path = tmp_path / "filter.json"
    path.write_text('{"default_action": "allow", "rules": []}')
    with watched(RunOptions(audit=str(tmp_path / "audit"), ioctl_filter=str(path))) as process:
        assert len(process.filters) == 1
        assert process.audit is not None
    assert (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (RunOptions(trace=("kvm_fly",)), "no event matches 'kvm_fly'"),
        (RunOptions(trace=("kvm_exit",), trace_file="/nowhere/trace"), "/nowhere/trace cannot be written: No such file"),
        (RunOptions(audit="/nowhere/audit"), "/nowhere/audit cannot be written: No such file"),
        (RunOptions(ioctl_filter="/nowhere/filter"), "the ioctl filter /nowhere/filter cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_on(options: RunOptions, sentence: str) -> None:
    with pytest.raises(CliError, match=sentence), watched(options):
        pass
    assert not trace.recording()


def test_a_trace_file_needs_a_pattern() -> None:
    with pytest.raises(CliError, match="--trace-file"):
        RunOptions(trace_file="x").check()


def test_help_lists_the_events(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["run", "--trace", "help"]) == 0
    assert "kvm:kvm_entry" in capsys.readouterr().out


def test_the_time_in_each_context_is_counted_as_long_as_it_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with watched(RunOptions(contexts=True)) as process, kvm.System(silicon.Model("cascadelake"), process=process).create_vm() as vm:
        assert process.cross is entry.syscall
        vm.create_vcpu(0)
        vm.check_extension(0)
        print_contexts()
    assert not context_tracking.enabled()
    shown = capsys.readouterr().err
    assert [heading for heading in ("guest", "KVM", "VMM", "idle") if heading in shown] == ["guest", "KVM", "VMM", "idle"]
    assert re.search(r"^ *MainThread( +\d+\.\d{3}){4} *$", shown, re.MULTILINE)
