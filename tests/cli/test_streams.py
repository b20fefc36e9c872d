"""The sinks of guest output: whole, bounded, and safe against a reader that has gone."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from softkvm.cli import streams
from softkvm.cli.streams import Capture, ConsoleTail, DescriptorSink, Surrender


@pytest.fixture
def surrender() -> Iterator[Surrender]:
    with closing(Surrender()) as switch:
        yield switch


def test_descriptor_gets_everything(surrender: Surrender) -> None:
    reader, writer = os.pipe()
    DescriptorSink(writer, surrender, lambda: None)(b"hello")
    os.close(writer)
    assert os.read(reader, 100) == b"hello"
    os.close(reader)


def test_sink_waits_for_its_reader_until_it_may_give_up(surrender: Surrender) -> None:
    reader, writer = os.pipe()
    sink = DescriptorSink(writer, surrender, lambda: None)
    waiting = threading.Thread(target=sink, args=(bytes(1 << 20),))
    waiting.start()
    received = len(os.read(reader, 1 << 16))
    assert waiting.is_alive()
    surrender.throw()
    waiting.join(timeout=60)
    assert not waiting.is_alive()
    assert 0 < received < 1 << 20
    os.close(writer)
    os.close(reader)


def test_broken_pipe_is_told_once_and_then_ignored(surrender: Surrender) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken: list[bool] = []
    sink = DescriptorSink(writer, surrender, lambda: broken.append(True))
    sink(b"a")
    sink(b"b")
    os.close(writer)
    assert broken == [True]


def test_capture_is_bounded() -> None:
    capture = Capture()
    capture(b"a" * streams.CAPTURE_LIMIT)
    assert not capture.truncated
    capture(b"b")
    assert capture.truncated
    assert len(capture.text) == streams.CAPTURE_LIMIT


def test_capture_replaces_what_is_not_text() -> None:
    capture = Capture()
    capture(b"\xffok")
    assert capture.text == "\ufffdok"


def test_tail_keeps_the_last_bytes_and_forwards_all() -> None:
    forwarded: list[bytes] = []
    tail = ConsoleTail(forwarded.append)
    for index in range(300):
        tail(bytes([index & 0xFF]) * 1024)
    assert len(tail.data) == streams.TAIL_LIMIT
    assert tail.data[-1] == 299 & 0xFF
    assert sum(map(len, forwarded)) == 300 * 1024
