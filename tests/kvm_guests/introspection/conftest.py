"""Guests with a tool, on both vendors' silicon."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from softkvm import kvm
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Dialect
from tests.helpers.long_guest import END, Guest
from tests.kvm_guests.introspection.tool import Tool

Hooked = Callable[..., Tool]


@pytest.fixture(params=["cascadelake", "epyc"])
def model(request: pytest.FixtureRequest) -> kvm.Model:
    """Both vendors."""
    return kvm.Model(request.param)


@pytest.fixture
def hooked(model: kvm.Model) -> Iterator[Hooked]:
    """`hooked(code, dialect, hook, **registers)`: a guest that will run `code`, and its tool."""
    made: list[Tool] = []

    def make(code: bytes = END, dialect: Dialect = kvmi.V9, hook: bool = True, **registers: int) -> Tool:
        made.append(Tool(Guest(kvm.System(model), code, **registers), dialect, hook))
        return made[-1]

    yield make
    for tool in made:
        tool.guest.close()
        tool.close()


@pytest.fixture
def tool(hooked: Hooked) -> Tool:
    """A guest that ends at once, not started, and its tool."""
    return hooked()
