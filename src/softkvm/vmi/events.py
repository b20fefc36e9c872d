"""What a guest did that a tool asked to be told, one class for each kind.

A vCPU that sent an event stands still until it is answered: `continue_()`, `retry()` or `crash()`, once. Which answers an event allows is
the protocol's matter (`softkvm.uapi.kvmi.EVENTS`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

from softkvm.uapi import kvmi
from softkvm.uapi.kvm import Regs, Sregs
from softkvm.uapi.kvmi import Access, Action, Descriptor, Event, EventArch, EventMsrs

Answer = Callable[["VcpuEvent", Action, bytes], None]


@dataclass(slots=True)
class Unhook:
    """The session is about to end; not answered."""


@dataclass(slots=True)
class VcpuEvent:
    """An event of a vCPU, with its registers at that moment."""

    kind: Event
    sequence: int
    vcpu: int
    arch: EventArch
    data: ctypes.Structure | None
    send: Answer = field(repr=False)
    answered: bool = field(default=False, init=False)

    @property
    def regs(self) -> Regs:
        """The general registers."""
        return self.arch.regs

    @property
    def sregs(self) -> Sregs:
        """Segment and control registers."""
        return self.arch.sregs

    @property
    def msrs(self) -> EventMsrs:
        """Some MSRs."""
        return self.arch.msrs

    @property
    def cr3(self) -> int:
        """The current address space."""
        return self.arch.sregs.cr3

    def continue_(self) -> None:
        """Let the guest do it."""
        self._answer(Action.CONTINUE)

    def crash(self) -> None:
        """End the guest."""
        self._answer(Action.CRASH)

    def _answer(self, action: Action, data: bytes = b"") -> None:
        if self.answered:
            raise RuntimeError("an event is answered once")
        if action not in kvmi.EVENTS[self.kind].actions:
            raise ValueError(f"a {self.kind.name} event cannot be answered with {action.name}")
        self.answered = True
        self.send(self, action, data)


class RetryableEvent(VcpuEvent):
    """An event at whose instruction the guest can be sent back."""

    def retry(self) -> None:
        """Enter the guest again where it is, or where its registers were set to."""
        self._answer(Action.RETRY)


class PauseEvent(VcpuEvent):
    """The vCPU stands still because the tool asked for it."""


class HypercallEvent(VcpuEvent):
    """The guest called the tool."""


class SinglestepEvent(VcpuEvent):
    """One instruction is over, or something came in between (`failed`)."""

    @property
    def failed(self) -> bool:
        """Whether no instruction was executed."""
        return bool(getattr(self.data, "failed", 0))


class _Addressed(RetryableEvent):
    @property
    def gpa(self) -> int:
        """The guest-physical address."""
        return int(getattr(self.data, "gpa", 0))


class BreakpointEvent(_Addressed):
    """The guest executed INT3; CONTINUE gives it its #BP."""

    @property
    def length(self) -> int:
        """Bytes of the instruction."""
        return int(getattr(self.data, "insn_len", 1))


class PageEvent(_Addressed):
    """The guest is about to access a page in a way that was taken from it; CONTINUE lets it, this once."""

    @property
    def gva(self) -> int | None:
        """The virtual address, if there is one."""
        address = int(getattr(self.data, "gva", kvmi.INVALID_GPA))
        return None if address == kvmi.INVALID_GPA else address

    @property
    def access(self) -> Access:
        """Reading, writing or executing."""
        return Access(getattr(self.data, "access", 0) & 7)


class HiddenBreakpointEvent(_Addressed):
    """The guest is about to execute the instruction at a breakpoint that it cannot see."""

    @property
    def gva(self) -> int:
        """The virtual address."""
        return int(getattr(self.data, "gva", 0))


class _NewValueEvent(VcpuEvent):
    @property
    def old(self) -> int:
        """The value until now."""
        return int(getattr(self.data, "old_value", 0))

    @property
    def new(self) -> int:
        """The value that the guest wants to write."""
        return int(getattr(self.data, "new_value", 0))


class _WriteEvent(_NewValueEvent):
    def continue_(self, value: int | None = None) -> None:
        """Let the guest write, its own value or this one; `old` makes the write have no effect."""
        written = self.new if value is None else value
        self._answer(Action.CONTINUE, bytes(kvmi.NewValueReply(new_val=written)))


class CrEvent(_WriteEvent):
    """The guest is about to change CR0, CR3 or CR4."""

    @property
    def number(self) -> int:
        """0, 3 or 4."""
        return int(getattr(self.data, "cr", 0))


class MsrEvent(_WriteEvent):
    """The guest is about to change an MSR."""

    @property
    def index(self) -> int:
        """Of the MSR."""
        return int(getattr(self.data, "msr", 0))


class XsetbvEvent(_NewValueEvent):
    """The guest has changed XCR0."""


class TrapEvent(VcpuEvent):
    """What was injected when the tool asked for an exception."""

    @property
    def vector(self) -> int:
        """Of the exception."""
        return int(getattr(self.data, "nr", 0))

    @property
    def error_code(self) -> int:
        """Zero for an exception without one."""
        return int(getattr(self.data, "error_code", 0))


class DescriptorEvent(RetryableEvent):
    """The guest is about to read or load GDTR, IDTR, LDTR or TR."""

    @property
    def register(self) -> Descriptor:
        """Which one."""
        return Descriptor(getattr(self.data, "descriptor", 1))

    @property
    def write(self) -> bool:
        """Whether it is loaded."""
        return bool(getattr(self.data, "write", 0))


CLASSES: dict[Event, type[VcpuEvent]] = {
    Event.PAUSE_VCPU: PauseEvent,
    Event.HYPERCALL: HypercallEvent,
    Event.BREAKPOINT: BreakpointEvent,
    Event.CR: CrEvent,
    Event.TRAP: TrapEvent,
    Event.XSETBV: XsetbvEvent,
    Event.DESCRIPTOR: DescriptorEvent,
    Event.MSR: MsrEvent,
    Event.PF: PageEvent,
    Event.SINGLESTEP: SinglestepEvent,
    Event.HIDDEN_BREAKPOINT: HiddenBreakpointEvent,
}
