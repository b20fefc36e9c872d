"""The VMM's ioctls: hook, permissions, un-hook, as `kvmi_test.c` begins; and what the tool's leaving does to the VM."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from softkvm import kvm
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Command, Error, Event
from tests.helpers.long_guest import CODE, END
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import Tool

IOCTLS = kvmi.V9.ioctls


def failure(vm: kvm.Vm, number: int, argument: kvmi.Hook | kvmi.Feature | None = None) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the result
        kvm.dispatch(vm, number, 0 if argument is None else memoryview(bytearray(argument)))
    return caught.value.errno


def test_sequence_of_the_selftest(hooked: Hooked) -> None:
    tool = hooked(hook=False)
    vm = tool.vm
    assert vm.check_extension(IOCTLS.capability) == kvmi.VERSION
    assert failure(vm, IOCTLS.command, kvmi.Feature(1, -1)) == errno.EFAULT
    assert failure(vm, IOCTLS.event, kvmi.Feature(1, -1)) == errno.EFAULT
    with pytest.raises(OSError, match="not introspected"):
        vm.introspection_preunhook()
    kvm.dispatch(vm, IOCTLS.unhook)
    assert failure(vm, IOCTLS.hook, kvmi.Hook(fd=tool.theirs.fileno(), padding=1)) == errno.EINVAL
    assert failure(vm, IOCTLS.hook, kvmi.Hook(fd=-1)) == errno.EINVAL
    tool.hook()
    assert failure(vm, IOCTLS.hook, kvmi.Hook(fd=tool.theirs.fileno())) == errno.EEXIST
    assert failure(vm, IOCTLS.command, kvmi.Feature(0, kvmi.V9.commands[Command.GET_VERSION])) == errno.EPERM
    assert failure(vm, IOCTLS.command, kvmi.Feature(2, -1)) == errno.EINVAL
    assert failure(vm, IOCTLS.command, kvmi.Feature(1, -2)) == errno.EINVAL
    assert failure(vm, IOCTLS.command, kvmi.Feature(1, kvmi.NUM_MESSAGES)) == errno.EINVAL
    assert failure(vm, IOCTLS.event, kvmi.Feature(1, kvmi.NUM_EVENTS)) == errno.EINVAL
    tool.allow(0)
    tool.allow(1)
    assert tool.do(Command.VM_GET_INFO) == struct.pack("<4I", 1, 0, 0, 0)


def test_only_stream_sockets(hooked: Hooked) -> None:
    tool = hooked(hook=False)
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
        for fd in (read, datagrams.fileno()):
            assert failure(tool.vm, IOCTLS.hook, kvmi.Hook(fd=fd)) == errno.EINVAL
    os.close(read)
    os.close(write)
    tool.hook()


def test_nothing_is_allowed_at_first_but_the_queries(hooked: Hooked) -> None:
    tool = hooked(hook=False)
    tool.hook()
    assert tool.command(Command.GET_VERSION)[0] == 0
    assert tool.command(Command.VM_GET_INFO) == (Error.EPERM, b"")
    assert tool.command(Command.VCPU_GET_INFO) == (Error.EPERM, b"")
    tool.allow(0)
    assert tool.command(Command.VM_CHECK_COMMAND, struct.pack("<HHI", 4, 0, 0)) == (Error.EPERM, b"")


def test_unhook_event(tool: Tool) -> None:
    """By its number, which Linux has given to KVM_RESET_DIRTY_RINGS meanwhile: it is the series' while the VM has a tool and no rings."""
    vm, unhook = tool.vm, kvmi.V9.events[Event.UNHOOK]
    assert failure(vm, IOCTLS.preunhook) == errno.ENOENT
    tool.do(Command.VM_CONTROL_EVENTS, struct.pack("<HBBI", unhook, 1, 0, 0))
    kvm.dispatch(vm, IOCTLS.preunhook)
    told = tool.event(Event.UNHOOK)
    assert told.body == struct.pack("<HHB", 544, 0, 0).ljust(544, b"\0")
    kvm.dispatch(vm, IOCTLS.unhook)
    assert tool.closed


def test_hook_again_after_unhook(tool: Tool) -> None:
    kvm.dispatch(tool.vm, IOCTLS.unhook)
    other = Tool(tool.guest)
    assert other.do(Command.VM_GET_MAX_GFN) == struct.pack("<Q", 512)
    other.close()


def test_tool_that_dies_leaves_a_running_vm(hooked: Hooked) -> None:
    tool = hooked(b"\xcc" + END)
    tool.enable(Event.BREAKPOINT)
    tool.set_access(CODE, 0)
    tool.enable(Event.PF)
    tool.start()
    tool.event(Event.PF)
    tool.socket.close()
    event = tool.finish().event
    assert event is not None
    assert event.vector == 3


def test_unhook_gives_the_guest_back_what_was_taken(hooked: Hooked) -> None:
    tool = hooked(b"\xcc" + END)
    tool.enable(Event.BREAKPOINT)
    tool.enable(Event.PF)
    tool.set_access(CODE, 0)
    kvm.dispatch(tool.vm, IOCTLS.unhook)
    event = tool.guest.run().event
    assert event is not None
    assert event.vector == 3
    assert tool.guest.vcpu.exits_by_reason().keys().isdisjoint({"EXCP_BP"})


def test_paused_vcpu_goes_on_when_the_vmm_unhooks(hooked: Hooked) -> None:
    tool = hooked()
    tool.do(Command.VCPU_PAUSE, struct.pack("<BBHI", 0, 0, 0, 0))
    tool.start()
    tool.event(Event.PAUSE_VCPU)
    kvm.dispatch(tool.vm, IOCTLS.unhook)
    assert tool.finish().event is None


def test_no_answer_in_time(hooked: Hooked) -> None:
    tool = hooked(b"\xcc" + END)
    assert tool.vm.introspection is not None
    tool.vm.introspection.reply_timeout = 0.01
    tool.enable(Event.BREAKPOINT)
    tool.start()
    tool.event(Event.BREAKPOINT)
    event = tool.finish().event
    assert event is not None
    assert event.vector == 3
    assert tool.closed


def test_crash_ends_the_vm(hooked: Hooked) -> None:
    tool = hooked(b"\xcc" + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    tool.reply(tool.event(Event.BREAKPOINT), Action.CRASH)
    assert tool.finish().exits == [(24,)]
    assert tool.guest.vcpu.kvm_run.system_event.type == 3
