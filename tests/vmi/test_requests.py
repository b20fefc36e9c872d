"""Every request, in every dialect that has it: as long as the table of messages says, and answered by what the table says."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvm import Regs
from softkvm.uapi.kvmi import Access, Command, Dialect, Event, FilterField
from softkvm.vmi import requests
from softkvm.vmi.requests import Request

REQUESTS: list[tuple[Request[Any], int]] = [
    (requests.version(), 0),
    (requests.check_command(Command.VM_READ_PAGES), 0),
    (requests.check_event(Event.PF), 0),
    (requests.vcpu_count(), 0),
    (requests.max_gfn(), 0),
    (requests.read_physical(0x1000, 16), 0),
    (requests.write_physical(0x1000, b"four"), 4),
    (requests.read_pages([1, 2, 3]), 24),
    (requests.memory_map(), 0),
    (requests.set_page_access([(0x1000, Access.R), (0x2000, Access.X)]), 32),
    (requests.set_breakpoints([0x1000]), 16),
    (requests.set_filter(Event.PF, FilterField.RIP, [(1, 2)]), 16),
    (requests.control_vm_event(Event.UNHOOK), 0),
    (requests.control_cleanup(), 0),
    (requests.pause(1), 0),
    (requests.registers(1, [0x10, 0x1B]), 8),
    (requests.set_registers(1, Regs(rip=1)), 0),
    (requests.cpuid(1, 7), 0),
    (requests.translate(1, 0x1000), 0),
    (requests.control_event(1, Event.CR), 0),
    (requests.control_cr(1, 4), 0),
    (requests.control_msr(1, 0x10), 0),
    (requests.control_singlestep(1), 0),
    (requests.inject_exception(1, 14, 2, 0x1000), 0),
    (requests.xcr0(1), 0),
    (requests.xsave(1), 0),
    (requests.set_xsave(1, bytes(4096)), 4096),
    (requests.mtrr_type(1, 0x1000), 0),
]


@pytest.mark.parametrize("dialect", kvmi.DIALECTS.values(), ids=lambda dialect: dialect.name)
@pytest.mark.parametrize(("request_", "trailing"), REQUESTS, ids=[request.command.name for request, _ in REQUESTS])
def test_requests_are_as_long_as_their_layout(request_: Request[Any], trailing: int, dialect: Dialect) -> None:
    layout = dialect.messages[request_.command].request
    assert len(request_.body(dialect)) == (ctypes.sizeof(layout) if layout is not None else 0) + trailing


def test_no_command_is_without_a_request() -> None:
    assert {request.command for request, _ in REQUESTS} >= set(Command) - {Command.VCPU_GET_INFO, Command.CONTROL_CMD_RESPONSE}


def test_a_translation_that_is_not_there() -> None:
    answer = bytes(kvmi.TranslateGvaReply(gpa=kvmi.INVALID_GPA))
    assert requests.translate(0, 1).parse(kvmi.V9, answer) is None
    assert requests.translate(0, 1).parse(kvmi.V9, (0x5000).to_bytes(8, "little")) == 0x5000
