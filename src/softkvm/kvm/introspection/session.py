"""One introspected VM: what its tool may do and be told, and the life of the connection.

Answers to `virt/kvm/introspection/kvmi.c` of "VM introspection" v9, patches 38-45, 61 and 63: hook, permissions, un-hook, loss of the
channel. A tool that goes away, however it does, leaves a VM that runs as if it had never been there.
"""

from __future__ import annotations

import logging
import threading
from ctypes import Structure
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

from softkvm.kvm.introspection import intercepts
from softkvm.kvm.introspection.failures import Broken
from softkvm.kvm.introspection.filters import Filters
from softkvm.kvm.introspection.page_access import PageAccess
from softkvm.kvm.introspection.vcpu import VcpuIntrospection
from softkvm.kvm.page_track import ALL
from softkvm.uapi.kvmi import ALWAYS_ALLOWED, Command, Dialect, Event, Reply

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vm import Vm

REPLY_TIMEOUT = 60.0
"""Seconds that a tool has for the answer to an event, unless the VMM sets other ones; a paused vCPU waits without limit."""

_log = logging.getLogger(__name__)


class Channel(Protocol):
    """The way to the tool."""

    def deliver(self, vcpu: VcpuIntrospection, event: Event, seq: int, data: Structure | None) -> Reply | None:
        """Tell the tool of an event; its answer if it comes at once. Broken if the tool cannot be told."""

    def wait(self, vcpu: VcpuIntrospection, deadline: float | None) -> None:
        """On the vCPU's thread: wait for something for it, an answer or a job. Broken behind the deadline (`time.monotonic()`)."""

    def notify(self, event: Event, seq: int) -> None:
        """Tell the tool of an event that has no vCPU and no answer; Broken."""

    def close(self) -> None:
        """End the connection; for any thread."""


class Session:
    """Between hook and un-hook. `lock` guards the lists of permissions, pauses and the channel."""

    def __init__(self, vm: Vm, dialect: Dialect) -> None:
        """Every query and nothing else is allowed; there is no channel yet."""
        self.vm = vm
        self.dialect = dialect
        self.lock = threading.Lock()
        self.channel: Channel | None = None
        self.allowed_commands = ALWAYS_ALLOWED
        self.allowed_events: frozenset[Event] = frozenset()
        self.vm_events: frozenset[Event] = frozenset()
        self.reply_timeout = REPLY_TIMEOUT
        self.filters = Filters()
        self.breakpoints: frozenset[int] = frozenset()
        self.page_access = PageAccess(self)
        self.vcpus = [VcpuIntrospection(self, vcpu, index) for index, vcpu in enumerate(vm.vcpus)]
        self._seq = count(1)

    def open(self, channel: Channel) -> None:
        """The tool is there."""
        self.channel = channel
        self.vm.mmu.track.node = self.page_access
        for vcpu in self.vcpus:
            vcpu.vcpu.set_introspection(vcpu)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """A vCPU was made after the hook."""
        new = VcpuIntrospection(self, vcpu, len(self.vcpus))
        self.vcpus = [*self.vcpus, new]
        vcpu.set_introspection(new)

    def next_seq(self) -> int:
        """Number of the next event, of any vCPU."""
        return next(self._seq) & 0xFFFF_FFFF

    # --- Permissions ----------------------------------------------------------------------------------------------------------------

    def allow_commands(self, commands: frozenset[Command], allow: bool) -> None:
        """Allow or disallow commands; the queries stay allowed."""
        self.allowed_commands = self.allowed_commands | commands if allow else self.allowed_commands - commands | ALWAYS_ALLOWED

    def allow_events(self, events: frozenset[Event], allow: bool) -> None:
        """Allow or disallow events to be enabled; those that are stay so."""
        self.allowed_events = self.allowed_events | events if allow else self.allowed_events - events

    def set_breakpoints(self, breakpoints: frozenset[int]) -> None:
        """Hidden breakpoints, by guest-physical address; every vCPU obeys when the call returns."""
        self.vm.mmu.npt.set_breakpoints(list(breakpoints - self.breakpoints), list(self.breakpoints - breakpoints))
        self.breakpoints = breakpoints

    # --- The end --------------------------------------------------------------------------------------------------------------------

    def announce_end(self) -> bool:
        """Send the UNHOOK event: the tool is to clean up and leave; False if it does not want to know, or cannot be told."""
        channel = self.channel
        if channel is None or Event.UNHOOK not in self.vm_events:
            return False
        try:
            channel.notify(Event.UNHOOK, self.next_seq())
        except Broken as error:
            self.lose(channel, str(error))
            return False
        return True

    def lose(self, channel: Channel, reason: str = "") -> None:
        """The channel is gone, or no longer to be trusted: nobody waits for it any more."""
        with self.lock:
            if self.channel is not channel:
                return
            self.channel = None
        if reason:
            _log.warning("introspection ends: %s", reason)
        channel.close()
        for vcpu in self.vcpus:
            vcpu.release()

    def end(self) -> None:
        """Un-hook: the guest gets back every right, and KVM no longer looks at what it looked at for the tool.

        v9 leaves interceptions in place unless the tool asked for the clean-up. Nobody would handle them, and KVM would hand the guest's
        breakpoints to user space: they go in any case.
        """
        if (channel := self.channel) is not None:
            self.lose(channel)
        mmu = self.vm.mmu
        mmu.restrict(dict.fromkeys(mmu.track.pages, ALL))
        mmu.pass_same_stores(False)
        mmu.track.node = None
        self.set_breakpoints(frozenset())
        for vcpu in self.vcpus:
            vcpu.must_do(partial(intercepts.restore, vcpu))
