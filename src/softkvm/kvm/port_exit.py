"""KVM_EXIT_IO: a port access that user space makes, told in `kvm_run` (Linux 6.1 `Documentation/virt/kvm/api.rst`, section 5)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.uapi.kvm import KVM_EXIT_IO, Run
from softkvm.uapi.layout import offset_of

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

PIO_PAGE_OFFSET = PAGE_SIZE
"""Where the data is in the vCPU's mapping."""
_put_io = struct.Struct("<BBHIQ").pack_into
_IO_OFFSET = offset_of(Run, "io")


def port_exit(vcpu: Vcpu, direction: int, port: int, size: int, count: int, finish: Callable[[Vcpu], int]) -> int:
    """Leave KVM_RUN for `count` accesses of `size` bytes; `finish` completes the instruction when user space has made them."""
    _put_io(vcpu.mmap_area, _IO_OFFSET, direction, size, port, count, PIO_PAGE_OFFSET)
    return vcpu.exit_to_user(KVM_EXIT_IO, finish)
