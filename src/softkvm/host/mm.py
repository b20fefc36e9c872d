"""User memory as the kernel sees it: host-virtual addresses (HVA) looked up, and copied from and to with EFAULT.

Answers to Linux `copy_{from,to}_user()` and `hva_to_pfn()`: the address may be anything, only memory that is mapped may be touched.
"""

from __future__ import annotations

import errno

from softkvm.silicon import Memory
from softkvm.silicon import memory as ram


def resolve(hva: int, size: int) -> tuple[Memory, int]:
    """The RAM and the offset behind `size` bytes at `hva`; OSError(EFAULT) if the range is not mapped."""
    found = ram.find(hva, size)
    if found is None:
        raise OSError(errno.EFAULT, f"no memory at user address {hva:#x}")
    return found


def mapped(hva: int) -> tuple[Memory, int] | None:
    """The RAM and the offset behind the byte at `hva`, None if nothing is mapped there."""
    return ram.find(hva, 1)


def copy_from_user(hva: int, size: int) -> bytes:
    """Read `size` bytes; OSError(EFAULT)."""
    memory, offset = resolve(hva, size)
    with memoryview(memory) as view:
        return bytes(view[offset : offset + size])


def view(hva: int, size: int) -> memoryview:
    """`size` bytes of user memory in place; OSError(EFAULT)."""
    memory, offset = resolve(hva, size)
    return memoryview(memory)[offset : offset + size]


def copy_to_user(hva: int, data: bytes) -> None:
    """Write bytes; OSError(EFAULT)."""
    memory, offset = resolve(hva, len(data))
    with memoryview(memory) as view:
        view[offset : offset + len(data)] = data
