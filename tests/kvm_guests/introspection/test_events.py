"""Every event of v9 and what each answer does, on both vendors, as `kvmi_test.c` and the documentation of the series have it."""

from __future__ import annotations

import struct

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Action, Command, Descriptor, Event
from tests.helpers.long_guest import CODE, DATA, END, GDT, PD, PML4, STACK
from tests.kvm_guests.introspection.conftest import Hooked
from tests.kvm_guests.introspection.tool import CR3, CR4, EFER, RIP, Told, Tool

VMCALL, NOP, INT3, UD2 = b"\x0f\x01\xc1", b"\x90", b"\xcc", b"\x0f\x0b"
LSTAR, FEATURE_CONTROL_LIKE = 0xC000_0082, 0x140
BP, UD, GP = 3, 6, 13


def control_cr(tool: Tool, register: int, enable: int = 1) -> None:
    tool.do(Command.VCPU_CONTROL_CR, struct.pack("<BBHI", register, enable, 0, 0))


def control_msr(tool: Tool, msr: int, enable: int = 1) -> None:
    tool.do(Command.VCPU_CONTROL_MSR, struct.pack("<BBHI", enable, 0, 0, msr))


def singlestep(tool: Tool, enable: int) -> None:
    tool.do(Command.VCPU_CONTROL_SINGLESTEP, struct.pack("<B7x", enable))


def page_fault(told: Told) -> tuple[int, int, int]:
    """gva, gpa, access."""
    gva, gpa, access = struct.unpack("<QQB7x", told.data)
    return gva, gpa, access


# --- What every event has ----------------------------------------------------------------------------------------------------------


def test_registers_of_an_event(hooked: Hooked) -> None:
    tool = hooked(b"\xcc" + END, rax=0x1234, rsi=0x5678)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    reply = kvmi.GetRegistersReply.from_buffer_copy(tool.do(Command.VCPU_GET_REGISTERS, bytes(8)))
    common = kvmi.EventCommon.from_buffer_copy(told.common)
    assert (common.size, common.vcpu, common.event, common.arch.mode) == (544, 0, 3, 8)
    assert bytes(common.arch.regs) == bytes(reply.regs)
    assert bytes(common.arch.sregs) == bytes(reply.sregs)
    assert (told.u64(RIP), told.u64(CR3), told.u64(EFER), common.arch.msrs.efer) == (CODE, PML4, 0x500, 0x500)
    assert (common.arch.regs.rax, common.arch.regs.rsi) == (0x1234, 0x5678)
    tool.reply(told)
    tool.finish()


@pytest.mark.parametrize(
    "fault",
    [{"seq": 99}, {"action": 3}, {"padding1": 1}, {"padding2": 1}, {"extra": b"x"}, {"vcpu": 7}],
    ids=lambda fault: next(iter(fault)),
)
def test_a_bad_answer_ends_the_connection_and_not_the_guest(hooked: Hooked, fault: dict[str, int]) -> None:
    tool = hooked(INT3 + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    body = kvmi.EventReply(action=fault.get("action", 0), padding1=fault.get("padding1", 0), padding2=fault.get("padding2", 0))
    head = kvmi.VcpuHeader(vcpu=fault.get("vcpu", 0))
    tool.send(0, bytes(head) + bytes(body) + bytes(fault.get("extra", b"")), fault.get("seq", told.seq))
    assert tool.closed
    event = tool.finish().event
    assert event is not None
    assert event.vector == BP


def test_a_second_answer_ends_the_connection(hooked: Hooked) -> None:
    tool = hooked(INT3 + b"\xeb\xfe")
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    tool.reply(told)
    tool.reply(told)
    assert tool.closed
    tool.finish()


def test_the_event_in_an_answer_is_not_looked_at(hooked: Hooked) -> None:
    tool = hooked(INT3 + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    tool.reply(tool.event(Event.BREAKPOINT), event=77)
    tool.finish()
    assert tool.command(Command.VM_GET_INFO)[0] == 0


# --- Hypercall, breakpoint, injection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("registers", "sent"), [((34, 24, 0), True), ((34, 24, 1), False), ((34, 25, 0), False), ((33, 24, 0), False)])
def test_hypercall(hooked: Hooked, registers: tuple[int, int, int], sent: bool) -> None:
    number, function, argument = registers
    tool = hooked(VMCALL + b"\x48\x89\xc3" + END, rax=number, rdi=function, rsi=argument)  # mov rbx, rax
    tool.enable(Event.HYPERCALL)
    tool.start()
    if sent:
        told = tool.event(Event.HYPERCALL)
        assert (told.u64(RIP), told.data) == (CODE, b"")
        tool.reply(told)
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_regs().rbx == (0 if sent else (1 << 64) - 1000)


def test_breakpoint_stepped_over_by_the_tool(hooked: Hooked) -> None:
    tool = hooked(INT3 + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    assert told.u64(RIP) == CODE
    assert told.data == struct.pack("<QB7x", CODE, 1)
    tool.set_regs(told, rip=CODE + 1)
    tool.reply(told, Action.RETRY)
    assert tool.finish().event is None


def test_breakpoint_of_the_guest(hooked: Hooked) -> None:
    tool = hooked(INT3 + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    tool.reply(tool.event(Event.BREAKPOINT))
    event = tool.finish().event
    assert event is not None
    assert (event.vector, event.rip) == (BP, CODE + 1)


def inject(tool: Tool, nr: int, error: int = 0, address: int = 0) -> None:
    tool.do(Command.VCPU_INJECT_EXCEPTION, struct.pack("<BBHIQ", nr, 0, 0, error, address))


@pytest.mark.parametrize(("nr", "error", "address"), [(UD, 0, 0), (GP, 0x58, 0), (14, 6, 0xDEAD_0000)])
def test_injected_exception(hooked: Hooked, nr: int, error: int, address: int) -> None:
    tool = hooked(NOP + END)
    inject(tool, nr, error, address)
    tool.start()
    told = tool.event(Event.TRAP)
    assert told.data == struct.pack("<BBHIQ", nr, 0, 0, error, address)
    tool.reply(told)
    event = tool.finish().event
    assert event is not None
    assert (event.vector, event.rip, event.error or 0) == (nr, CODE, error)
    assert tool.guest.vcpu.get_sregs().cr2 == address


def test_what_is_on_its_way_goes_first(hooked: Hooked) -> None:
    tool = hooked(INT3 + END)
    tool.enable(Event.BREAKPOINT)
    tool.start()
    told = tool.event(Event.BREAKPOINT)
    inject(tool, UD)
    tool.reply(told)
    trap = tool.event(Event.TRAP)
    assert trap.data[0] == BP
    tool.reply(trap)
    event = tool.finish().event
    assert event is not None
    assert event.vector == BP


def test_injection_into_a_guest_without_handlers(hooked: Hooked) -> None:
    tool = hooked(NOP + END)
    sregs = tool.guest.vcpu.get_sregs()
    sregs.idt.limit = 0
    tool.guest.vcpu.set_sregs(sregs)
    inject(tool, UD)
    tool.start()
    told = tool.event(Event.TRAP)
    assert told.data[0] == UD
    tool.reply(told)
    assert tool.finish().exits == [(8,)]


# --- Control registers, MSRs, XSETBV, descriptor tables ------------------------------------------------------------------------------

MOV_CR4 = b"\x0f\x20\xe0\x0c\x80\x0f\x22\xe0"  # mov rax, cr4; or al, 0x80 (PGE: left to the guest); mov cr4, rax
SET_OSFXSR_AND_SMEP = b"\x0f\x20\xe0\x48\x0d\x00\x00\x10\x00\x0f\x22\xe0"  # or rax, 1 << 20


@pytest.mark.parametrize("blocked", [True, False])
def test_cr4(hooked: Hooked, blocked: bool) -> None:
    tool = hooked(SET_OSFXSR_AND_SMEP + END)
    old = tool.guest.vcpu.get_sregs().cr4
    tool.enable(Event.CR)
    control_cr(tool, 4)
    tool.start()
    told = tool.event(Event.CR)
    assert told.data == struct.pack("<B7xQQ", 4, old, old | 1 << 20)
    assert told.u64(CR4) == old
    tool.reply(told, extra=struct.pack("<Q", old if blocked else old | 1 << 20))
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_sregs().cr4 == (old if blocked else old | 1 << 20)


def test_bits_of_cr4_that_are_the_guests(hooked: Hooked) -> None:
    tool = hooked(MOV_CR4 + END)
    tool.enable(Event.CR)
    control_cr(tool, 4)
    tool.start()
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_sregs().cr4 & 0x80


def test_an_answer_without_a_value_is_zero(hooked: Hooked) -> None:
    tool = hooked(SET_OSFXSR_AND_SMEP + END)
    tool.enable(Event.CR)
    control_cr(tool, 4)
    tool.start()
    tool.reply(tool.event(Event.CR))
    event = tool.finish().event
    assert event is not None  # CR4 of zero in long mode
    assert event.vector == GP


def test_cr3(hooked: Hooked) -> None:
    copy = 0x7_0000
    tool = hooked(b"\x0f\x22\xd8\x0f\x22\xd8\x0f\x20\xdb" + END, rax=copy)  # mov cr3, rax, twice; mov rbx, cr3
    tool.guest.ram[copy : copy + 4096] = tool.guest.ram[PML4 : PML4 + 4096]
    tool.enable(Event.CR)
    control_cr(tool, 3)
    tool.start()
    told = tool.event(Event.CR)
    assert told.data == struct.pack("<B7xQQ", 3, PML4, copy)
    tool.reply(told, extra=struct.pack("<Q", copy))
    assert tool.finish().event is None, "a write of the same value is no event"
    assert tool.guest.vcpu.get_regs().rbx == copy


def test_cr0(hooked: Hooked) -> None:
    # mov rax, cr0; or rax, WP; mov cr0, rax; mov rbx, cr0; clts
    code = b"\x0f\x20\xc0\x48\x0d\x00\x00\x01\x00\x0f\x22\xc0\x0f\x20\xc3\x0f\x06"
    tool = hooked(code + END)
    old = tool.guest.vcpu.get_sregs().cr0
    tool.enable(Event.CR)
    control_cr(tool, 0)
    tool.start()
    told = tool.event(Event.CR)
    assert told.data == struct.pack("<B7xQQ", 0, old, old | 1 << 16)
    tool.reply(told, extra=struct.pack("<Q", old | 1 << 16))
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_regs().rbx == old | 1 << 16


def test_a_write_that_faults_is_no_event(hooked: Hooked) -> None:
    tool = hooked(b"\x0f\x22\xe0" + END, rax=0)
    tool.enable(Event.CR)
    control_cr(tool, 4)
    tool.start()
    event = tool.finish().event
    assert event is not None
    assert event.vector == GP


def wrmsr(msr: int, value: int) -> dict[str, int]:
    return {"rcx": msr, "rax": value & 0xFFFF_FFFF, "rdx": value >> 32}


@pytest.mark.parametrize("blocked", [True, False])
def test_msr(hooked: Hooked, blocked: bool) -> None:
    new = 0xFFFF_8000_1234_5678
    tool = hooked(b"\x0f\x30\x0f\x30" + END, **wrmsr(LSTAR, new))
    tool.enable(Event.MSR)
    control_msr(tool, LSTAR)
    tool.start()
    for _ in range(2 if blocked else 1):
        told = tool.event(Event.MSR)
        assert told.data == struct.pack("<IIQQ", LSTAR, 0, 0, new)
        tool.reply(told, extra=struct.pack("<Q", 0 if blocked else new))
    assert tool.finish().event is None
    assert tool.guest.vcpu.get_msrs([LSTAR]) == [0 if blocked else new]


def test_msr_that_is_not_chosen(hooked: Hooked) -> None:
    tool = hooked(b"\x0f\x30" + END, **wrmsr(LSTAR, 0x1000))
    tool.enable(Event.MSR)
    control_msr(tool, LSTAR)
    control_msr(tool, LSTAR, 0)
    tool.start()
    assert tool.finish().event is None


def test_xsetbv(hooked: Hooked) -> None:
    tool = hooked(b"\x0f\x01\xd1\x0f\x01\xd1" + END, rax=7)
    tool.enable(Event.XSETBV)
    tool.start()
    told = tool.event(Event.XSETBV)
    assert told.data == struct.pack("<B7xQQ", 0, 1, 7)
    assert told.u64(RIP) == CODE
    assert tool.do(Command.VCPU_GET_XCR, bytes(8)) == struct.pack("<Q", 7)
    tool.reply(told)
    assert tool.finish().event is None, "XSETBV of the same value is no event"


DESCRIPTORS = [
    (b"\x0f\x01\x03", Descriptor.GDTR, 0),  # sgdt [rbx]
    (b"\x0f\x01\x13", Descriptor.GDTR, 1),  # lgdt
    (b"\x0f\x01\x0b", Descriptor.IDTR, 0),
    (b"\x0f\x01\x1b", Descriptor.IDTR, 1),
    (b"\x0f\x00\xc0", Descriptor.LDTR, 0),  # sldt eax
    (b"\x0f\x00\xd1", Descriptor.LDTR, 1),  # lldt cx
    (b"\x0f\x00\xc8", Descriptor.TR, 0),  # str eax
    (b"\x0f\x00\xda", Descriptor.TR, 1),  # ltr dx
]


@pytest.mark.parametrize(("code", "table", "write"), DESCRIPTORS)
def test_descriptor_tables(hooked: Hooked, code: bytes, table: int, write: int) -> None:
    tool = hooked(code + END, rbx=DATA, rdx=8)
    tool.guest.ram[DATA : DATA + 10] = struct.pack("<HQ", 23, GDT)
    tool.enable(Event.DESCRIPTOR)
    tool.start()
    told = tool.event(Event.DESCRIPTOR)
    assert told.data == struct.pack("<BB6x", table, write)
    tool.reply(told)
    event = tool.finish().event
    if code == b"\x0f\x00\xda":
        assert event is not None  # no TSS is at selector 8: the instruction was executed, and faulted
        assert event.vector == GP
    else:
        assert event is None
    if code == b"\x0f\x01\x03":
        assert bytes(tool.guest.ram[DATA : DATA + 10]) == struct.pack("<HQ", 23, GDT)


# --- Pages -------------------------------------------------------------------------------------------------------------------------

READ, WRITE, ADD = b"\x8a\x03", b"\x88\x03", b"\x00\x03"  # mov al, [rbx]; mov [rbx], al; add [rbx], al


@pytest.mark.parametrize(
    ("code", "rights", "expected"),
    [
        (READ, Access.R | Access.X, []),
        (WRITE, Access.R | Access.X, [Access.W]),
        (WRITE, Access.W, []),
        (READ, Access.W | Access.X, [Access.R]),
        (ADD, 0, [Access.R, Access.W]),
        (ADD, Access.R, [Access.W]),
        (ADD, Access.W, [Access.R]),
        (b"\xf0" + ADD, 0, [Access.R, Access.W]),
    ],
)
def test_page_events(hooked: Hooked, code: bytes, rights: int, expected: list[int]) -> None:
    """CONTINUE makes the access, and the page stays restricted: the second time is as the first."""
    tool = hooked((code) * 2 + END, rbx=DATA + 0x10, rax=5)
    tool.guest.ram[DATA + 0x10] = 5
    tool.enable(Event.PF)
    tool.set_access(DATA, rights)
    tool.start()
    for n in range(2):
        for access in expected:
            told = tool.event(Event.PF)
            assert page_fault(told) == (DATA + 0x10, DATA + 0x10, access)
            assert told.u64(RIP) == CODE + n * len(code)
            tool.reply(told)
    assert tool.finish().event is None
    assert tool.guest.ram[DATA + 0x10] == (15 if ADD in code else 5)


def test_page_event_of_the_selftest(hooked: Hooked) -> None:
    tool = hooked(WRITE + END, rbx=DATA, rax=0x77)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    assert page_fault(told) == (DATA, DATA, Access.W)
    assert tool.guest.ram[DATA] == 0
    tool.set_access(DATA, Access.R | Access.W)
    tool.reply(told, Action.RETRY)
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 0x77


def test_retry_at_another_place(hooked: Hooked) -> None:
    tool = hooked(WRITE + END, rbx=DATA, rax=0x77)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    tool.set_regs(told, rip=CODE + len(WRITE))
    tool.reply(told, Action.RETRY)
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 0


def test_access_across_two_pages(hooked: Hooked) -> None:
    tool = hooked(b"\x48\x89\x03" + END, rbx=DATA + 4092, rax=0x1122_3344_5566_7788)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.set_access(DATA + 4096, Access.R)
    tool.start()
    for gpa in (DATA + 4092, DATA + 4096):
        told = tool.event(Event.PF)
        assert page_fault(told) == (gpa, gpa, Access.W)
        assert tool.guest.ram[DATA + 4092] == 0, "nothing is done before every page is answered"
        tool.reply(told)
    assert tool.finish().event is None
    assert bytes(tool.guest.ram[DATA + 4092 : DATA + 4100]) == struct.pack("<Q", 0x1122_3344_5566_7788)


def test_from_one_page_to_another(hooked: Hooked) -> None:
    tool = hooked(b"\xf3\xa4" + END, rsi=DATA, rdi=DATA + 0x2000, rcx=2)  # rep movsb
    tool.guest.ram[DATA : DATA + 2] = b"ab"
    tool.enable(Event.PF)
    tool.set_access(DATA, 0)
    tool.set_access(DATA + 0x2000, Access.R)
    tool.start()
    for n in range(2):
        for gpa, access in ((DATA + n, Access.R), (DATA + 0x2000 + n, Access.W)):
            told = tool.event(Event.PF)
            assert page_fault(told) == (gpa, gpa, access)
            tool.reply(told)
    assert tool.finish().event is None
    assert bytes(tool.guest.ram[DATA + 0x2000 : DATA + 0x2002]) == b"ab"


def test_execution(hooked: Hooked) -> None:
    tool = hooked(NOP * 2 + END)
    tool.enable(Event.PF)
    tool.set_access(CODE, Access.R | Access.W)
    tool.start()
    for offset in (0, 1, 2, 4):
        told = tool.event(Event.PF)
        assert page_fault(told) == (CODE + offset, CODE + offset, Access.X)
        tool.reply(told)
        if offset == 2:
            tool.guest.vcpu.kvm_run.immediate_exit = 0
            break
    assert tool.finish().event is None


def test_code_that_ran_before_its_right_was_taken(hooked: Hooked) -> None:
    """Blocks of translated code do not outlive the right to execute them."""
    tool = hooked(b"\xeb\xfe")  # 1: jmp 1b
    tool.enable(Event.PF)
    tool.start()
    tool.do(Command.VCPU_GET_REGISTERS, bytes(8))
    tool.set_access(CODE, Access.R | Access.W)
    told = tool.event(Event.PF)
    assert page_fault(told) == (CODE, CODE, Access.X)
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", CODE, len(END), 0, 0) + END)
    tool.set_access(CODE, 7)
    tool.reply(told, Action.RETRY)
    assert tool.finish().event is None


def test_a_loop_that_reads_and_writes_meets_a_new_right_at_once(hooked: Hooked) -> None:
    tool = hooked(b"\x00\x03\xeb\xfc", rbx=DATA, rax=1)  # 1: add [rbx], al; jmp 1b
    tool.enable(Event.PF)
    tool.start()
    tool.do(Command.VCPU_GET_REGISTERS, bytes(8))
    tool.set_access(DATA, Access.R)
    value = tool.guest.ram[DATA]
    told = tool.event(Event.PF)
    assert page_fault(told) == (DATA, DATA, Access.W)
    assert tool.guest.ram[DATA] == value, "not one store came after the command was answered"
    tool.set_regs(told, rip=CODE + 4)
    tool.do(Command.VM_WRITE_PHYSICAL, struct.pack("<QHHI", CODE + 4, len(END), 0, 0) + END)
    tool.reply(told, Action.RETRY)
    assert tool.finish().event is None


def test_the_page_walker_makes_no_event(hooked: Hooked) -> None:
    """Accessed and dirty bits are set in a page table that the guest may not touch."""
    tool = hooked(WRITE + READ + END, rbx=DATA)
    entry = struct.unpack_from("<Q", tool.guest.ram, PD)[0]
    tool.guest.ram[PD : PD + 8] = struct.pack("<Q", entry & ~0x60)
    tool.enable(Event.PF)
    for table in (PML4, PD):
        tool.set_access(table, 0)
    tool.start()
    assert tool.finish().event is None
    assert struct.unpack_from("<Q", tool.guest.ram, PD)[0] & 0x60 == 0x60


def test_a_write_to_a_page_table_is_an_event(hooked: Hooked) -> None:
    tool = hooked(b"\x48\x89\x03" + END, rbx=PD + 8, rax=0)
    tool.enable(Event.PF)
    tool.set_access(PD, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    assert page_fault(told) == (PD + 8, PD + 8, Access.W)
    tool.reply(told)
    assert tool.finish().event is None


def test_the_stack_of_an_exception(hooked: Hooked) -> None:
    """The silicon pushes a frame to a page without the right to write: the event, then the delivery goes on."""
    tool = hooked(UD2)
    tool.enable(Event.PF)
    tool.set_access(STACK - 4096, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    gva, gpa, access = page_fault(told)
    assert (gva == gpa, gpa & -4096, access) == (True, STACK - 4096, Access.W)
    assert told.u64(RIP) == CODE
    tool.reply(told)
    event = tool.finish().event
    assert event is not None
    assert (event.vector, event.rip) == (UD, CODE)


def test_string_input(hooked: Hooked) -> None:
    tool = hooked(b"\xf3\x6c" + END, rdi=DATA, rcx=4, rdx=0x99)  # rep insb
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    told = tool.event(Event.PF)
    assert page_fault(told) == (DATA, DATA, Access.W)
    tool.reply(told)
    assert tool.finish().event is None
    assert bytes(tool.guest.ram[DATA : DATA + 4]) == b"\x5a" * 4


def test_events_that_are_not_enabled_let_the_access_happen(hooked: Hooked) -> None:
    tool = hooked(ADD + END, rbx=DATA, rax=3)
    tool.set_access(DATA, 0)
    tool.start()
    assert tool.finish().event is None
    assert tool.guest.ram[DATA] == 3


def test_rights_outlive_the_memory_slot(hooked: Hooked) -> None:
    from softkvm.uapi.kvm import UserspaceMemoryRegion

    tool = hooked(WRITE + END, rbx=DATA, rax=1)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    memory = tool.guest.memory
    tool.vm.set_user_memory_region(UserspaceMemoryRegion(memory_size=0))
    tool.vm.set_user_memory_region(UserspaceMemoryRegion(memory_size=memory.size, userspace_addr=memory.address))
    tool.start()
    tool.reply(tool.event(Event.PF))
    assert tool.finish().event is None


def test_dirty_log_has_what_was_let_through(hooked: Hooked) -> None:
    from softkvm.uapi.kvm import KVM_MEM_LOG_DIRTY_PAGES, UserspaceMemoryRegion

    tool = hooked(WRITE + END, rbx=DATA, rax=1)
    memory = tool.guest.memory
    region = UserspaceMemoryRegion(memory_size=memory.size, userspace_addr=memory.address, flags=KVM_MEM_LOG_DIRTY_PAGES)
    tool.vm.set_user_memory_region(region)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    tool.start()
    tool.reply(tool.event(Event.PF))
    assert tool.finish().event is None
    page = DATA >> 12
    assert tool.vm.get_dirty_log(0)[page >> 3] >> (page & 7) & 1


# --- Single-stepping -----------------------------------------------------------------------------------------------------------------


def test_singlestep(hooked: Hooked) -> None:
    tool = hooked(NOP * 4 + END)
    singlestep(tool, 1)
    tool.start()
    for n in (1, 2, 3):
        told = tool.event(Event.SINGLESTEP)
        assert (told.data, told.u64(RIP)) == (bytes(8), CODE + n)
        if n == 3:
            singlestep(tool, 0)
        tool.reply(told)
    assert tool.finish().event is None


def test_another_exit_while_stepping(hooked: Hooked) -> None:
    tool = hooked(b"\x0f\xa2" + END)  # cpuid
    singlestep(tool, 1)
    tool.start()
    told = tool.event(Event.SINGLESTEP)
    assert (told.data, told.u64(RIP)) == (b"\1" + bytes(7), CODE)
    singlestep(tool, 0)
    tool.reply(told)
    assert tool.finish().event is None


def test_no_interrupt_comes_between_steps(hooked: Hooked) -> None:
    tool = hooked(NOP * 3 + END, rflags=0x202)
    singlestep(tool, 1)
    tool.guest.vcpu.interrupt(0x40)
    tool.start()
    told = tool.event(Event.SINGLESTEP)
    assert told.u64(RIP) == CODE + 1
    singlestep(tool, 0)
    tool.reply(told)
    event = tool.finish().event
    assert event is not None
    assert (event.vector, event.rip) == (0x40, CODE + 1)


def test_stepping_over_a_protected_page(hooked: Hooked) -> None:
    tool = hooked(WRITE + END, rbx=DATA, rax=1)
    tool.enable(Event.PF)
    tool.set_access(DATA, Access.R)
    singlestep(tool, 1)
    tool.start()
    tool.reply(tool.event(Event.PF))
    told = tool.event(Event.SINGLESTEP)
    assert (told.data[0], told.u64(RIP), tool.guest.ram[DATA]) == (0, CODE + 2, 1)
    singlestep(tool, 0)
    tool.reply(told)
    assert tool.finish().event is None
