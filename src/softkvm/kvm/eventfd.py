"""Eventfds at the edge of a VM: an irqfd turns a signal into an interrupt, an ioeventfd turns a guest's write into a signal.

Answers to Linux 6.1 `virt/kvm/eventfd.c` and `Documentation/virt/kvm/api.rst` (KVM_IRQFD, KVM_IOEVENTFD). One thread per VM waits for all
its irqfds; it starts with the first one. KVM keeps duplicates of the file descriptors that it is given, so the caller may close its own.
"""

from __future__ import annotations

import errno
import os
import select
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softkvm.host import entry
from softkvm.host.task import CONTEXT_IDLE, current
from softkvm.kvm.irqchip.routing import RESAMPLE_SOURCE, USERSPACE_SOURCE
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.iobus import IoBus
    from softkvm.kvm.types import Vm

_IRQFD_FLAGS = uapi.KVM_IRQFD_FLAG_DEASSIGN | uapi.KVM_IRQFD_FLAG_RESAMPLE
_IOEVENTFD_FLAGS = uapi.KVM_IOEVENTFD_FLAG_DATAMATCH | uapi.KVM_IOEVENTFD_FLAG_PIO | uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
_COUNTER_BYTES = 8


class EventFd:
    """A duplicate of a caller's eventfd."""

    def __init__(self, fd: int) -> None:
        """Take a reference; OSError: EBADF for a closed descriptor, EINVAL for one that is no eventfd."""
        self.identity = _eventfd_id(fd)
        """Equal for descriptors of the same eventfd."""
        self.fd = os.dup(fd)

    def signal(self) -> None:
        """Add 1 to the counter; one that is full already says all there is to say."""
        try:
            os.eventfd_write(self.fd, 1)
        except BlockingIOError:
            return

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


@dataclass(eq=False, slots=True)
class _Irqfd:
    """An irqfd; `resample` is signalled when the guest ends the interrupt."""

    event: EventFd
    gsi: int
    resample: EventFd | None


@dataclass(eq=False, slots=True)
class _Resampler:
    """The level-triggered irqfds of one GSI: they share a line, which the guest's end of interrupt lowers."""

    vm: Vm
    gsi: int
    irqfds: tuple[_Irqfd, ...] = ()

    def acked(self) -> None:
        """Lower the line, and let the devices say whether they still need it."""
        self.vm.routing.set_irq(RESAMPLE_SOURCE, self.gsi, False)
        for irqfd in self.irqfds:
            if irqfd.resample is not None:
                irqfd.resample.signal()


class _Ioeventfd:
    """An ioeventfd, as a device on a bus."""

    def __init__(self, request: uapi.Ioeventfd, event: EventFd) -> None:
        self.event = event
        self.address, self.length = request.addr, request.len
        self.pio = bool(request.flags & uapi.KVM_IOEVENTFD_FLAG_PIO)
        self.match = request.datamatch if request.flags & uapi.KVM_IOEVENTFD_FLAG_DATAMATCH else None

    def read(self, address: int, size: int) -> int | None:
        """Not taken."""
        return None

    def write(self, address: int, size: int, value: int) -> bool:
        """Signal, if address, length and value are those asked for."""
        if address != self.address or (self.length and (size != self.length or (self.match is not None and value != self.match))):
            return False
        self.event.signal()
        return True

    def collides(self, other: _Ioeventfd) -> bool:
        """Whether one write could be for both."""
        if self.pio != other.pio or self.address != other.address:
            return False
        if not self.length or not other.length:
            return True
        return self.length == other.length and (self.match is None or other.match is None or self.match == other.match)

    def same(self, other: _Ioeventfd) -> bool:
        """Whether KVM_IOEVENTFD_FLAG_DEASSIGN of one means the other."""
        mine = (self.event.identity, self.pio, self.address, self.length, self.match)
        return mine == (other.event.identity, other.pio, other.address, other.length, other.match)


class EventFds:
    """All irqfds and ioeventfds of a VM."""

    def __init__(self, vm: Vm) -> None:
        """None yet, and no thread."""
        self._vm = vm
        self._irqfds: dict[int, _Irqfd] = {}
        self._resamplers: dict[int, _Resampler] = {}
        self._ioeventfds: list[_Ioeventfd] = []
        self._epoll: select.epoll | None = None
        self._stop = -1
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Deassign everything and end the thread."""
        with self._vm.lock:
            thread, self._thread = self._thread, None
            for irqfd in list(self._irqfds.values()):
                self._remove_irqfd(irqfd)
            for device in list(self._ioeventfds):
                self._remove_ioeventfd(device)
        if thread is not None and self._epoll is not None:
            os.eventfd_write(self._stop, 1)
            thread.join()
            self._epoll.close()
            os.close(self._stop)

    # --- irqfd ------------------------------------------------------------------------------------------------------------------

    def irqfd(self, request: uapi.Irqfd) -> None:
        """KVM_IRQFD; OSError: EINVAL for flags, no irqchip, no eventfd; EBADF; EBUSY for an eventfd in use."""
        if request.flags & ~_IRQFD_FLAGS:
            raise OSError(errno.EINVAL, "bad irqfd")
        if request.flags & uapi.KVM_IRQFD_FLAG_DEASSIGN:
            self._deassign_irqfd(request)
        elif not self._vm.irqchip_in_kernel or (request.flags & uapi.KVM_IRQFD_FLAG_RESAMPLE and self._vm.irqchip is None):
            raise OSError(errno.EINVAL, "no interrupt chips in the kernel")
        else:
            self._assign_irqfd(request)

    def _assign_irqfd(self, request: uapi.Irqfd) -> None:
        event = EventFd(request.fd)
        resample = None
        try:
            if request.flags & uapi.KVM_IRQFD_FLAG_RESAMPLE:
                resample = EventFd(request.resamplefd)
            with self._vm.lock:
                if any(other.event.identity == event.identity for other in self._irqfds.values()):
                    raise OSError(errno.EBUSY, "the eventfd is an irqfd already")
                irqfd = _Irqfd(event, request.gsi, resample)
                if resample is not None:
                    self._add_to_resampler(irqfd)
                self._irqfds[event.fd] = irqfd
                self._started_epoll().register(event.fd, select.EPOLLIN)  # a counter that is not 0 fires at once
        except OSError:
            event.close()
            if resample is not None:
                resample.close()
            raise

    def _deassign_irqfd(self, request: uapi.Irqfd) -> None:
        identity = _eventfd_id(request.fd)
        with self._vm.lock:
            for irqfd in list(self._irqfds.values()):
                if irqfd.event.identity == identity and irqfd.gsi == request.gsi:
                    self._remove_irqfd(irqfd)

    def _add_to_resampler(self, irqfd: _Irqfd) -> None:
        resampler = self._resamplers.get(irqfd.gsi)
        if resampler is None:
            resampler = self._resamplers[irqfd.gsi] = _Resampler(self._vm, irqfd.gsi)
            self._vm.routing.add_ack_listener(irqfd.gsi, resampler.acked)
        resampler.irqfds += (irqfd,)

    def _remove_irqfd(self, irqfd: _Irqfd) -> None:
        del self._irqfds[irqfd.event.fd]
        if self._epoll is not None:
            self._epoll.unregister(irqfd.event.fd)
        irqfd.event.close()
        if irqfd.resample is None:
            return
        resampler = self._resamplers[irqfd.gsi]
        resampler.irqfds = tuple(other for other in resampler.irqfds if other is not irqfd)
        if not resampler.irqfds:
            del self._resamplers[irqfd.gsi]
            self._vm.routing.remove_ack_listener(irqfd.gsi, resampler.acked)
            self._vm.routing.set_irq(RESAMPLE_SOURCE, irqfd.gsi, False)
        irqfd.resample.close()

    def _started_epoll(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            self._stop = os.eventfd(0, os.EFD_CLOEXEC)
            self._epoll.register(self._stop, select.EPOLLIN)
            self._thread = threading.Thread(target=self._wait, args=(self._epoll,), name="kvm-irqfd", daemon=True)
            self._thread.start()
        return self._epoll

    def _wait(self, epoll: select.epoll) -> None:
        """A thread of the kernel: idle, and then interrupted."""
        task = current()
        task.context = CONTEXT_IDLE
        while True:
            for fd, _ in epoll.poll():
                if fd == self._stop:
                    return
                entry.interrupt(task, partial(self.poll_irqfd, fd))

    def poll_irqfd(self, fd: int) -> None:
        """Raise the interrupt of the irqfd whose duplicate is `fd`, if it has been signalled: by a pulse, or a line until it is ended."""
        with self._vm.lock:
            irqfd = self._irqfds.get(fd)
            if irqfd is None or not irqfd.event.consume():
                return
            routing = self._vm.routing
            if irqfd.resample is not None:
                routing.set_irq(RESAMPLE_SOURCE, irqfd.gsi, True)
            else:
                routing.set_irq(USERSPACE_SOURCE, irqfd.gsi, True)
                routing.set_irq(USERSPACE_SOURCE, irqfd.gsi, False)

    # --- ioeventfd --------------------------------------------------------------------------------------------------------------

    def ioeventfd(self, request: uapi.Ioeventfd) -> None:
        """KVM_IOEVENTFD; OSError: EINVAL for flags, length or address, EBADF, EEXIST for an overlap, ENOENT for an unknown one."""
        self._check_ioeventfd(request)
        device = _Ioeventfd(request, EventFd(request.fd))
        with self._vm.lock:
            if request.flags & uapi.KVM_IOEVENTFD_FLAG_DEASSIGN:
                device.event.close()
                found = next((other for other in self._ioeventfds if device.same(other)), None)
                if found is None:
                    raise OSError(errno.ENOENT, "no such ioeventfd")
                self._remove_ioeventfd(found)
                return
            try:
                if any(device.collides(other) for other in self._ioeventfds):
                    raise OSError(errno.EEXIST, "there is an ioeventfd for these writes")
                self._bus(device).register(device.address, max(device.length, 1), device)
            except OSError:
                device.event.close()
                raise
            self._ioeventfds.append(device)

    @staticmethod
    def _check_ioeventfd(request: uapi.Ioeventfd) -> None:
        if request.len not in (0, 1, 2, 4, 8) or request.addr + request.len >= 1 << 64:
            raise OSError(errno.EINVAL, "bad length or address")
        if request.flags & ~_IOEVENTFD_FLAGS or (not request.len and request.flags & uapi.KVM_IOEVENTFD_FLAG_DATAMATCH):
            raise OSError(errno.EINVAL, "bad flags")

    def _remove_ioeventfd(self, device: _Ioeventfd) -> None:
        self._ioeventfds.remove(device)
        self._bus(device).unregister(device)
        device.event.close()

    def _bus(self, device: _Ioeventfd) -> IoBus:
        return self._vm.pio_bus if device.pio else self._vm.mmio_bus
