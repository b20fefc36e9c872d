"""Exits for port I/O: what the silicon tells of them, and KVM_EXIT_IO, where user space makes the accesses.

Answers to SDM vol. 3, table 28-5 and Linux 6.1 `Documentation/virt/kvm/api.rst`, section 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.uapi.kvm import KVM_EXIT_IO, Run
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

IO_IN, IO_STRING, IO_REP, IO_ADDRESS32, IO_ADDRESS64, IO_DOWN = 1, 2, 4, 8, 16, 32
"""`Exit.io_flags`."""
PIO_DATA_SIZE = 1024
"""Bytes of string I/O in one exit to user space."""
PIO_PAGE_OFFSET = PAGE_SIZE
"""Where the data is in the vCPU's mapping."""
_put_io = struct.Struct("<BBHIQ").pack_into
_IO_OFFSET = offset_of(Run, "io")


def port_exit(vcpu: Vcpu, direction: int, port: int, size: int, count: int, finish: Callable[[Vcpu], int]) -> int:
    """Leave KVM_RUN for `count` accesses of `size` bytes; `finish` completes the instruction when user space has made them."""
    _put_io(vcpu.mmap_area, _IO_OFFSET, direction, size, port, count, PIO_PAGE_OFFSET)
    return vcpu.exit_to_user(KVM_EXIT_IO, finish)


def address_mask(flags: int) -> int:
    """Of the address size of a string instruction, by `Exit.io_flags`."""
    if flags & IO_ADDRESS64:
        return (1 << 64) - 1
    return 0xFFFF_FFFF if flags & IO_ADDRESS32 else 0xFFFF
