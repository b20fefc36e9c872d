"""User memory by address: what is mapped may be touched, all else is EFAULT."""

from __future__ import annotations

import errno
import gc

import pytest

from softkvm import silicon
from softkvm.host import mm


def test_copies_both_ways_within_memory() -> None:
    memory = silicon.allocate(8192)
    mm.copy_to_user(memory.address + 4090, b"0123456789")
    assert mm.copy_from_user(memory.address + 4090, 10) == b"0123456789"
    assert mm.resolve(memory.address + 5, 1) == (memory, 5)


@pytest.mark.parametrize("offset", [-1, 4090])
def test_range_that_leaves_memory_is_efault(offset: int) -> None:
    memory = silicon.allocate(4096)
    with pytest.raises(OSError, match="no memory") as caught:
        mm.copy_from_user(memory.address + offset, 10)
    assert caught.value.errno == errno.EFAULT


def test_address_of_nothing_is_efault() -> None:
    with pytest.raises(OSError, match="no memory at user address 0x1000"):
        mm.copy_from_user(0x1000, 10)


def test_dead_memory_is_not_mapped() -> None:
    memory = silicon.allocate(4096)
    address = memory.address
    del memory
    gc.collect()
    assert mm.mapped(address) is None
