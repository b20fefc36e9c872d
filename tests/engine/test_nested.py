"""`_engine.NestedPageTable`: what it maps and what it refuses."""

from __future__ import annotations

import pytest

from softkvm import _engine
from softkvm.silicon.control import Intercept, Register
from tests.helpers.one_core import CODE, Machine


def test_lookup_tells_the_byte_and_its_rights() -> None:
    memory, npt = _engine.Memory(1 << 20), _engine.NestedPageTable()
    npt.map(0x10_0000, 0x8000, memory, 0x4000, 3)
    assert npt.lookup(0x10_1234) == (memory.address + 0x5234, 3)
    npt.protect(0x10_1000, 0x1000, 1)
    assert npt.lookup(0x10_1FFF) == (memory.address + 0x5FFF, 1)
    npt.unmap(0x10_1000, 0x1000)
    assert npt.lookup(0x10_1000) is None
    assert npt.lookup(0x10_2000) == (memory.address + 0x6000, 3)
    assert npt.lookup((1 << 64) - 1) is None


def test_the_table_keeps_its_memory_alive() -> None:
    npt = _engine.NestedPageTable()
    npt.map(0, 4096, _engine.Memory(4096), 0, 7)
    assert npt.lookup(0) is not None


@pytest.mark.parametrize(
    ("gpa", "size", "offset", "rights"),
    [
        (1, 4096, 0, 7),
        (0, 0, 0, 7),
        (0, 100, 0, 7),
        (0, 4096, 1, 7),
        (0, 8192, 0, 7),
        (0, 4096, 4096, 7),
        (1 << 46, 4096, 0, 7),
        (0, 4096, 0, 16),
    ],
)
def test_ranges_that_do_not_fit_are_refused(gpa: int, size: int, offset: int, rights: int) -> None:
    with pytest.raises(ValueError, match=r"multiples of 4096|leaves|not a sum"):
        _engine.NestedPageTable().map(gpa, size, _engine.Memory(4096), offset, rights)


def test_code_that_the_host_rewrites_is_dropped(machine: Machine) -> None:
    machine.view.control.intercepts = 1 << Intercept.CPUID
    mov_al_then_cpuid = bytes.fromhex("b0 01 0fa2")
    machine.load(mov_al_then_cpuid)
    machine.run()
    machine.ram[CODE + 1] = 2
    machine.view.state.rip = CODE
    machine.npt.wrote(CODE + 1, 1)
    machine.run()
    assert machine.view.state.gpr[Register.RAX] == 2


def test_writes_of_the_host_must_be_in_guest_physical_space() -> None:
    with pytest.raises(ValueError, match="leaves"):
        _engine.NestedPageTable().wrote(1 << 46, 1)
