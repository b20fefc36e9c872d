"""Introspection as the VMM sees it: whose tool is hooked to the VM, and when it must go.

Answers to QEMU's `accel/kvm/vmi.c` of the KVM-VMI tree (the object "introspection"): hook with every permission, un-hook at reset,
shutdown and snapshot, the latter after the tool was told and had time to clean up in the guest. `introspection_peer.py` connects to a tool
that listens.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from softkvm.uapi import kvmi
from softkvm.vmm.errors import ConfigError

if TYPE_CHECKING:
    from softkvm import kvm

UNHOOK_TIMEOUT = 60.0
"""Seconds that a tool has to clean up before a snapshot (QEMU's `unhook_timeout`)."""
_LEAVE_TIMEOUT, _LEAVE_STEPS = 2.0, 200
AUTO = "auto"
DIALECTS = (AUTO, *kvmi.DIALECTS)

Hooked = TypeVar("Hooked")
_log = logging.getLogger(__name__)


def check_dialect(name: str) -> str:
    """`name` if it is a dialect; ConfigError, which lists them."""
    if name not in DIALECTS:
        raise ConfigError(f"{name!r} is no dialect of KVMI; there are {', '.join(DIALECTS)}")
    return name


def recognise(peer: socket.socket) -> str:
    """The dialect of a tool, by its first message, which stays in the socket: GET_VERSION is 1 in v9 and 2 in libkvmi.

    v12 has 2 as well and must be chosen. Whatever else comes first is answered in v9. Waits for the message.
    """
    head = peer.recv(8, socket.MSG_PEEK | socket.MSG_WAITALL)
    number, size = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    return kvmi.LIBKVMI.name if (number, size) == (2, 0) else kvmi.V9.name


class Introspection:
    """The tool of one machine, or none. For any thread."""

    def __init__(self, vm: kvm.Vm) -> None:
        """Nobody is hooked."""
        self._vm = vm
        self._lock = threading.RLock()
        self._watched: socket.socket | None = None
        self._direct = self._suspended = False
        self.reply_timeout: float | None = None
        """Seconds that a tool may keep a vCPU waiting for an answer; KVM's own limit if None."""

    def hook(self, peer: socket.socket, dialect: str = kvmi.V9.name) -> None:
        """Give the VM to the tool behind `peer`, of which a copy is kept, to see it leave; OSError as the ioctl, EAGAIN in a snapshot."""
        with self._lock:
            if self._suspended:
                raise BlockingIOError("the machine is being saved")
            self._forget_who_left()
            number = getattr(self._vm, "introspection_hook" + ("" if dialect == kvmi.V9.name else f"_{dialect}"))
            self._wait_for_room(lambda: number(kvmi.Hook(fd=peer.fileno()), allow_all=True))
            if self.reply_timeout is not None:
                self._vm.set_introspection_timeout(self.reply_timeout)
            self._watched = socket.socket(fileno=os.dup(peer.fileno()))  # peer.dup() would carry its time-out to KVM's end

    def _forget_who_left(self) -> None:
        """A tool that has gone leaves its place to the next one."""
        if self._watched is not None and _has_left(self._watched, 0):
            self.end()

    def _wait_for_room(self, hook: Callable[[], Hooked]) -> Hooked:
        """Hook; while nobody is hooked, EEXIST only means that some vCPU has not yet noticed that the last tool has left."""
        for _ in range(_LEAVE_STEPS):
            try:
                return hook()
            except FileExistsError:
                if self._watched is not None or self._direct:
                    raise
            time.sleep(_LEAVE_TIMEOUT / _LEAVE_STEPS)
        return hook()

    def hook_directly(self, handler: kvm.IntrospectionHandler) -> kvm.DirectChannel:
        """Give the VM to a tool of this process that needs no socket; OSError(EEXIST) if there is a tool."""
        with self._lock:
            if self._suspended:
                raise BlockingIOError("the machine is being saved")
            self._forget_who_left()
            channel = self._wait_for_room(lambda: self._vm.introspect(handler))
            self._direct = True
            return channel

    def connect(self) -> socket.socket:
        """Hook a tool of this process: its end of a socket pair."""
        mine, theirs = socket.socketpair()
        try:
            with theirs:
                self.hook(theirs)
        except BaseException:
            mine.close()
            raise
        return mine

    def wait_for_end(self) -> None:
        """Return when the tool that is hooked has left, or was un-hooked, and its place is free."""
        watched = self._watched
        if watched is not None and _has_left(watched, None):
            with self._lock:
                if self._watched is watched:
                    self.end()

    @property
    def holds_a_vcpu(self) -> bool:
        """Whether a vCPU waits for the tool."""
        return self._vm.waits_for_tool()

    def end(self) -> None:
        """Un-hook at once; nothing happens if nobody is hooked."""
        with self._lock:
            watched, self._watched = self._watched, None
            direct, self._direct = self._direct, False
            if watched is not None or direct:
                self._vm.introspection_unhook()
            if watched is not None:
                watched.close()

    @contextmanager
    def suspended(self, timeout: float = UNHOOK_TIMEOUT) -> Iterator[None]:
        """No tool in the block: one that is hooked is told to clean up and leave, and un-hooked when it has, or in `timeout` seconds."""
        with self._lock:
            self._suspended = True
            watched = self._watched
        try:
            if watched is not None:
                self._ask_to_leave(watched, timeout)
            self.end()
            yield
        finally:
            self._suspended = False

    def _ask_to_leave(self, watched: socket.socket, timeout: float) -> None:
        try:
            self._vm.introspection_preunhook()
        except OSError:
            return  # it does not want to know
        if not _has_left(watched, timeout):
            _log.warning("the introspection tool did not leave within %g seconds", timeout)


def _has_left(peer: socket.socket, timeout: float | None) -> bool:
    """Whether the other end of a socket is gone, after at most `timeout` seconds."""
    poll = select.poll()
    poll.register(peer, select.POLLRDHUP)
    return bool(poll.poll(None if timeout is None else int(timeout * 1000)))
