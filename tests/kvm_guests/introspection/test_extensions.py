"""softkvm's own messages: hidden breakpoints, filters, many pages at once, the memory map."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Error, Event, FilterField
from tests.helpers.long_guest import CODE, DATA, END, HANDLERS, PML4, RAM_SIZE
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import Told, Tool

INC, NOP = b"\x48\xff\xc0", b"\x90"
ALL = (1 << 64) - 1


def breakpoints(tool: Tool, *gpas: int, enable: int = 1) -> tuple[int, bytes]:
    entries = b"".join(struct.pack("<QB7x", gpa, enable) for gpa in gpas)
    return tool.command(Command.VM_SET_BREAKPOINTS, struct.pack("<HHI", len(gpas), 0, 0) + entries)


def set_filter(
    tool: Tool, event: Event, field: FilterField, *ranges: tuple[int, int], invert: int = 0, mask: int = ALL
) -> tuple[int, bytes]:
    head = struct.pack("<HBBHHQ", tool.dialect.events[event], field, invert, len(ranges), 0, mask)
    return tool.command(Command.VM_SET_EVENT_FILTER, head + b"".join(struct.pack("<QQ", *each) for each in ranges))


def place(told: Told) -> tuple[int, int]:
    gva, gpa = struct.unpack("<QQ", told.data)
    return gva, gpa


def test_breakpoints_stop_before_their_instruction_each_time(hooked: Hooked) -> None:
    tool = hooked(b"\x48\xff\xc0\x48\xff\xc9\x75\xf8" + END, rax=0, rcx=3)  # 1: inc rax; dec rcx; jnz 1b
    tool.enable(Event.HIDDEN_BREAKPOINT)
    assert breakpoints(tool, CODE, CODE + 3) == (0, b"")
    tool.start()
    for turn in range(3):
        for offset in (0, 3):
            told = tool.event(Event.HIDDEN_BREAKPOINT)
            assert place(told) == (CODE + offset, CODE + offset)
            assert (told.regs().rip, told.regs().rax) == (CODE + offset, turn + offset // 3)
            tool.reply(told)
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_regs().rax & 0xFF == 3
    assert bytes(tool.guest.ram[CODE : CODE + 3]) == INC, "nothing is in guest memory"


def test_breakpoints_set_and_removed_while_the_guest_runs(hooked: Hooked) -> None:
    tool = hooked(b"\x48\xff\xc0\xeb\xfb")  # 1: inc rax; jmp 1b
    tool.enable(Event.HIDDEN_BREAKPOINT)
    tool.start()
    tool.do(Command.VCPU_GET_REGISTERS, bytes(8))
    breakpoints(tool, CODE + 3)
    told = tool.event(Event.HIDDEN_BREAKPOINT)
    breakpoints(tool, CODE + 3, enable=0)
    tool.reply(told)
    first, second = (kvmi.GetRegistersReply.from_buffer_copy(tool.do(Command.VCPU_GET_REGISTERS, bytes(8))).regs.rax for _ in range(2))
    assert second >= first >= told.regs().rax
    tool.do(Command.VCPU_PAUSE, bytes(8))
    told = tool.event(Event.PAUSE_VCPU)
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", CODE, len(END), 0, 0) + END)
    tool.set_regs(told, rip=CODE)
    tool.reply(told)
    assert tool.finish().event is None


def test_instructions_that_exit_have_breakpoints_too(hooked: Hooked) -> None:
    tool = hooked(b"\x0f\xa2\x0f\x0b", rax=0)  # cpuid; ud2
    tool.enable(Event.HIDDEN_BREAKPOINT)
    breakpoints(tool, CODE, CODE + 2, HANDLERS + 6 * 16)
    tool.start()
    for address in (CODE, CODE + 2, HANDLERS + 6 * 16):
        told = tool.event(Event.HIDDEN_BREAKPOINT)
        assert place(told) == (address, address)
        tool.reply(told)
    event = tool.finish().event
    assert event is not None
    assert (event.vector, event.rip) == (6, CODE + 2)


def test_retry_stops_again_and_elsewhere_goes_on(hooked: Hooked) -> None:
    tool = hooked(INC + END, rax=0)
    tool.enable(Event.HIDDEN_BREAKPOINT)
    breakpoints(tool, CODE)
    tool.start()
    tool.reply(tool.event(Event.HIDDEN_BREAKPOINT), Action.RETRY)
    told = tool.event(Event.HIDDEN_BREAKPOINT)
    tool.set_regs(told, rip=CODE + 3, rax=7)
    tool.reply(told)
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_regs().rax & 0xFF == 7


def test_breakpoints_and_single_steps(hooked: Hooked) -> None:
    tool = hooked(NOP * 3 + END)
    tool.enable(Event.HIDDEN_BREAKPOINT)
    breakpoints(tool, CODE + 1)
    tool.do(Command.VCPU_CONTROL_SINGLESTEP, b"\1" + bytes(7))
    tool.start()
    seen = []
    for event in (Event.SINGLESTEP, Event.SINGLESTEP, Event.HIDDEN_BREAKPOINT, Event.SINGLESTEP):
        told = tool.event(event)
        seen.append((told.regs().rip - CODE, told.data[0] if event is Event.SINGLESTEP else None))
        if len(seen) == 4:
            tool.do(Command.VCPU_CONTROL_SINGLESTEP, bytes(8))
        tool.reply(told)
    assert tool.finish().event is None
    assert seen == [(1, 0), (1, 1), (1, None), (2, 0)]


def test_breakpoints_without_the_event_are_passed(hooked: Hooked) -> None:
    tool = hooked(INC + END, rax=0)
    breakpoints(tool, CODE)
    tool.start()
    assert tool.finish().event is None


def test_breakpoint_errors(tool: Tool) -> None:
    assert breakpoints(tool, RAM_SIZE, CODE) == (Error.EINVAL, b"")
    assert tool.vm.introspection is not None
    assert tool.vm.introspection.breakpoints == {CODE}
    assert breakpoints(tool, CODE, enable=2) == (Error.EINVAL, b"")
    assert tool.command(Command.VM_SET_BREAKPOINTS, struct.pack("<HHI", 1, 0, 0)) == (Error.EINVAL, b"")
    for start in range(0, kvmi.MAX_BREAKPOINTS - 511, 511):
        assert breakpoints(tool, *range(DATA + start, DATA + start + 511)) == (0, b"")
    assert breakpoints(tool, *range(DATA + 0x2000, DATA + 0x2000 + 511)) == (Error.E2BIG, b"")


@pytest.mark.parametrize(
    ("field", "wanted", "invert", "sent"),
    [
        (FilterField.GPA, (DATA, DATA + 7), 0, True),
        (FilterField.GPA, (DATA + 8, ALL), 0, False),
        (FilterField.GPA, (DATA, DATA + 7), 1, False),
        (FilterField.GVA, (DATA, DATA), 0, True),
        (FilterField.RIP, (CODE, CODE), 0, True),
        (FilterField.RIP, (CODE + 1, ALL), 0, False),
        (FilterField.CR3, (PML4, PML4), 0, True),
        (FilterField.RAX, (5, 5), 0, False),
    ],
)
def test_filters_of_page_events(hooked: Hooked, field: FilterField, wanted: tuple[int, int], invert: int, sent: bool) -> None:
    tool = hooked(b"\x88\x03" + END, rbx=DATA, rax=6)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    assert set_filter(tool, Event.PF, field, wanted, invert=invert) == (0, b"")
    tool.start()
    if sent:
        tool.reply(tool.event(Event.PF))
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 6


@pytest.mark.parametrize("first", ["filter", "page"])
def test_stores_that_change_nothing_are_no_events_for_who_does_not_care(hooked: Hooked, first: str) -> None:
    tool = hooked(b"\x88\x03\x88\x03\xff\xc0\x88\x03\x00\x03" + END, rbx=DATA, rax=6)  # mov [rbx], al; twice; inc eax; mov; add [rbx], al
    tool.enable(Event.PF)
    if first == "page":
        tool.set_access(DATA, Access.R)
    assert set_filter(tool, Event.PF, FilterField.CHANGE, (1, 1)) == (0, b"")
    tool.set_access(DATA, Access.R)
    tool.start()
    for offset in (0, 6, 8):  # not the second store of 6
        told = tool.event(Event.PF)
        assert told.regs().rip == CODE + offset
        tool.reply(told)
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 14


def test_whoever_cares_again_gets_stores_that_change_nothing(hooked: Hooked) -> None:
    tool = hooked(b"\x88\x03" + END, rbx=DATA, rax=0)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    set_filter(tool, Event.PF, FilterField.CHANGE, (1, 1))
    set_filter(tool, Event.PF, FilterField.CHANGE)
    tool.start()
    tool.reply(tool.event(Event.PF))
    assert tool.finish().event is None


def test_filter_of_a_cr3_value_ignores_masked_bits(hooked: Hooked) -> None:
    copy = 0x7_0000
    tool = hooked(b"\x0f\x22\xd8\x0f\x22\xd9" + END, rax=copy, rcx=PML4)  # mov cr3, rax; mov cr3, rcx
    tool.guest.ram[copy : copy + 4096] = tool.guest.ram[PML4 : PML4 + 4096]
    tool.enable(Event.CR)
    tool.do(Command.VCPU_CONTROL_CR, struct.pack("<BBHI", 3, 1, 0, 0))
    set_filter(tool, Event.CR, FilterField.VALUE, (PML4 >> 12, PML4 >> 12), mask=0)
    set_filter(tool, Event.CR, FilterField.VALUE, (copy, copy), mask=~0x1FFF & ALL)
    tool.start()
    told = tool.event(Event.CR)
    assert told.data[16:] == struct.pack("<Q", copy)
    tool.reply(told, extra=told.data[16:])
    assert tool.finish().event is None


def test_filter_errors(tool: Tool) -> None:
    assert set_filter(tool, Event.PF, FilterField.VALUE, (0, 0)) == (Error.EINVAL, b"")
    assert set_filter(tool, Event.PF, FilterField.GPA, (2, 1)) == (Error.EINVAL, b"")
    assert set_filter(tool, Event.CR, FilterField.CHANGE, (1, 1)) == (Error.EINVAL, b"")
    assert set_filter(tool, Event.UNHOOK, FilterField.RIP, (0, 1)) == (Error.EINVAL, b"")
    assert set_filter(tool, Event.PF, FilterField.GPA, *[(0, 0)] * 257) == (Error.E2BIG, b"")
    assert tool.command(Command.VM_SET_EVENT_FILTER, struct.pack("<HBBHHQ", 0x77, 0, 0, 0, 0, 0)) == (Error.ENOENT, b"")
    assert tool.command(Command.VM_SET_EVENT_FILTER, struct.pack("<HBBHHQ", 9, 99, 0, 0, 0, 0)) == (Error.EINVAL, b"")


def test_many_pages_at_once(tool: Tool) -> None:
    tool.guest.ram[DATA] = 0x5A
    gfns = [DATA >> 12, RAM_SIZE >> 12, CODE >> 12]
    data = tool.do(Command.VM_READ_PAGES, struct.pack("<HHI3Q", 3, 0, 0, *gfns))
    assert data[:8] == struct.pack("<Q", 0b101)
    assert len(data) == 8 + 2 * 4096
    assert (data[8], data[8 + 4096 : 8 + 4096 + len(END)]) == (0x5A, END)
    most = tool.do(Command.VM_READ_PAGES, struct.pack("<HHI15Q", 15, 0, 0, *range(15)))
    assert len(most) == 8 + 15 * 4096
    for request in (struct.pack("<HHI16Q", 16, 0, 0, *range(16)), struct.pack("<HHI", 0, 0, 0), struct.pack("<HHI", 1, 0, 0)):
        assert tool.command(Command.VM_READ_PAGES, request) == (Error.EINVAL, b"")


def test_memory_map_comes_with_descriptors_that_cannot_write(tool: Tool) -> None:
    tool.guest.ram[DATA] = 0x77
    tool.post(kvmi.V9.commands[Command.VM_GET_MEMORY_MAP])
    message, fds, _, _ = socket.recv_fds(tool.socket, 4096, 4)
    reply = kvmi.GetMemoryMapReply.from_buffer_copy(message, 16)
    entry = kvmi.MemoryRange.from_buffer_copy(message, 16 + ctypes.sizeof(reply))
    assert (reply.count, reply.fds, len(fds)) == (1, 1, 1)
    assert (entry.gpa, entry.size, entry.fd) == (0, RAM_SIZE, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fds[0], 4096)
    with mmap.mmap(fds[0], RAM_SIZE, prot=mmap.PROT_READ, offset=entry.offset) as view:
        assert view[DATA] == 0x77
    os.close(fds[0])
