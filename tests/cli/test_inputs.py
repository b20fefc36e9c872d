"""The three sources of guest input."""

import pytest

from softkvm.cli.inputs import CommandInput, ConsolePipe, Keyboard


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
