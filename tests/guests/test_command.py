"""`softkvm run -- CMD` and its exit statuses, with real guests."""

from __future__ import annotations

import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softkvm.cli.selftest import image
from softkvm.testing import GuestRun

pytestmark = [pytest.mark.guest, pytest.mark.slow]

SOFTKVM = [sys.executable, "-m", "softkvm.cli", "run", "--timeout", "600"]


def softkvm(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """`softkvm run` as a person would run it in a pipe."""
    return subprocess.run([*SOFTKVM, *arguments], input=stdin, capture_output=True, check=False)


def test_status_is_the_commands() -> None:
    assert softkvm("--", "sh", "-c", "exit 7").returncode == 7


def test_unknown_command_is_127() -> None:
    result = softkvm("--", "no-such-command")
    assert result.returncode == 127
    assert b"not found" in result.stderr


def test_streams_are_apart_and_binary_clean() -> None:
    data = random.Random(1).randbytes(16384)
    result = softkvm("--", "sh", "-c", "cat; echo oops >&2", stdin=data)
    assert result.stdout == data
    assert result.stderr.endswith(b"\noops\n")
    assert result.returncode == 0


def test_words_of_the_command_survive() -> None:
    result = softkvm("--", "printf", "[%s]", "a b", "", "$HOME", "it's", 'q"q')
    assert result.stdout == b"""[a b][][$HOME][it's][q"q]"""


def test_panic_is_255() -> None:
    result = softkvm("--", "sh", "-c", "echo c >/proc/sysrq-trigger")
    assert result.returncode == 255
    assert b"Kernel panic - not syncing: sysrq triggered crash" in result.stderr


def test_triple_fault_is_255(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    invalid_opcode = b"\x0f\x0b"  # ud2, without an IDT that could take it
    kernel.write_bytes(image.bzimage(invalid_opcode.rjust(image.ENTRY64 + len(invalid_opcode), b"\0")))
    initrd.write_bytes(b"none")
    result = softkvm("-k", str(kernel), "-i", str(initrd))
    assert result.returncode == 255
    assert b"the guest ended by triple fault" in result.stderr


def test_time_out_is_124() -> None:
    result = softkvm("--timeout", "2", "--", "sleep", "1000")
    assert result.returncode == 124
    assert b"stopped after 2 seconds" in result.stderr


def test_ctrl_c_is_130() -> None:
    with subprocess.Popen(
        [*SOFTKVM, "--", "sh", "-c", "echo ready; sleep 1000"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 130


def test_reader_that_goes_away_ends_the_guest() -> None:
    process = subprocess.Popen([*SOFTKVM, "--", "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(timeout=600) == 141


def test_script_piped_into_the_console() -> None:
    result = softkvm(stdin=b"echo $((6*7))-on-$(uname -s)\n")
    assert result.returncode == 0
    assert b"42-on-Linux" in result.stdout


@pytest.mark.parametrize("end", ["poweroff", "halt", "reboot", "exit", "sh\npoweroff"], ids=lambda end: end.replace("\n", ", "))
def test_the_shell_ends_the_machine(end: str) -> None:
    result = softkvm(stdin=f"{end}\necho after\n".encode())
    assert result.returncode == 0
    assert b"after" not in result.stdout[result.stdout.index(b"built-in shell") :]


def test_console_on_a_terminal() -> None:
    outside, inside = pty.openpty()
    with subprocess.Popen(SOFTKVM, stdin=inside, stdout=inside, stderr=inside, start_new_session=True) as process:
        os.close(inside)
        read_until(outside, b"# ")
        os.write(outside, b"tty; stty size\r")
        read_until(outside, b"/dev/ttyS0")
        os.write(outside, b"\x01x")
        assert process.wait(timeout=600) == 0
    os.close(outside)


def read_until(descriptor: int, text: bytes, timeout: float = 100) -> bytes:
    """What the terminal shows up to `text`."""
    shown = b""
    deadline = time.monotonic() + timeout
    while text not in shown:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"{text!r} did not appear after {shown[-500:]!r}"
        shown += os.read(descriptor, 4096)
    return shown


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("-m", "1M"), b"memory"),
        (("-m", "lots"), b"memory size"),
        (("--cpu", "i386"), b"cascadelake"),
        (("--cpu", "cascadelake,-nosuch"), b"nosuch"),
        (("-k", __file__), b"kernel"),
    ],
)
def test_bad_input_is_125_and_one_sentence(options: tuple[str, ...], sentence: bytes) -> None:
    result = softkvm(*options)
    assert result.returncode == 125
    assert sentence in result.stderr
    assert result.stderr.count(b"\n") == 1


def test_json_has_the_counters(guest_run: GuestRun) -> None:
    result = guest_run("true")
    assert result.status == 0
    assert result.seconds > 0
