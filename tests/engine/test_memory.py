"""`_engine.Memory` and `_engine.ControlBlock`: buffers, life time, refusals."""

from __future__ import annotations

import ctypes
import gc
import mmap
import weakref

import pytest

from softkvm import _engine
from softkvm.silicon.control import CONTROL_BLOCK_SIZE


def test_the_buffer_is_the_memory() -> None:
    memory = _engine.Memory(8192)
    view = memoryview(memory)
    assert (view.format, view.nbytes, view.readonly, view.contiguous) == ("B", 8192, False, True)
    view[4097] = 0x5A
    assert memory.size == 8192
    assert memory.address % 4096 == 0
    assert ctypes.c_uint8.from_address(memory.address + 4097).value == 0x5A
    assert memory.resident() >= 4096


def test_other_mappings_of_the_descriptor_see_the_same_bytes() -> None:
    memory = _engine.Memory(4096)
    with mmap.mmap(memory.fd, 4096) as other:
        other[7] = 7
        assert memoryview(memory)[7] == 7


def test_a_view_keeps_the_memory_alive() -> None:
    memory = _engine.Memory(4096)
    alive = weakref.ref(memory)
    view = memoryview(memory)
    del memory
    gc.collect()
    assert alive() is not None
    view[0] = 1
    view.release()
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("size", [0, -4096, 1, 4097])
def test_sizes_that_are_not_pages_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        _engine.Memory(size)


def test_more_memory_than_there_is_is_an_os_error() -> None:
    with pytest.raises(OSError, match="Cannot allocate memory"):
        _engine.Memory(1 << 60)


def test_the_control_block_is_zeroed_and_page_aligned() -> None:
    block = _engine.ControlBlock()
    view = memoryview(block)
    assert view.nbytes == CONTROL_BLOCK_SIZE
    assert not any(view)
    assert ctypes.addressof(ctypes.c_uint8.from_buffer(block)) % 4096 == 0
