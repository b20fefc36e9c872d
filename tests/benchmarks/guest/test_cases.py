"""The table of cases, and its names in the guest program."""

from __future__ import annotations

import re

import pytest

from benchmarks.guest.cases import CASES, select
from benchmarks.guest.machines import PROGRAMS


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_program_has_every_case_and_no_other() -> None:
    asked = {case.request.split()[1] for case in CASES if case.request.startswith("case ")}
    offered = {name for source in PROGRAMS.glob("*.c") for name in re.findall(r'^\t\{ "([\w-]+)", ', source.read_text(), re.MULTILINE)}
    assert asked == offered


def test_a_name_chooses_a_case_or_a_group() -> None:
    assert [case.name for case in select(("boot",))] == ["boot", "boot, 2 CPUs"]
    assert [case.name for case in select(("getppid", "rep strings"))] == [
        "rep-movsb-64",
        "rep-movsb-64k",
        "rep-stosb-64k",
        "rep-stosq-64k",
        "getppid",
    ]
    assert select(()) == list(CASES)


def test_a_name_that_chooses_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no case 'getpid'"):
        select(("getpid",))
