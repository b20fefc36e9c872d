"""Eventfds at the edge of a VM: an irqfd turns a signal into an interrupt, an ioeventfd turns a guest's write into a signal.

Answers to Linux 6.1 `virt/kvm/eventfd.c` and `Documentation/virt/kvm/api.rst` (KVM_IRQFD, KVM_IOEVENTFD). One thread per VM waits for all
its irqfds; it starts with the first one. KVM keeps duplicates of the file descriptors that it is given, so the caller may close its own.
"""

from __future__ import annotations

import errno
import os
import select
from pathlib import Path
from typing import TYPE_CHECKING

from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    pass

_IRQFD_FLAGS = uapi.KVM_IRQFD_FLAG_DEASSIGN | uapi.KVM_IRQFD_FLAG_RESAMPLE
_IOEVENTFD_FLAGS = uapi.KVM_IOEVENTFD_FLAG_DATAMATCH | uapi.KVM_IOEVENTFD_FLAG_PIO | uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
_COUNTER_BYTES = 8
_S32 = 1 << 31


class EventFd:
    """A duplicate of a caller's eventfd."""

    def __init__(self, fd: int) -> None:
        """Take a reference; OSError: EBADF for a closed descriptor, EINVAL for one that is no eventfd."""
        if fd & _S32:
            raise OSError(errno.EBADF, "bad file descriptor")
        self.identity = _eventfd_id(fd)
        """Equal for descriptors of the same eventfd."""
        self.fd = os.dup(fd)

    def signal(self) -> None:
        """Add 1 to the counter; a counter that is full says all there is to say."""
        try:
            os.writev(self.fd, [(1).to_bytes(_COUNTER_BYTES, "little")]) if self._has_room() else None
        except BlockingIOError:
            return

    def _has_room(self) -> bool:
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        return bool(poller.poll(0))

    def consume(self) -> bool:
        """Reset the counter; False if it was 0. Never blocks, whatever the flags of the caller's descriptor."""
        try:
            return os.preadv(self.fd, [bytearray(_COUNTER_BYTES)], -1, os.RWF_NOWAIT) == _COUNTER_BYTES
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Drop the reference."""
        os.close(self.fd)


def _eventfd_id(fd: int) -> int:
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except FileNotFoundError:
        raise OSError(errno.EBADF, "bad file descriptor") from None
    for line in info.splitlines():
        if line.startswith("eventfd-id:"):
            return int(line.split(":")[1])
    raise OSError(errno.EINVAL, "not an eventfd")
