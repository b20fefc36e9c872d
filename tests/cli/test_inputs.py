"""The three sources of guest input."""

import os
import threading
from contextlib import closing

import pytest

from softkvm.cli.inputs import CommandInput, ConsolePipe, Keyboard, Prompt
from softkvm.cli.streams import Surrender


def test_keyboard_sends_all_but_its_own_keys(capsys: pytest.CaptureFixture[str]) -> None:
    sent: list[bytes] = []
    quits: list[bool] = []
    keyboard = Keyboard(0, sent.append, lambda: quits.append(True))
    keyboard.feed(b"ls\r\x01h")
    assert (sent, quits) == ([b"ls\r"], [])
    assert "Ctrl-A X quits" in capsys.readouterr().err
    keyboard.feed(b"\x01x")
    assert quits == [True]


def test_terminal_that_goes_away_quits() -> None:
    quits: list[bool] = []
    Keyboard(0, lambda _: None, lambda: quits.append(True)).feed(b"")
    assert quits == [True]


def test_console_pipe_waits_for_the_guests_shell() -> None:
    sent: list[bytes] = []
    source = ConsolePipe(0, sent.append, is_ready=False)
    assert not source.wanted()
    source.ready()
    assert source.wanted()
    source.feed(b"uname\n")
    source.feed(b"")
    assert sent == [b"uname\n", b"\x04"]
    assert not source.wanted()


def test_command_input_gives_one_block_for_each_request() -> None:
    sent: list[bytes] = []
    source = CommandInput(0, sent.append)
    assert not source.wanted()
    source.request()
    assert source.wanted()
    source.feed(b"data")
    assert not source.wanted()
    source.request()
    source.feed(b"")
    assert sent == [b"4\ndata", b"0\n"]


def test_a_prompt_gives_full_pieces_however_they_are_written() -> None:
    sent: list[bytes] = []
    reading, writing = os.pipe()
    with closing(Surrender()) as surrender:
        source = CommandInput(reading, sent.append)
        prompt = Prompt(source, surrender)
        prompt.serve()
        assert sent == [], "nobody asked"
        source.request()
        thread = threading.Thread(target=prompt.serve)
        thread.start()
        for _ in range(source.piece_size):
            os.write(writing, b"x")
        thread.join()
        os.write(writing, b"end")
        os.close(writing)
        for _ in range(2):
            source.request()
            prompt.serve()
    os.close(reading)
    assert sent == [b"%d\n" % source.piece_size + b"x" * source.piece_size, b"3\nend", b"0\n"]


def test_a_prompt_gives_up_when_told() -> None:
    sent: list[bytes] = []
    reading, writing = os.pipe()
    with closing(Surrender()) as surrender:
        source = ConsolePipe(reading, sent.append, is_ready=True)
        surrender.throw()
        Prompt(source, surrender).serve()
    os.close(reading)
    os.close(writing)
    assert sent == []
