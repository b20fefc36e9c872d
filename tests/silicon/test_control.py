"""The control block's layout is the same in Python and in Rust."""

from __future__ import annotations

import ctypes

import pytest

from softkvm import _engine
from softkvm.silicon import control

STRUCTURES = [
    control.ControlBlock,
    control.Control,
    control.Access,
    control.Exit,
    control.Segment,
    control.DescriptorTable,
    control.Fpu,
    control.State,
    control.VirtualApic,
]


@pytest.mark.skipif(not hasattr(_engine, "control_layout"), reason="softkvm._engine is not built")
def test_every_field_is_where_the_engine_has_it() -> None:
    declared = {
        f"{structure.__name__}.{name}": (getattr(structure, name).offset, getattr(structure, name).size)
        for structure in STRUCTURES
        for name, *_ in structure._fields_
        if not name.startswith("_")
    }
    assert declared == _engine.control_layout()


def test_the_block_fits_its_memory() -> None:
    assert ctypes.sizeof(control.ControlBlock) <= control.CONTROL_BLOCK_SIZE
