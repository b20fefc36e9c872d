"""The dialects of shipping clients and of v12: the same VM, other numbers and layouts."""

from __future__ import annotations

import ctypes
import struct

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Dialect, Error, Event
from tests.helpers.long_guest import CODE, DATA, END
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import Tool

INT3, WRITE = b"\xcc", b"\x88\x03"
RESPONSE = kvmi.LIBKVMI.commands[Command.CONTROL_CMD_RESPONSE]


@pytest.fixture(params=[kvmi.LIBKVMI, kvmi.V12], ids=lambda dialect: dialect.name)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    chosen: Dialect = request.param
    return chosen


def test_versions(hooked: Hooked) -> None:
    libkvmi, v12 = hooked(dialect=kvmi.LIBKVMI), hooked(dialect=kvmi.V12)
    assert libkvmi.do(Command.GET_VERSION) == struct.pack("<IIBBBBB3x", 1, 0, 0, 0, 0, 0, 1)
    assert v12.do(Command.GET_VERSION) == struct.pack("<II", 1, kvmi.MAX_MESSAGE)


def test_numbers_of_other_dialects_are_unknown(hooked: Hooked) -> None:
    assert hooked(dialect=kvmi.V12).raw(31)[0] == Error.ENOSYS
    assert hooked(dialect=kvmi.V9).raw(27)[0] == Error.ENOSYS
    assert hooked(dialect=kvmi.LIBKVMI).raw(32)[0] == Error.ENOSYS


def test_page_events(hooked: Hooked, dialect: Dialect) -> None:
    tool = hooked(WRITE + END, dialect, rbx=DATA, rax=7)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    assert struct.unpack("<QQB7x", told.data) == (DATA, DATA, Access.W)
    assert (told.vcpu, told.u64(144)) == (0, CODE)
    tool.reply(told, extra=bytes(272) if dialect is kvmi.LIBKVMI else b"")
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 7


def test_control_registers(hooked: Hooked, dialect: Dialect) -> None:
    tool = hooked(b"\x0f\x20\xe0\x48\x0d\x00\x00\x10\x00\x0f\x22\xe0" + END, dialect)
    old = tool.guest.vcpu.get_sregs().cr4
    tool.enable(Event.CR)
    layout = dialect.messages[Command.VCPU_CONTROL_CR].request
    assert layout is not None
    tool.do(Command.VCPU_CONTROL_CR, bytes(layout(cr=4, enable=1)))
    tool.start()
    told = tool.event(Event.CR)
    assert struct.unpack("<HQQ", told.data[:2] + told.data[8:]) == (4, old, old | 1 << 20)
    tool.reply(told, extra=struct.pack("<Q", old))
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_sregs().cr4 == old


def test_pause(hooked: Hooked, dialect: Dialect) -> None:
    tool = hooked(END, dialect)
    layout = dialect.messages[Command.VCPU_PAUSE].request
    assert layout is not None
    tool.do(Command.VCPU_PAUSE, bytes(layout(wait=1)))
    tool.start()
    tool.reply(tool.event(Event.PAUSE_VCPU))
    assert tool.finish().event is None


def test_pages_of_v12_have_no_visibility(hooked: Hooked) -> None:
    tool = hooked(dialect=kvmi.V12)
    request = struct.pack("<HHI", 1, 0, 0)
    assert tool.command(Command.VM_SET_PAGE_ACCESS, request + struct.pack("<QB7x", 1 << 40, 7)) == (Error.EINVAL, b"")
    assert tool.command(Command.VM_SET_PAGE_ACCESS, request + struct.pack("<QBB6x", DATA, 7, 1)) == (Error.EINVAL, b"")


def test_views_are_not_offered(hooked: Hooked) -> None:
    tool = hooked(dialect=kvmi.LIBKVMI)
    entry = struct.pack("<QBBHI", DATA, 7, 1, 0, 0)
    assert tool.command(Command.VM_SET_PAGE_ACCESS, struct.pack("<HHI", 1, 1, 0) + entry) == (Error.EINVAL, b"")
    assert tool.command(Command.VM_SET_PAGE_ACCESS, struct.pack("<HHI", 0, 1, 0) + entry) == (0, b"")


def test_unhook_event_of_v12_is_its_number_alone(hooked: Hooked) -> None:
    tool = hooked(dialect=kvmi.V12)
    tool.do(Command.VM_CONTROL_EVENTS, struct.pack("<HBBI", 0, 1, 0, 0))
    tool.vm.introspection_preunhook_v12()
    assert tool.event(Event.UNHOOK).body == bytes(8)


# --- libkvmi's batches ---------------------------------------------------------------------------------------------------------------


def response(tool: Tool, enable: int, now: int) -> int:
    return tool.post(RESPONSE, struct.pack("<BBHI", enable, now, 0, 0))


def test_a_batch_is_answered_once(hooked: Hooked) -> None:
    """libkvmi's pause of all vCPUs: no answers, commands, answers again and one now."""
    tool = hooked(dialect=kvmi.LIBKVMI)
    response(tool, 0, 1)
    tool.post(kvmi.LIBKVMI.commands[Command.VCPU_PAUSE], bytes(16))
    last = response(tool, 1, 1)
    assert tool.answer(last) == (0, b"")
    tool.start()
    tool.reply(tool.event(Event.PAUSE_VCPU))
    assert tool.finish().event is None


def test_answers_from_the_next_command_on(hooked: Hooked) -> None:
    tool = hooked(dialect=kvmi.LIBKVMI)
    assert tool.answer(response(tool, 0, 0)) == (0, b"")
    response(tool, 1, 0)
    assert tool.command(Command.VM_GET_MAX_GFN)[0] == 0


@pytest.mark.parametrize("command", [Command.VM_GET_INFO, Command.VCPU_GET_REGISTERS])
def test_a_command_with_data_needs_its_answer(hooked: Hooked, command: Command) -> None:
    tool = hooked(dialect=kvmi.LIBKVMI)
    response(tool, 0, 1)
    tool.post(kvmi.LIBKVMI.commands[command], bytes(16))
    assert tool.closed


def test_a_batch_of_replies_and_commands(hooked: Hooked) -> None:
    """What libkvmi sends to answer an event: registers, then the reply, then answers on again, in one piece."""
    tool = hooked(INT3 + END, kvmi.LIBKVMI)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    regs = told.regs()
    regs.rip += 1
    header = struct.pack("<HHI", 0, 0, 0)
    parts = [
        (RESPONSE, struct.pack("<BBHI", 0, 1, 0, 0), 1),
        (kvmi.LIBKVMI.commands[Command.VCPU_SET_REGISTERS], header + bytes(regs), 2),
        (0, header + bytes(kvmi.EventReply(action=Action.RETRY)), told.seq),
        (RESPONSE, struct.pack("<BBHI", 1, 0, 0, 0), 3),
    ]
    tool.socket.sendall(b"".join(struct.pack("<HHI", number, len(body), seq) + body for number, body, seq in parts))
    assert tool.finish().event is None
    assert tool.command(Command.VM_GET_INFO)[0] == 0


def test_data_in_the_place_of_memory_are_refused(hooked: Hooked) -> None:
    tool = hooked(WRITE + END, kvmi.LIBKVMI, rbx=DATA)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    tool.reply(told, extra=bytes(kvmi.PfReplyLibkvmi(ctx_size=8)))
    assert tool.closed
    assert tool.finish().event is None
    assert ctypes.sizeof(kvmi.PfReplyLibkvmi) == 272
