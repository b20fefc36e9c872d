"""The tool inside the process: events are calls of a function on the vCPU's thread, commands are calls of a method.

No socket, and no bytes that nobody looks at; permissions, checks, filters and waits are those of the wire protocol.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from ctypes import Structure
from typing import TYPE_CHECKING

from softkvm.host import mm
from softkvm.host.task import current
from softkvm.kvm import regs
from softkvm.kvm.introspection import arch
from softkvm.kvm.introspection.dispatch import Work, prepare
from softkvm.kvm.introspection.failures import Broken, Refused
from softkvm.kvm.introspection.vm_commands import Data
from softkvm.uapi import kvm as uapi
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Command, Event, Reply

if TYPE_CHECKING:
    from softkvm.kvm.introspection.session import Session
    from softkvm.kvm.introspection.vcpu import VcpuIntrospection


class DirectEvent:
    """An event, as long as it is not answered; its parts are read when they are asked for (`kvmi_channel.Event`)."""

    __slots__ = ("_introspection", "data", "event", "seq")

    def __init__(self, introspection: VcpuIntrospection, event: Event, seq: int, data: Structure | None) -> None:
        """Made by the channel."""
        self._introspection = introspection
        self.event = event
        self.seq = seq
        self.data = data

    @property
    def vcpu(self) -> int:
        """Index of the vCPU."""
        return self._introspection.index

    @property
    def rip(self) -> int:
        """RIP alone, for those who need no more."""
        return int(self._introspection.vcpu.state.rip)

    @property
    def cr3(self) -> int:
        """CR3 alone."""
        return int(self._introspection.vcpu.state.cr3)

    @property
    def regs(self) -> uapi.Regs:
        """The general registers."""
        return regs.get_regs(self._introspection.vcpu)

    def arch(self) -> bytes:
        """`kvmi.EventArch`, all registers as bytes."""
        return arch.event(self._introspection.vcpu)

    def set_regs(self, new: uapi.Regs) -> None:
        """VCPU_SET_REGISTERS: for when the event is answered."""
        self._introspection.registers = uapi.Regs.from_buffer_copy(new)


Handler = Callable[[DirectEvent], Reply | None]
"""Answers an event, on the vCPU's thread; None answers later, by `DirectChannel.reply()`, and the vCPU serves commands meanwhile."""


class DirectChannel:
    """The connection of one session to a tool in this process."""

    def __init__(self, session: Session, handler: Handler) -> None:
        """`handler` gets every event."""
        self._session = session
        self.handler = handler
        self.closed = False
        self.dialect = session.dialect

    # --- KVM's side -----------------------------------------------------------------------------------------------------------------

    def deliver(self, vcpu: VcpuIntrospection, event: Event, seq: int, data: Structure | None) -> Reply | None:
        """Call the handler."""
        return self.handler(DirectEvent(vcpu, event, seq, data))

    def wait(self, vcpu: VcpuIntrospection, deadline: float | None) -> None:
        """For `reply()`, or a command of another thread."""
        vcpu.wait_for_job(deadline)

    def notify(self, event: Event, seq: int) -> None:
        """UNHOOK: the handler is called without a vCPU to answer for."""
        self.on_unhook()

    def on_unhook(self) -> None:
        """For the tool to replace: KVM is about to un-hook."""

    def close(self) -> None:
        """No event comes any more."""
        self.closed = True

    # --- The tool's side ------------------------------------------------------------------------------------------------------------

    def request(self, command: Command, body: bytes = b"", vcpu: int | None = None) -> bytes:
        """Do a command; returns the data behind the error code, OSError with the wire's error number.

        `body` is the request with what trails it, without header and vCPU header. A command to a vCPU that runs waits for its next exit.
        """
        if self.closed:
            raise ConnectionResetError("introspection has ended")
        if command in self._session.dialect.vcpu_commands:
            body = bytes(kvmi.VcpuHeader(vcpu=vcpu or 0)) + body
        try:
            target, work = prepare(self._session, command, body)
            result = work() if target is None or self._is_mine(target) else self._have_done(target, work)
        except Refused as refusal:
            raise OSError(int(refusal.error), f"{command.name}: {refusal.error.name}") from None
        except Broken as broken:
            raise ValueError(str(broken)) from None
        if isinstance(result, Data):
            for fd in result.fds:
                os.close(fd)
            return result.body
        return result

    def _is_mine(self, target: VcpuIntrospection) -> bool:
        """Whether the caller is the vCPU's own thread, in a handler."""
        return target.vcpu.task is current()

    def _have_done(self, target: VcpuIntrospection, work: Work) -> bytes | Data:
        done = threading.Event()
        outcome: list[bytes | Data | Refused | Broken] = []

        def job() -> None:
            try:
                outcome.append(work())
            except (Refused, Broken) as error:
                outcome.append(error)
            done.set()

        target.post(job)
        done.wait()
        result = outcome[0]
        if isinstance(result, Refused | Broken):
            raise result
        return result

    def reply(self, vcpu: int, seq: int, action: Action = Action.CONTINUE, new_value: int = 0) -> None:
        """Answer an event that the handler has not answered; ValueError if nobody waits for it."""
        target = self._session.vcpus[vcpu]
        event = target.waiting
        if event is None or target.awaited != seq:
            raise ValueError(f"nobody waits for event {seq}")
        if action not in kvmi.EVENTS[event].actions:
            raise ValueError(f"{action.name} is no answer to {event.name}")
        target.post(lambda: target.take(seq, Reply(action, new_value)))

    def memory(self) -> list[tuple[int, memoryview]]:
        """Guest memory without a copy: guest-physical address and read-only bytes of each slot."""
        ranges = []
        for slot in self._session.vm.mmu.slots:
            found = mm.mapped(slot.hva)
            if found is not None:
                memory, offset = found
                ranges.append((slot.gpa, memoryview(memory).cast("B").toreadonly()[offset : offset + slot.size]))
        return ranges

    def detach(self) -> None:
        """The tool leaves; the guest runs on as if it had not been there."""
        self._session.vm.introspection_leave(self._session)
