"""The Ctrl-A keys, and a terminal that is always restored."""

import os
import pty
import termios
from collections.abc import Iterator

import pytest

from softkvm.cli import terminal
from softkvm.cli.terminal import EscapeKeys, Key


@pytest.fixture
def tty() -> Iterator[int]:
    """The program's end of a pseudo-terminal."""
    outside, inside = pty.openpty()
    yield inside
    os.close(inside)
    os.close(outside)


@pytest.mark.parametrize(
    ("typed", "meaning"),
    [
        (b"ls\r", [b"ls\r"]),
        (b"\x01x", [Key.QUIT]),
        (b"\x01X", [Key.QUIT]),
        (b"ab\x01hcd", [b"ab", Key.HELP, b"cd"]),
        (b"\x01\x01", [b"\x01"]),
        (b"a\x01qb", [b"ab"]),
        (b"\x03\x1a", [b"\x03\x1a"]),
    ],
)
def test_keys(typed: bytes, meaning: list[bytes | Key]) -> None:
    assert list(EscapeKeys().feed(typed)) == meaning


def test_escape_at_the_end_of_a_piece_is_remembered() -> None:
    keys = EscapeKeys()
    assert list(keys.feed(b"a\x01")) == [b"a"]
    assert list(keys.feed(b"x")) == [Key.QUIT]


def test_terminal_is_raw_inside_and_restored_after(tty: int) -> None:
    before = termios.tcgetattr(tty)
    with terminal.raw(tty):
        assert not termios.tcgetattr(tty)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
    assert termios.tcgetattr(tty) == before


def test_terminal_is_restored_after_an_exception(tty: int) -> None:
    before = termios.tcgetattr(tty)
    with pytest.raises(KeyboardInterrupt), terminal.raw(tty):
        raise KeyboardInterrupt
    assert termios.tcgetattr(tty) == before


@pytest.mark.parametrize(("value", "expected"), [("xterm-256color", "xterm-256color"), ("a b; init=/bin/sh", "vt100"), ("", "vt100")])
def test_only_a_terminal_name_reaches_the_kernels_command_line(monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("TERM", value)
    assert terminal.environment().split()[0] == f"TERM={expected}"
