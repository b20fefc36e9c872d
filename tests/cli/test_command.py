"""The control line: what /init says, and whatever else a guest may write there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm.cli.command import ControlLine, frame


class Heard:
    """Records what a control line reports."""

    def __init__(self) -> None:
        self.events: list[str | int] = []
        self.line = ControlLine(lambda: self.events.append("shell"), lambda: self.events.append("stdin"), self.events.append)


@pytest.fixture
def heard() -> Heard:
    return Heard()


def test_lines_are_reported_in_order(heard: Heard) -> None:
    heard.line.write(b"shell\nstdin\nstdin\nstatus 7\n")
    assert heard.events == ["shell", "stdin", "stdin", 7]


def test_pieces_make_a_line(heard: Heard) -> None:
    for byte in b"status 130\r\n":
        heard.line.write(bytes([byte]))
    assert heard.events == [130]


def test_nothing_is_heard_after_the_status(heard: Heard) -> None:
    heard.line.write(b"status 0\nstatus 1\nstdin\n")
    assert heard.events == [0]


@pytest.mark.parametrize("line", [b"status 256", b"status -1", b"status", b"status 7 7", b"STATUS 7", b"", b"\xff\xfe"])
def test_unknown_lines_are_dropped(heard: Heard, line: bytes) -> None:
    heard.line.write(line + b"\n")
    assert heard.events == []


def test_endless_line_keeps_no_memory_and_no_meaning(heard: Heard) -> None:
    for _ in range(1000):
        heard.line.write(b"x" * 1000)
    heard.line.write(b"\nstatus 3\n")
    assert heard.events == [3]


@given(st.lists(st.binary(max_size=40)))
def test_any_bytes_are_harmless(pieces: list[bytes]) -> None:
    heard = Heard()
    for piece in pieces:
        heard.line.write(piece)
    assert all(event in ("shell", "stdin") or isinstance(event, int) for event in heard.events)


def test_frame_has_its_size_in_front() -> None:
    assert frame(b"abc") == b"3\nabc"
    assert frame(b"") == b"0\n"
