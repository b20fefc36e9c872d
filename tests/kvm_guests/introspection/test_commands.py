"""Every command of v9, its errors and their precedence, as `kvmi_test.c` checks them."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from softkvm import kvm
from softkvm.uapi import kvm as uapi
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Error, Event
from tests.helpers.long_guest import CODE, DATA, END, RAM_SIZE, Guest
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import Tool

INVALID = (Error.EINVAL, b"")
SELECTIVE = kvmi.V9.ioctls


def disallow(tool: Tool, command: Command | None = None, event: Event | None = None) -> None:
    for number, chosen in ((SELECTIVE.command, command), (SELECTIVE.event, event)):
        if chosen is not None:
            kvm.dispatch(tool.vm, number, memoryview(bytearray(kvmi.Feature(allow=0, id=int(chosen)))))


def test_unknown_id(tool: Tool) -> None:
    for number in (0xFFFF, 26, 0x7FFF):
        assert tool.raw(number) == (Error.ENOSYS, b"")


def test_version(tool: Tool) -> None:
    assert tool.do(Command.GET_VERSION) == struct.pack("<IIB7x", kvmi.VERSION, 0, 1)
    assert tool.raw(1, b"ignored") == (0, struct.pack("<IIB7x", kvmi.VERSION, 0, 1))


@pytest.mark.parametrize(("check", "known", "last"), [(Command.VM_CHECK_COMMAND, 4, 25), (Command.VM_CHECK_EVENT, 9, 10)])
def test_check(tool: Tool, check: Command, known: int, last: int) -> None:
    assert tool.command(check, struct.pack("<HHI", known, 0, 0)) == (0, b"")
    assert tool.command(check, struct.pack("<HHI", 0, 0, 0)) == (0, b"")
    assert tool.command(check, struct.pack("<HHI", last + 1, 0, 0)) == (Error.ENOENT, b"")
    assert tool.command(check, struct.pack("<HHI", 0xFFFF, 0, 0)) == (Error.ENOENT, b"")
    for padding in ((1, 0), (0, 1)):
        assert tool.command(check, struct.pack("<HHI", 0xFFFF, *padding)) == INVALID
    disallow(tool, Command(known) if check is Command.VM_CHECK_COMMAND else None, Event(known) if check is Command.VM_CHECK_EVENT else None)
    assert tool.command(check, struct.pack("<HHI", known, 0, 0)) == (Error.EPERM, b"")
    assert tool.command(check, struct.pack("<HHI", known, 0, 1)) == INVALID


def test_extensions_are_found_by_asking(tool: Tool) -> None:
    for command in (Command.VM_SET_BREAKPOINTS, Command.VM_SET_EVENT_FILTER, Command.VM_READ_PAGES, Command.VM_GET_MEMORY_MAP):
        assert tool.command(Command.VM_CHECK_COMMAND, struct.pack("<HHI", command, 0, 0)) == (0, b"")


def test_vm_info_counts_vcpus_in_order_of_creation(tool: Tool) -> None:
    tool.vm.create_vcpu(5)
    assert tool.do(Command.VM_GET_INFO) == struct.pack("<4I", 2, 0, 0, 0)
    assert tool.command(Command.VCPU_GET_INFO, vcpu=1)[0] == 0
    assert tool.command(Command.VCPU_GET_INFO, vcpu=5) == INVALID


def test_vm_control_events(tool: Tool) -> None:
    control = Command.VM_CONTROL_EVENTS
    assert tool.command(control, struct.pack("<HBBI", 0, 1, 0, 0)) == (0, b"")
    assert tool.command(control, struct.pack("<HBBI", 0, 0, 0, 0)) == (0, b"")
    for request in ((0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0), (0xFFFF, 1, 0, 0)):
        assert tool.command(control, struct.pack("<HBBI", *request)) == INVALID
    disallow(tool, event=Event.UNHOOK)
    assert tool.command(control, struct.pack("<HBBI", 0, 1, 0, 0)) == (Error.EPERM, b"")


def test_memory(tool: Tool) -> None:
    pattern = bytes(range(256)) * 16
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", DATA, 4096, 0, 0) + pattern)
    assert bytes(tool.guest.ram[DATA : DATA + 4096]) == pattern
    assert tool.do(Command.VM_READ_PHYSICAL, struct.pack("<QHHI", DATA, 4096, 0, 0)) == pattern
    assert tool.do(Command.VM_READ_PHYSICAL, struct.pack("<QHHI", DATA + 4095, 1, 0, 0)) == b"\xff"


@pytest.mark.parametrize("command", [Command.VM_READ_PHYSICAL, Command.VM_WRITE_PHYSICAL])
def test_memory_errors(tool: Tool, command: Command) -> None:
    data = bytes(4096)
    for request in ((DATA, 0, 0, 0), (DATA + 1, 4096, 0, 0), (DATA, 1, 1, 0), (DATA, 1, 0, 1), (RAM_SIZE, 1, 1, 0)):
        assert tool.command(command, struct.pack("<QHHI", *request) + data) == INVALID
    assert tool.command(command, struct.pack("<QHHI", RAM_SIZE, 1, 0, 0) + data) == (Error.ENOENT, b"")
    assert tool.command(command, struct.pack("<QHHI", (1 << 64) - 1, 1, 0, 0) + data) == (Error.ENOENT, b"")


def test_write_ignores_the_rights_of_the_guest(tool: Tool) -> None:
    tool.set_access(DATA, 0)
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", DATA, 1, 0, 0) + b"x")
    assert tool.do(Command.VM_READ_PHYSICAL, struct.pack("<QHHI", DATA, 1, 0, 0)) == b"x"


def test_write_without_its_bytes_ends_the_connection(tool: Tool) -> None:
    tool.post(7, struct.pack("<QHHI", DATA, 4, 0, 0) + b"abc")
    assert tool.closed


def test_vcpu_info(tool: Tool) -> None:
    (speed,) = struct.unpack("<Q", tool.do(Command.VCPU_GET_INFO))
    assert speed == tool.guest.vcpu.get_tsc_khz() * 1000


def test_vcpu_header(tool: Tool) -> None:
    number = kvmi.V9.commands[Command.VCPU_GET_INFO]
    for header in ((99, 0, 0), (0, 1, 0), (0, 0, 1), (99, 1, 0)):
        assert tool.raw(number, struct.pack("<HHI", *header)) == INVALID
    disallow(tool, Command.VCPU_GET_INFO)
    assert tool.raw(number, struct.pack("<HHI", 99, 1, 0)) == (Error.EPERM, b"")


def test_missing_bytes_are_zero_and_more_are_ignored(tool: Tool) -> None:
    number = kvmi.V9.commands[Command.VCPU_GET_INFO]
    assert tool.raw(number)[0] == 0
    assert tool.raw(number, bytes(8000))[0] == 0


def test_pause_errors(tool: Tool) -> None:
    for request in ((2, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        assert tool.command(Command.VCPU_PAUSE, struct.pack("<BBHI", *request)) == INVALID
    assert tool.command(Command.VCPU_PAUSE, bytes(8), vcpu=9) == INVALID
    disallow(tool, event=Event.PAUSE_VCPU)
    assert tool.command(Command.VCPU_PAUSE, bytes(8), vcpu=9) == (Error.EPERM, b"")
    assert tool.command(Command.VCPU_PAUSE, b"\2", vcpu=9) == INVALID


def test_pauses_are_counted(hooked: Hooked) -> None:
    tool = hooked()
    for wait in (0, 1, 0):
        tool.do(Command.VCPU_PAUSE, struct.pack("<BBHI", wait, 0, 0, 0))
    tool.start()
    seqs = []
    for _ in range(3):
        told = tool.event(Event.PAUSE_VCPU)
        seqs.append(told.seq)
        assert told.u64(144) == CODE
        tool.reply(told)
    assert tool.finish().event is None
    assert seqs == [1, 2, 3]


def test_too_many_pauses(tool: Tool) -> None:
    for _ in range(1002):
        assert tool.command(Command.VCPU_PAUSE, bytes(8)) == (0, b"")
    assert tool.command(Command.VCPU_PAUSE, bytes(8)) == (Error.EBUSY, b"")


def test_vcpu_control_events(tool: Tool) -> None:
    control = Command.VCPU_CONTROL_EVENTS
    for event in (Event.PAUSE_VCPU, Event.HYPERCALL, Event.CR, Event.TRAP, Event.XSETBV, Event.MSR, Event.PF, Event.SINGLESTEP):
        for enable in (1, 1, 0, 0):
            assert tool.command(control, struct.pack("<HBBI", event, enable, 0, 0)) == (0, b"")
    for request in ((1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 1), (0, 1, 0, 0), (11, 1, 0, 0), (0xFFFF, 1, 0, 0)):
        assert tool.command(control, struct.pack("<HBBI", *request)) == INVALID
    disallow(tool, event=Event.CR)
    assert tool.command(control, struct.pack("<HBBI", Event.CR, 1, 0, 0)) == (Error.EPERM, b"")


def test_breakpoints_are_intercepted_once(tool: Tool) -> None:
    busy = (Error.EBUSY, b"")
    outcomes = [tool.command(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", 3, on, 0, 0)) for on in (0, 1, 1, 0, 0)]
    assert outcomes == [busy, (0, b""), busy, (0, b""), busy]


BP, DEBUG = 1 << 3, 1 << 3 | 1 << 1
SW_BREAKPOINTS = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_USE_SW_BP


def test_a_debugger_and_a_tool_do_not_share_breakpoints(tool: Tool) -> None:
    vcpu, (off, on) = tool.guest.vcpu, (struct.pack("<HBBI", 3, enable, 0, 0) for enable in (0, 1))
    debug = uapi.GuestDebug(control=SW_BREAKPOINTS)
    vcpu.set_guest_debug(debug)
    for request in (on, off):
        assert tool.command(Command.VCPU_CONTROL_EVENTS, request) == (Error.EBUSY, b"")
    vcpu.set_guest_debug(uapi.GuestDebug())
    assert tool.command(Command.VCPU_CONTROL_EVENTS, on) == (0, b"")
    with pytest.raises(OSError, match="has the guest's breakpoints") as failure:
        vcpu.set_guest_debug(debug)
    assert failure.value.errno == errno.EBUSY
    vcpu.set_guest_debug(uapi.GuestDebug(control=uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP))
    vcpu.set_guest_debug(uapi.GuestDebug())
    assert vcpu.control.exception_bitmap & DEBUG == BP, "who debugs by steps leaves the tool its breakpoints"
    tool.vm.introspection_unhook()
    vcpu.set_guest_debug(debug)
    assert vcpu.control.exception_bitmap & DEBUG == BP


@pytest.mark.parametrize("first", ["tool", "debugger"])
def test_whoever_leaves_takes_only_its_own_breakpoints(tool: Tool, first: str) -> None:
    """The tool has enabled the event, and was refused the interception."""
    vcpu = tool.guest.vcpu
    vcpu.set_guest_debug(uapi.GuestDebug(control=SW_BREAKPOINTS))
    assert tool.command(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", 3, 1, 0, 0)) == (Error.EBUSY, b"")
    if first == "tool":
        tool.vm.introspection_unhook()
        assert vcpu.control.exception_bitmap & DEBUG == BP
    vcpu.set_guest_debug(uapi.GuestDebug())
    assert vcpu.control.exception_bitmap & DEBUG == 0


def test_get_registers(hooked: Hooked) -> None:
    tool = hooked(rax=0x1122, r15=0x3344)
    data = tool.do(Command.VCPU_GET_REGISTERS, struct.pack("<HHI2I", 2, 0, 0, 0xC000_0080, 0x10))
    assert len(data) == 472 + 2 * 16
    reply = kvmi.GetRegistersReply.from_buffer_copy(data)
    vcpu = tool.guest.vcpu
    assert (reply.mode, reply.nmsrs) == (8, 2)
    assert bytes(reply.regs) == bytes(vcpu.get_regs())
    assert bytes(reply.sregs) == bytes(vcpu.get_sregs())
    assert struct.unpack_from("<IIQ", data, 472) == (0xC000_0080, 0, 0x500)
    assert tool.guest.vcpu.get_regs().r15 == 0x3344


def test_get_registers_errors(tool: Tool) -> None:
    get = Command.VCPU_GET_REGISTERS
    assert tool.command(get, struct.pack("<HHI", 0, 1, 0)) == INVALID
    assert tool.command(get, struct.pack("<HHII", 1, 0, 0, 0xFFFF_FFFF)) == INVALID
    assert tool.command(get, struct.pack("<HHI481I", 481, 0, 0, *[0x10] * 481))[0] == 0
    assert tool.command(get, struct.pack("<HHI482I", 482, 0, 0, *[0x10] * 482)) == INVALID
    tool.post(11, struct.pack("<HHIHHI", 0, 0, 0, 1, 0, 0))
    assert tool.closed


def test_set_registers(hooked: Hooked) -> None:
    tool = hooked(rax=1)
    regs = tool.guest.vcpu.get_regs()
    assert tool.command(Command.VCPU_SET_REGISTERS, bytes(regs)) == (Error.EOPNOTSUPP, b"")
    tool.do(Command.VCPU_PAUSE, bytes(8))
    tool.start()
    told = tool.event(Event.PAUSE_VCPU)
    tool.set_regs(told, rax=2)
    tool.set_regs(told, rax=3)
    assert kvmi.GetRegistersReply.from_buffer_copy(tool.do(Command.VCPU_GET_REGISTERS, bytes(8))).regs.rax == 1
    tool.reply(told)
    tool.finish()
    assert tool.guest.vcpu.get_regs().rax & 0xFF == 3


def test_cpuid(tool: Tool) -> None:
    data = tool.do(Command.VCPU_GET_CPUID, struct.pack("<II", 0, 0))
    assert struct.unpack("<4I", data) == tuple(tool.guest.vcpu.cpuid.execute(0, 0))
    assert tool.command(Command.VCPU_GET_CPUID, struct.pack("<II", 0x1234_5678, 0)) == (Error.ENOENT, b"")


def test_cleanup(tool: Tool) -> None:
    for enable in (1, 0):
        assert tool.command(Command.VM_CONTROL_CLEANUP, struct.pack("<BBHI", enable, 0, 0, 0)) == (0, b"")
    for request in ((2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)):
        assert tool.command(Command.VM_CONTROL_CLEANUP, struct.pack("<BBHI", *request)) == INVALID


def test_control_cr(tool: Tool) -> None:
    for register in (0, 3, 4):
        for enable in (1, 0):
            assert tool.command(Command.VCPU_CONTROL_CR, struct.pack("<BBHI", register, enable, 0, 0)) == (0, b"")
    for request in ((1, 1, 0, 0), (2, 1, 0, 0), (8, 1, 0, 0), (3, 2, 0, 0), (3, 1, 1, 0), (3, 1, 0, 1)):
        assert tool.command(Command.VCPU_CONTROL_CR, struct.pack("<BBHI", *request)) == INVALID


def test_inject_errors(tool: Tool) -> None:
    inject = Command.VCPU_INJECT_EXCEPTION
    for request in ((6, 1, 0, 0, 0), (6, 0, 1, 0, 0), (32, 0, 0, 0, 0), (255, 0, 0, 0, 0), (2, 0, 0, 0, 0)):
        assert tool.command(inject, struct.pack("<BBHIQ", *request)) == INVALID
    assert tool.command(inject, struct.pack("<BBHIQ", 6, 0, 0, 0, 0)) == (0, b"")
    assert tool.command(inject, struct.pack("<BBHIQ", 6, 0, 0, 0, 0)) == (Error.EBUSY, b"")
    disallow(tool, event=Event.TRAP)
    assert tool.command(inject, struct.pack("<BBHIQ", 6, 0, 0, 0, 0)) == (Error.EPERM, b"")


def test_max_gfn(tool: Tool) -> None:
    assert tool.do(Command.VM_GET_MAX_GFN) == struct.pack("<Q", RAM_SIZE >> 12)


def test_xcr(tool: Tool) -> None:
    assert tool.do(Command.VCPU_GET_XCR, bytes(8)) == struct.pack("<Q", tool.guest.vcpu.get_xcrs().xcrs[0].value)
    assert tool.command(Command.VCPU_GET_XCR, b"\1" + bytes(7)) == INVALID
    assert tool.command(Command.VCPU_GET_XCR, b"\0\1" + bytes(6)) == INVALID


def test_xsave(tool: Tool) -> None:
    area = tool.do(Command.VCPU_GET_XSAVE)
    assert area == bytes(tool.guest.vcpu.get_xsave())
    changed = area[:160] + b"\x55" * 16 + area[176:512] + struct.pack("<Q", 3) + area[520:]
    tool.do(Command.VCPU_SET_XSAVE, changed)
    assert tool.do(Command.VCPU_GET_XSAVE)[160:176] == b"\x55" * 16
    assert tool.command(Command.VCPU_SET_XSAVE, changed[:512] + b"\xff" * 64) == INVALID
    assert tool.command(Command.VCPU_SET_XSAVE, bytes(4097)) == INVALID


def test_mtrr_type(tool: Tool) -> None:
    vcpu = tool.guest.vcpu
    assert tool.do(Command.VCPU_GET_MTRR_TYPE, struct.pack("<Q", 0)) == bytes(8)
    vcpu.set_msrs({0x2FF: 0xC06, 0x250: 0x0606_0606_0606_0604, 0x268: 0x0100_0000_0000_0000, 0x200: 0xC000_0000, 0x201: 0xC000_0800})
    types = [tool.do(Command.VCPU_GET_MTRR_TYPE, struct.pack("<Q", gpa))[0] for gpa in (0, 0x1_0000, 0xC_7000, 0x20_0000, 0xD000_0000)]
    assert types == [4, 6, 1, 6, 0]


def test_control_msr(tool: Tool) -> None:
    for msr in (0, 0x1FFF, 0xC000_0000, 0xC000_1FFF):
        for enable in (1, 0):
            assert tool.command(Command.VCPU_CONTROL_MSR, struct.pack("<BBHI", enable, 0, 0, msr)) == (0, b"")
    for request in (
        (2, 0, 0, 0x140),
        (1, 1, 0, 0x140),
        (1, 0, 1, 0x140),
        (1, 0, 0, 0x2000),
        (1, 0, 0, 0xC000_2000),
        (1, 0, 0, 0xC001_0000),
    ):
        assert tool.command(Command.VCPU_CONTROL_MSR, struct.pack("<BBHI", *request)) == INVALID


def entry(gpa: int, access: int, visible: int = 1, padding1: int = 0, padding2: int = 0) -> bytes:
    return struct.pack("<QBBHI", gpa, access, visible, padding1, padding2)


def test_set_page_access(tool: Tool) -> None:
    command, one = Command.VM_SET_PAGE_ACCESS, struct.pack("<HHI", 1, 0, 0)
    for access in range(8):
        assert tool.command(command, one + entry(DATA, access)) == (0, b"")
    for bad in (entry(DATA, 8), entry(DATA, 255), entry(DATA, 7, 2), entry(DATA, 7, 1, 1), entry(DATA, 7, 1, 0, 1), entry(RAM_SIZE, 7)):
        assert tool.command(command, one + bad) == INVALID
    assert tool.command(command, one + entry(RAM_SIZE, 7, visible=0)) == (0, b"")
    assert tool.command(command, one) == INVALID
    assert tool.command(command, struct.pack("<HHI", 0, 0, 0)) == (0, b"")
    for padding in ((1, 0), (0, 1)):
        assert tool.command(command, struct.pack("<HHI", 1, *padding) + entry(DATA, 7)) == INVALID


def test_all_entries_are_tried(tool: Tool) -> None:
    body = struct.pack("<HHI", 3, 0, 0) + entry(DATA, Access.R) + entry(RAM_SIZE, 7) + entry(DATA + 4096, 0)
    assert tool.command(Command.VM_SET_PAGE_ACCESS, body) == INVALID
    track = tool.vm.mmu.track
    assert (track.rights(DATA >> 12), track.rights((DATA >> 12) + 1)) == (1, 0)


def test_singlestep_errors(tool: Tool) -> None:
    for request in ((2, *[0] * 7), (1, 1, *[0] * 6), (1, *[0] * 6, 1)):
        assert tool.command(Command.VCPU_CONTROL_SINGLESTEP, bytes(request)) == INVALID
    disallow(tool, event=Event.SINGLESTEP)
    assert tool.command(Command.VCPU_CONTROL_SINGLESTEP, b"\1" + bytes(7)) == (Error.EPERM, b"")


def test_translate(tool: Tool) -> None:
    assert tool.do(Command.VCPU_TRANSLATE_GVA, struct.pack("<Q", DATA + 5)) == struct.pack("<Q", DATA + 5)
    assert tool.do(Command.VCPU_TRANSLATE_GVA, struct.pack("<Q", 1 << 40)) == b"\xff" * 8
    assert tool.do(Command.VCPU_TRANSLATE_GVA, struct.pack("<Q", 1 << 63)) == b"\xff" * 8


def test_translate_by_tables_that_a_device_has(tool: Tool) -> None:
    """Where no slot is, the nested page table soon says so, and a walker for an observer finds no table there either."""
    sregs = tool.guest.vcpu.get_sregs()
    sregs.cr3 = 1 << 36
    tool.guest.vcpu.set_sregs(sregs)
    for _ in range(3):
        assert tool.do(Command.VCPU_TRANSLATE_GVA, struct.pack("<Q", DATA)) == b"\xff" * 8


def test_uninitialised_processors_get_pauses_alone(model: kvm.Model) -> None:
    system = kvm.System(model)
    guest = Guest(system, END)
    vm = system.create_vm()
    vm.create_irqchip()
    guest.vm, vcpus = vm, [vm.create_vcpu(n) for n in range(2)]
    tool = Tool(guest)
    assert tool.command(Command.VCPU_GET_INFO, vcpu=0)[0] == 0
    assert tool.command(Command.VCPU_GET_INFO, vcpu=1) == (Error.EAGAIN, b"")
    assert tool.command(Command.VCPU_PAUSE, bytes(8), vcpu=1) == (0, b"")
    vcpus[1].kvm_run.immediate_exit = 1
    with pytest.raises(OSError, match="KVM_RUN"):
        vcpus[1].run()
    tool.close()
    vm.close()


def test_commands_to_a_running_vcpu(hooked: Hooked) -> None:
    """The vCPU is in the guest, and leaves it to answer."""
    tool = hooked(b"\x48\xff\xc0\xeb\xfb")  # 1: inc rax; jmp 1b
    tool.start()
    first, second = (kvmi.GetRegistersReply.from_buffer_copy(tool.do(Command.VCPU_GET_REGISTERS, bytes(8))).regs.rax for _ in range(2))
    assert 0 <= first <= second
    tool.do(Command.VCPU_PAUSE, b"\1" + bytes(7))
    told = tool.event(Event.PAUSE_VCPU)
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", CODE, len(END), 0, 0) + END)
    tool.set_regs(told, rip=CODE)
    tool.reply(told, Action.CONTINUE)
    assert tool.finish().event is None


def test_commands_to_a_halted_vcpu(model: kvm.Model) -> None:
    guest = Guest(kvm.System(model), b"\xf4\xf4" + END)
    tool = Tool(guest)
    assert ctypes.sizeof(uapi.Regs) == 144
    tool.start()
    assert tool.finish().exits == [(uapi.KVM_EXIT_HLT,), (uapi.KVM_EXIT_HLT,)]
    assert tool.command(Command.VCPU_GET_XCR, bytes(8))[0] == 0
    guest.close()
    tool.close()
