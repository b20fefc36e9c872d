"""The guest program on the host, and the conversation with it."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import click
import pytest

from benchmarks.guest import machines
from benchmarks.guest.cases import CASES

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return machines.compile_program(tmp_path_factory.mktemp("program"))


@needs_gcc
def test_every_case_computes_the_same_twice(program: Path) -> None:
    requests = {" ".join(case.request.split()[:2]) for case in CASES if case.request.startswith("case ")}
    with machines.serving("host", [program]) as server:
        for request in sorted(requests):
            first, second = server.ask(f"{request} 1 1"), server.ask(f"{request} 2 1")
            assert first.checksum == second.checksum, request
            assert first.wall > 0
            assert first.memory > 0


@needs_gcc
def test_commands_are_judged_by_their_output(program: Path) -> None:
    with machines.serving("host", [program]) as server:
        one, same, other = (server.ask(f"shell echo {word}") for word in ("one", "one", "other"))
        assert one.checksum == same.checksum != other.checksum


@needs_gcc
@pytest.mark.parametrize(
    ("request_line", "sentence"),
    [("case nothing 1 1", "there is no case nothing"), ("shell exit 3", "status 0x300 of exit 3"), ("what", "no such request: what")],
)
def test_what_the_program_cannot_do_is_an_error(program: Path, request_line: str, sentence: str) -> None:
    with pytest.raises(click.ClickException, match=f"host: {sentence}"), machines.serving("host", [program]) as server:
        server.ask(request_line)


def script(text: str) -> list[str]:
    """A stand-in for a machine."""
    return [sys.executable, "-c", text]


def test_answers_are_found_among_other_output() -> None:
    text = r"print('[ 1.0] boot\r\n@ready\r', flush=True); input(); print('noise\n@result 4 5 80 00000000000000ff\r', flush=True); input()"
    with machines.serving("machine", script(text)) as server:
        sample = server.ask("case any 1 1")
    assert (sample.wall, sample.checksum) == (20, "00000000000000ff")


def test_a_machine_that_ends_tells_why() -> None:
    with (
        pytest.raises(click.ClickException, match=re.escape("machine ended: no kernel")),
        machines.serving("machine", script("import sys; sys.exit('no kernel')")),
    ):
        pass


def test_a_run_that_fails_tells_why() -> None:
    with pytest.raises(click.ClickException, match="ended with 1: no kernel"):
        machines.whole_run(script("import sys; sys.exit('no kernel')"))
