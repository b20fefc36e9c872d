"""The commands of `softkvm vmi` without a guest: their help, their mistakes, and what they make of hostile text."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from softkvm.cli import app, output
from softkvm.cli.vmi import vmi
from softkvm.cli.vmi.look import _tree
from softkvm.vmi.linux.tasks import Process


@pytest.mark.parametrize("name", sorted(vmi.commands))
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(vmi, [name, "--help"])
    assert result.exit_code == 0
    assert "--name" in result.output
    assert "--listen" in result.output


def test_no_vm_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["vmi", "ps"]) == 125
    assert capsys.readouterr().err == "softkvm: no VM is running\n"


def test_name_and_listen_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["vmi", "ps", "--name", "a", "--listen", "b"]) == 125
    assert "exclude each other" in capsys.readouterr().err


def test_a_socket_that_cannot_be_made_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["vmi", "ps", "--listen", "/nosuch/directory/socket"]) == 125
    assert capsys.readouterr().err.count("\n") == 2


def test_the_command_is_in_the_tree() -> None:
    assert isinstance(app.cli.commands["vmi"], click.Group)


def test_a_guests_text_is_harmless() -> None:
    assert output.plain("\x1b]0;owned\x07[b]") == "?]0;owned?[b]"


def process(pid: int, ppid: int) -> Process:
    return Process(pid, ppid, 0, "S", 1, f"p{pid}", (), False, 0, 0, 0)


def test_a_tree_has_everybody_once_even_in_a_circle() -> None:
    found = [process(1, 0), process(2, 0), process(3, 1), process(4, 3), process(9, 77), process(5, 5)]
    assert [(depth, item.pid) for depth, item in _tree(found)] == [(0, 1), (1, 3), (2, 4), (0, 2), (0, 9), (0, 5)]
