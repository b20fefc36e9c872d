"""A tool in the process, without a socket: the same commands and events."""

from __future__ import annotations

import struct
import threading

import pytest

from softkvm import kvm
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Error, Event, Reply
from tests.helpers.long_guest import CODE, DATA, END, Guest

INT3, WRITE = b"\xcc", b"\x88\x03"


class Direct:
    """A guest with a handler."""

    def __init__(self, model: kvm.Model, code: bytes, **registers: int) -> None:
        self.guest = Guest(kvm.System(model), code, **registers)
        self.seen: list[kvm.DirectEvent] = []
        self.rips: list[int] = []
        self.answer: Reply | None = Reply(Action.CONTINUE)
        self.channel = self.guest.vm.introspect(self.handle)

    def handle(self, event: kvm.DirectEvent) -> Reply | None:
        self.seen.append(event)
        self.rips.append(event.rip)
        return self.answer

    def enable(self, event: Event) -> None:
        self.channel.request(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", event, 1, 0, 0), 0)


def test_commands_and_errors(model: kvm.Model) -> None:
    tool = Direct(model, END)
    assert tool.channel.request(Command.VM_GET_INFO) == struct.pack("<4I", 1, 0, 0, 0)
    with pytest.raises(OSError, match="EINVAL") as caught:
        tool.channel.request(Command.VCPU_GET_INFO, vcpu=9)
    assert caught.value.errno == Error.EINVAL
    with pytest.raises(OSError, match="introspected already"):
        tool.guest.vm.introspect(tool.handle)
    tool.guest.close()
    with pytest.raises(ConnectionResetError):
        tool.channel.request(Command.VM_GET_INFO)


def test_event_is_a_call(model: kvm.Model) -> None:
    tool = Direct(model, WRITE + END, rbx=DATA, rax=9)
    tool.enable(Event.PF)
    request = bytes(kvmi.SetPageAccess(count=1)) + bytes(kvmi.PageAccessEntry(gpa=DATA, access=Access.R, visible=1))
    tool.channel.request(Command.VM_SET_PAGE_ACCESS, request)
    assert tool.guest.run().event is None
    (event,) = tool.seen
    data = event.data
    assert isinstance(data, kvmi.EventPf)
    assert (event.event, event.vcpu, data.gpa, data.access) == (Event.PF, 0, DATA, Access.W)
    assert tool.rips == [CODE]
    assert tool.guest.ram[DATA] == 9
    tool.guest.close()


def test_commands_inside_of_an_event(model: kvm.Model) -> None:
    tool = Direct(model, INT3 + END)
    tool.enable(Event.BREAKPOINT)

    def step_over(event: kvm.DirectEvent) -> Reply:
        registers = kvmi.GetRegistersReply.from_buffer_copy(tool.channel.request(Command.VCPU_GET_REGISTERS, bytes(8), 0)).regs
        assert bytes(registers) == bytes(event.regs)
        registers.rip += 1
        tool.channel.request(Command.VCPU_SET_REGISTERS, bytes(registers), 0)
        return Reply(Action.RETRY)

    tool.channel.handler = step_over
    assert tool.guest.run().event is None
    tool.guest.close()


def test_answer_later(model: kvm.Model) -> None:
    """The handler gives no answer: the vCPU waits, and does commands of other threads."""
    tool = Direct(model, INT3 + END)
    tool.enable(Event.BREAKPOINT)
    arrived = threading.Event()

    def later(event: kvm.DirectEvent) -> None:
        tool.seen.append(event)
        arrived.set()

    tool.channel.handler = later
    outcome: list[object] = []
    runner = threading.Thread(target=lambda: outcome.append(tool.guest.run().event))
    runner.start()
    assert arrived.wait(60)
    event = tool.seen[0]
    registers = kvmi.GetRegistersReply.from_buffer_copy(tool.channel.request(Command.VCPU_GET_REGISTERS, bytes(8), 0)).regs
    assert registers.rip == CODE
    registers.rip += 1
    tool.channel.request(Command.VCPU_SET_REGISTERS, bytes(registers), 0)
    with pytest.raises(ValueError, match="waits"):
        tool.channel.reply(0, event.seq + 1)
    tool.channel.reply(0, event.seq, Action.RETRY)
    runner.join(60)
    assert outcome == [None]
    tool.guest.close()


def test_memory_without_a_copy(model: kvm.Model) -> None:
    tool = Direct(model, END)
    ((gpa, view),) = tool.channel.memory()
    tool.guest.ram[DATA] = 0x31
    assert (gpa, view[DATA], view.readonly) == (0, 0x31, True)
    tool.channel.detach()
    tool.guest.vm.introspect(tool.handle).detach()
    tool.guest.close()
