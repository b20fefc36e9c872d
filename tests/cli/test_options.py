"""Every option of every command: bad input is one sentence that names the value and says what would be right, and exit status 125.

A table has a bad value for each option; what it lacks fails the first test, so a new option cannot do without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from softkvm.cli import app, guest
from tests.cli.test_run import standard_input
from tests.vmm.boot import images

pytestmark = pytest.mark.usefixtures("a_guest")

GUEST = {
    "--kernel": ("/no/such/kernel", "there is no kernel /no/such/kernel; give a bzImage file or one of cloud, generic"),
    "--append": ("a\nb", "the kernel command line must be one line of text"),
    "--memory": ("8X", "'8X' is not a memory size; write for example 512M or 2G"),
    "--cpus": ("65", "a machine has 1 to 64 CPUs, not 65"),
    "--cpu": ("z80", r"z80.*(cascadelake|epyc)"),
    "--with": ("./no-such-program", r"no-such-program"),
    "--timeout": ("0", "more than 0 seconds"),
}
"""Of each command that boots a guest: a bad value, and what is said of it."""
VMI = {
    "--name": ("a/b", "'a/b' is not a name for a VM"),
    "--listen": ("/no/such/directory/socket", "/no/such/directory/socket"),
    "--dialect": ("v8", "'v8' is not one of 'v9', 'libkvmi', 'v12'"),
    "--timeout": ("-1", r"-1.0 is not in the range x>=?0"),
}
BAD: dict[str, dict[str, tuple[str, str]]] = {
    "run": GUEST
    | {
        "--initrd": ("/no/such/initrd", "there is no initial RAM disk /no/such/initrd"),
        "--cores": ("0", "0 is not in the range x>=1"),
        "--tier": ("jit", "'jit' is not one of 'interpreter', 'translator', 'auto'"),
        "--deterministic": ("-1", "-1 is not in the range 0<=x<=18446744073709551615"),
        "--kvm": ("npt=1", "KVM has no parameter 'npt'; it has "),
        "--stats": ("xml", "xml"),
        "--trace": ("no_such_event", "no_such_event"),
        "--trace-file": ("/no/such/directory/trace", "/no/such/directory/trace"),
        "--audit": ("/no/such/directory/audit", "/no/such/directory/audit"),
        "--ioctl-filter": ("/no/such/filter", "/no/such/filter"),
        "--introspection": ("tool,dialect=v8", "'v8' is no dialect of KVMI; there are auto, v9, libkvmi, v12"),
        "--name": ("a/b", "'a/b' is not a name for a VM"),
        "--restore": ("/no/such/snapshot", "/no/such/snapshot"),
        "--tsc-khz": ("0", r"a TSC runs at 1 to \d+ kHz, not 0"),
    },
    "audit replay": {"--cpu": GUEST["--cpu"], "--kvm": ("npt=1", "KVM has no parameter 'npt'; it has ")},
    **{
        f"perf {command}": GUEST
        | {
            "--event": ("teatime", r"teatime.*instructions"),
            "--count": ("999", "999 is not in the range x>=1000"),
            "--output": ("/no/such/directory/file", "/no/such/directory"),
            "--folded": ("/no/such/directory/file", "/no/such/directory"),
        }
        for command in ("record", "stat", "flame")
    },
    "trace branches": GUEST
    | {"--ring": ("hypervisor", "'hypervisor' is not one of 'all', 'kernel', 'user'"), "--most": ("0", "0 is not in the range x>=1")},
    "vmi watch": VMI | {"--size": ("0", "0 is not in the range"), "--access": ("z", "'z' is not one of")},
    "vmi dump": VMI | {"--format": ("zip", "'zip' is not one of")},
    "vmi syscalls": VMI | {"--pid": ("x", "'x' is not a valid integer")},
}
ANYTHING = {"--key": "a secret is any text", "--symbols": "looked at when there is a VM", "--process": "the name of a process is any text"}
"""Options without a wrong value, in the commands that have no row of their own for them."""


def options() -> Iterator[tuple[str, str]]:
    """Each option that takes a value, with its command."""

    def walk(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                yield from walk(inner, (*path, name))
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.is_flag:
                yield " ".join(path), max(parameter.opts, key=len)

    yield from walk(app.cli, ())


def row(command: str, option: str) -> tuple[str, str] | None:
    default = VMI if command.startswith("vmi ") else {}
    return BAD.get(command, default).get(option)


CASES = [
    pytest.param(command, option, *found, id=f"{command} {option}") for command, option in options() if (found := row(command, option))
]


@pytest.fixture
def a_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with a kernel of one instruction, so that nothing is fetched and little is booted; no VM runs."""
    monkeypatch.setenv("SOFTKVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    files = guest.Cache(tmp_path / "cache")
    files.store("vmlinuz-cloud", images.program(bytes.fromhex("b000e6f4")), "linux-image-6.1-cloud", "6.1-1", "./boot/vmlinuz")
    files.store("busybox", b"busybox", "busybox-static", "1.35", "./bin/busybox")


def test_every_option_has_a_bad_value() -> None:
    assert [(command, option) for command, option in options() if row(command, option) is None and option not in ANYTHING] == []


@pytest.mark.parametrize(("command", "option", "value", "expected"), CASES)
def test_bad_values_are_one_sentence_and_125(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, command: str, option: str, value: str, expected: str
) -> None:
    arguments = {"audit replay": [str(tmp_path / "log")], "vmi watch": ["0x1000"], "vmi maps": ["1"], "vmi files": ["1"]}
    arguments |= {"vmi dump": ["core"], "vmi break": ["symbol"], "vmi exec": []}
    also = {"--trace-file": ["--trace", "kvm_exit"]}
    (tmp_path / "log").write_bytes(b"")
    with standard_input(b""):
        assert app.main([*command.split(), option, value, *also.get(option, []), *arguments.get(command, [])]) == 125
    said = capfd.readouterr().err
    assert re.search(expected, said), said
    assert "Traceback" not in said
    assert "bug in softkvm" not in said
    assert re.match(r"(softkvm|Error): \S", said.splitlines()[-1])
