"""Flame graphs: folding samples, and the picture."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast
from xml.etree import ElementTree

from softkvm.cli.perf import flame
from softkvm.cli.perf.guest import Process
from softkvm.cli.perf.sampler import Sample
from softkvm.host.perf.branches import Branch
from softkvm.vmi.linux.maps import Area

PROGRAM = Process(7, "prog", [Area(0x1000, 0x2000, "r-xp", 0, 1, "/root/prog")])
VIEW = cast(Any, SimpleNamespace(kernel=None, files={}))


def sample(user: bool, ip: int, *branches: Branch) -> Sample:
    return Sample(ip, user, 0, 0, PROGRAM, branches, () if user else (ip,))


def test_callers_come_from_open_calls_and_strangers_end_the_stack() -> None:
    mine, stranger = Branch(0x1100, 0x1200, False, 0), Branch(0x9000, 0x1000, False, 0)
    stacks = flame.fold([sample(True, 0x1204, mine, stranger), sample(True, 0x1204, mine)], VIEW)
    assert stacks == Counter({("prog", "[prog]", "[prog]"): 2})


def test_in_the_kernel_the_program_is_where_its_last_call_led() -> None:
    stacks = flame.fold([sample(False, 1 << 63, Branch(0x1100, 0x1200, False, 0))], VIEW)
    assert stacks == Counter({("prog", "[prog]", "[prog]", "[kernel]_[k]"): 1})


def test_the_folded_form() -> None:
    assert flame.text(Counter({("b", "c"): 2, ("a",): 1})) == "a 1\nb;c 2\n"


def test_the_picture_is_xml_whatever_a_guest_calls_its_functions() -> None:
    picture = ElementTree.fromstring(flame.svg(Counter({("prog", "<script>&\"'", "x"): 3, ("other",): 1}), "a < b"))
    titles = [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert "<script>&\"': 3 samples, 75.00 %" in titles


def test_nothing_makes_an_empty_picture() -> None:
    assert flame.svg(Counter(), "nothing").startswith("<svg")
