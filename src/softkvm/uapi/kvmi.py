"""KVM introspection (KVMI): ioctls, messages, events and the three dialects of the wire protocol, in one table.

Source of truth: the series "VM introspection" v9 (21 Jul 2020, kvm@vger 20200721210922.7646) and v12 (6 Oct 2021, 20211006173113.26445),
their `include/uapi/linux/kvmi.h` and `Documentation/virt/kvm/kvmi.rst`; and libkvmi's headers for what shipping clients (libkvmi, LibVMI,
kvmi-rs) speak, which is older than v9.

Commands and events have the numbers of v9 inside softkvm. A `Dialect` says how a peer numbers them and which layouts differ. A message is
`Header`, then for vCPU commands `VcpuHeader`, then the request's structure, then what trails it (array or bytes). A reply is `Header`,
`ErrorCode`, and on success the reply's structure and what trails it. All fields named `padding*` of a request must be zero.
"""

import ctypes
from collections.abc import Mapping
from ctypes import Array, Structure, c_char, c_uint8, c_uint16, c_uint32
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Annotated

from softkvm.uapi.kvm import MsrEntry, Regs, Sregs
from softkvm.uapi.layout import S32, S64, U8, U16, U32, U64, layout

VERSION = 1
MAX_MESSAGE = 4096 * 2 - 8
"""Most bytes behind a header, in either direction; only READ_PAGES answers with more."""
PAGE_SIZE = 4096
MAX_PENDING_PAUSES = 1001
INVALID_GPA = (1 << 64) - 1
"""TRANSLATE_GVA of an address that is not mapped; also the `gva` of a PF event that has none."""
HYPERCALL_NUMBER, HYPERCALL_FUNCTION = 34, 24
"""VMCALL with this in EAX and this in RDI (EBX outside 64-bit mode) and 0 in RSI (ECX) makes the HYPERCALL event."""

EXTENSION = 0x8000
"""Message ids from here on are softkvm's own, the same in every dialect; a client finds them by CHECK_COMMAND."""


class Error(IntEnum):
    """`ErrorCode.err` of a failed command, negated there."""

    EPERM = 1
    ENOENT = 2
    E2BIG = 7
    EAGAIN = 11
    ENOMEM = 12
    EFAULT = 14
    EBUSY = 16
    EINVAL = 22
    EOPNOTSUPP = 95
    ENOSYS = 1000


class Command(IntEnum):
    """What a tool can ask for, by its v9 id; above 16 bits: what v9 does not have."""

    GET_VERSION = 1
    VM_CHECK_COMMAND = 2
    VM_CHECK_EVENT = 3
    VM_GET_INFO = 4
    VM_CONTROL_EVENTS = 5
    VM_READ_PHYSICAL = 6
    VM_WRITE_PHYSICAL = 7
    VCPU_GET_INFO = 8
    VCPU_PAUSE = 9
    VCPU_CONTROL_EVENTS = 10
    VCPU_GET_REGISTERS = 11
    VCPU_SET_REGISTERS = 12
    VCPU_GET_CPUID = 13
    VM_CONTROL_CLEANUP = 14
    VCPU_CONTROL_CR = 15
    VCPU_INJECT_EXCEPTION = 16
    VM_GET_MAX_GFN = 17
    VCPU_GET_XCR = 18
    VCPU_GET_XSAVE = 19
    VCPU_SET_XSAVE = 20
    VCPU_GET_MTRR_TYPE = 21
    VCPU_CONTROL_MSR = 22
    VM_SET_PAGE_ACCESS = 23
    VCPU_CONTROL_SINGLESTEP = 24
    VCPU_TRANSLATE_GVA = 25
    VM_SET_BREAKPOINTS = EXTENSION
    VM_SET_EVENT_FILTER = EXTENSION + 1
    VM_READ_PAGES = EXTENSION + 2
    VM_GET_MEMORY_MAP = EXTENSION + 3
    CONTROL_CMD_RESPONSE = 0x1001B


NUM_MESSAGES = 26
"""Ids below it are v9's; id 0 is the event and its reply."""


class Event(IntEnum):
    """What a tool can be told, by its v9 id; from 0x80 on softkvm's own, the same in every dialect."""

    UNHOOK = 0
    PAUSE_VCPU = 1
    HYPERCALL = 2
    BREAKPOINT = 3
    CR = 4
    TRAP = 5
    XSETBV = 6
    DESCRIPTOR = 7
    MSR = 8
    PF = 9
    SINGLESTEP = 10
    HIDDEN_BREAKPOINT = 0x80


NUM_EVENTS = 11
"""Ids below it are v9's."""


class Action(IntEnum):
    """What the tool wants done about an event."""

    CONTINUE = 0
    RETRY = 1
    CRASH = 2


class Access(IntFlag):
    """Rights of a guest page, and the access of a PF event (one bit)."""

    R = 1
    W = 2
    X = 4


class Descriptor(IntEnum):
    """Which table register a DESCRIPTOR event is about."""

    IDTR = 1
    GDTR = 2
    LDTR = 3
    TR = 4


class FilterField(IntEnum):
    """What VM_SET_EVENT_FILTER compares."""

    RIP = 0
    CR3 = 1  # the current address space, at the event
    GPA = 2  # PF, BREAKPOINT, HIDDEN_BREAKPOINT
    GVA = 3  # PF, HIDDEN_BREAKPOINT
    INDEX = 4  # CR: number of the register; MSR: index
    VALUE = 5  # CR, MSR, XSETBV: the new value
    RAX = 6  # the guest's RAX, such as a system call's number
    CHANGE = 7  # PF: 0 for a plain store that leaves memory as it is, 1 for any other access


# --- Framing -----------------------------------------------------------------------------------------------------------------------


@layout
class Header(Structure):
    """Before every message, in both directions; `size` counts what follows."""

    id: U16
    size: U16
    seq: U32


@layout
class ErrorCode(Structure):
    """First in every reply; data follow only if `err` is 0."""

    err: S32
    padding: U32


@layout
class VcpuHeader(Structure):
    """First in every vCPU command and event reply: the index of the vCPU in order of creation, not its APIC id."""

    vcpu: U16
    padding1: U16
    padding2: U32


# --- Requests and replies ----------------------------------------------------------------------------------------------------------


@layout
class GetVersionReply(Structure):
    """v9: `singlestep` = a monitor trap flag is there."""

    version: U32
    padding: U32
    singlestep: U8
    padding2: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class GetVersionReplyLibkvmi(Structure):
    """The features that libkvmi asks for are views and sub-page protection, which are not offered."""

    version: U32
    padding: U32
    spp: U8
    vmfunc: U8
    eptp: U8
    ve: U8
    singlestep: U8
    padding2: Annotated[Array[c_uint8], c_uint8 * 3]


@layout
class GetVersionReplyV12(Structure):
    """v12 has no features, but says how large a message may be."""

    version: U32
    max_msg_size: U32


@layout
class Check(Structure):
    """VM_CHECK_COMMAND and VM_CHECK_EVENT: is that id known, and allowed?"""

    id: U16
    padding1: U16
    padding2: U32


@layout
class GetInfoReply(Structure):
    """VM_GET_INFO."""

    vcpu_count: U32
    padding: Annotated[Array[c_uint32], c_uint32 * 3]


@layout
class ControlEvents(Structure):
    """VM_CONTROL_EVENTS and VCPU_CONTROL_EVENTS."""

    event_id: U16
    enable: U8
    padding1: U8
    padding2: U32


@layout
class Physical(Structure):
    """VM_READ_PHYSICAL, answered by `size` bytes, and VM_WRITE_PHYSICAL, followed by them; both stay inside one page."""

    gpa: U64
    size: U16
    padding1: U16
    padding2: U32


@layout
class VcpuGetInfoReply(Structure):
    """`tsc_speed` in Hz; 0 without TSC control."""

    tsc_speed: U64


@layout
class Pause(Structure):
    """VCPU_PAUSE; `wait` = answer only when the vCPU is out of the guest."""

    wait: U8
    padding1: U8
    padding2: U16
    padding3: U32


@layout
class PauseV12(Structure):
    """v12 made it a VM command with the vCPU in it."""

    vcpu: U16
    wait: U8
    padding1: U8
    padding2: U32


@layout
class GetRegisters(Structure):
    """VCPU_GET_REGISTERS; `nmsrs` indices of 32 bits follow."""

    nmsrs: U16
    padding1: U16
    padding2: U32


@layout
class GetRegistersReply(Structure):
    """`nmsrs` entries `MsrEntry` follow. `mode` is 2, 4 or 8: bytes of an address."""

    mode: U32
    padding: U32
    regs: Regs
    sregs: Sregs
    nmsrs: U32
    padding2: U32


@layout
class SetRegisters(Structure):
    """VCPU_SET_REGISTERS: for a vCPU that waits for an event's reply."""

    regs: Regs


@layout
class GetCpuid(Structure):
    """VCPU_GET_CPUID."""

    function: U32
    index: U32


@layout
class GetCpuidReply(Structure):
    """The guest's view of the leaf."""

    eax: U32
    ebx: U32
    ecx: U32
    edx: U32


@layout
class ControlCleanup(Structure):
    """VM_CONTROL_CLEANUP: whether interceptions are restored at unhook."""

    enable: U8
    padding1: U8
    padding2: U16
    padding3: U32


@layout
class ControlCr(Structure):
    """VCPU_CONTROL_CR: CR0, CR3 or CR4."""

    cr: U8
    enable: U8
    padding1: U16
    padding2: U32


@layout
class ControlCrLibkvmi(Structure):
    """The same, the other way round."""

    enable: U8
    padding1: U8
    padding2: U16
    cr: U32


@layout
class InjectException(Structure):
    """VCPU_INJECT_EXCEPTION; `address` is CR2 of a page fault."""

    nr: U8
    padding1: U8
    padding2: U16
    error_code: U32
    address: U64


@layout
class GetMaxGfnReply(Structure):
    """The first gfn behind all memory."""

    gfn: U64


@layout
class GetXcr(Structure):
    """VCPU_GET_XCR: XCR0."""

    xcr: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class GetXcrReply(Structure):
    """XCR0."""

    value: U64


@layout
class GetMtrrType(Structure):
    """VCPU_GET_MTRR_TYPE."""

    gpa: U64


@layout
class GetMtrrTypeReply(Structure):
    """A memory type of the SDM, vol. 3, table 12-8."""

    type: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class ControlMsr(Structure):
    """VCPU_CONTROL_MSR: an MSR of 0..1FFF or C0000000..C0001FFF."""

    enable: U8
    padding1: U8
    padding2: U16
    msr: U32


@layout
class SetPageAccess(Structure):
    """VM_SET_PAGE_ACCESS; `count` entries `PageAccessEntry` follow."""

    count: U16
    padding1: U16
    padding2: U32


@layout
class SetPageAccessLibkvmi(Structure):
    """The same with a view, of which there is one, 0."""

    view: U16
    count: U16
    padding: U32


@layout
class PageAccessEntry(Structure):
    """`visible`: whether a page that is no memory is an error."""

    gpa: U64
    access: U8
    visible: U8
    padding1: U16
    padding2: U32


@layout
class PageAccessEntryV12(Structure):
    """Without `visible`: a page that is no memory is an error."""

    gpa: U64
    access: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class ControlSinglestep(Structure):
    """VCPU_CONTROL_SINGLESTEP."""

    enable: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class TranslateGva(Structure):
    """VCPU_TRANSLATE_GVA."""

    gva: U64


@layout
class TranslateGvaReply(Structure):
    """INVALID_GPA if there is no translation."""

    gpa: U64


@layout
class ControlCmdResponse(Structure):
    """libkvmi's CONTROL_CMD_RESPONSE: whether commands are answered; `now` = this one already follows the new setting."""

    enable: U8
    now: U8
    flags: U16
    padding: U32


# --- softkvm's own -----------------------------------------------------------------------------------------------------------------


@layout
class SetBreakpoints(Structure):
    """VM_SET_BREAKPOINTS; `count` entries `BreakpointEntry` follow.

    A hidden breakpoint is the silicon's own: nothing in guest memory changes, it stops every vCPU before the instruction that starts at its
    guest-physical address, and CONTINUE runs that instruction while the breakpoint stays in force for the other vCPUs. All vCPUs obey the
    change before the answer. Errors: EINVAL, per entry as VM_SET_PAGE_ACCESS (all are tried, the first error counts); E2BIG above
    MAX_BREAKPOINTS.
    """

    count: U16
    padding1: U16
    padding2: U32


@layout
class BreakpointEntry(Structure):
    """One byte of guest-physical memory; to enable twice or to disable what is not there is no error."""

    gpa: U64
    enable: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


MAX_BREAKPOINTS = 4096


@layout
class SetEventFilter(Structure):
    """VM_SET_EVENT_FILTER; `count` entries `FilterRange` follow.

    The event is sent only if (field & mask) lies in one of the ranges, or with `except_` in none of them; an event that is not sent is
    CONTINUEd. An event may have a filter per field: all must let it through. `count` 0 removes the filter. Errors: EINVAL padding, unknown
    field, a field that the event lacks, first > last; ENOENT unknown event; EPERM event disallowed; E2BIG above MAX_FILTER_RANGES.
    """

    event_id: U16
    field: U8
    except_: U8
    count: U16
    padding: U16
    mask: U64


@layout
class FilterRange(Structure):
    """Both ends belong to the range."""

    first: U64
    last: U64


MAX_FILTER_RANGES = 256


@layout
class ReadPages(Structure):
    """VM_READ_PAGES; `count` gfns of 64 bits follow, at most MAX_READ_PAGES (else EINVAL).

    The reply may be larger than MAX_MESSAGE.
    """

    count: U16
    padding1: U16
    padding2: U32


@layout
class ReadPagesReply(Structure):
    """Bit n of `present`: page n is memory, and its 4096 bytes follow; the others are left out."""

    present: U64


MAX_READ_PAGES = 15


@layout
class GetMemoryMapReply(Structure):
    """VM_GET_MEMORY_MAP; `count` entries `MemoryRange` follow.

    Over a UNIX socket `fds` read-only descriptors travel with the reply (SCM_RIGHTS) for mmap(2); over other channels `fds` is 0.
    """

    count: U32
    fds: U32


@layout
class MemoryRange(Structure):
    """Guest-physical memory; its bytes are at `offset` of the descriptor number `fd` of the reply."""

    gpa: U64
    size: U64
    offset: U64
    fd: U32
    readonly: U32


# --- Events ------------------------------------------------------------------------------------------------------------------------


@layout
class EventMsrs(Structure):
    """The MSRs that every event carries."""

    sysenter_cs: U64
    sysenter_esp: U64
    sysenter_eip: U64
    efer: U64
    star: U64
    lstar: U64
    cstar: U64
    pat: U64
    shadow_gs: U64


@layout
class EventArch(Structure):
    """The vCPU at the event; `mode` is 2, 4 or 8. libkvmi has a view where the first padding is."""

    mode: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]
    regs: Regs
    sregs: Sregs
    msrs: EventMsrs


@layout
class EventCommon(Structure):
    """First in every event of v9 and libkvmi; `size` leads to the event's own data."""

    size: U16
    vcpu: U16
    event: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 3]
    arch: EventArch


@layout
class EventHeaderV12(Structure):
    """v12: all there is of a VM event, and before `EventCommonV12` of a vCPU's."""

    event: U16
    padding: Annotated[Array[c_uint16], c_uint16 * 3]


@layout
class EventCommonV12(Structure):
    """v12: second in every vCPU event."""

    size: U16
    vcpu: U16
    padding: U32
    arch: EventArch


@layout
class EventReply(Structure):
    """The tool's answer, behind `VcpuHeader`; the message has the event's `seq`. `event` is not looked at."""

    action: U8
    event: U8
    padding1: U16
    padding2: U32


@layout
class EventBreakpoint(Structure):
    """INT3 was executed; RIP is at it."""

    gpa: U64
    insn_len: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class EventCr(Structure):
    """A control register is about to change."""

    cr: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]
    old_value: U64
    new_value: U64


@layout
class NewValueReply(Structure):
    """What to write: of CR and MSR events."""

    new_val: U64


@layout
class EventTrap(Structure):
    """What was really injected."""

    nr: U8
    padding1: U8
    padding2: U16
    error_code: U32
    address: U64


@layout
class EventXsetbv(Structure):
    """XCR0 has changed."""

    xcr: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]
    old_value: U64
    new_value: U64


@layout
class EventDescriptor(Structure):
    """A descriptor table register is about to be read or written."""

    descriptor: U8
    write: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 6]


@layout
class EventMsr(Structure):
    """An MSR is about to change."""

    msr: U32
    padding: U32
    old_value: U64
    new_value: U64


@layout
class EventPf(Structure):
    """An access that VM_SET_PAGE_ACCESS has taken away; nothing is done yet."""

    gva: U64
    gpa: U64
    access: U8
    padding1: U8
    padding2: U16
    padding3: U32


@layout
class PfReplyLibkvmi(Structure):
    """What libkvmi adds to the reply of a PF event: data to read instead of memory's. Accepted, and must be unused."""

    ctx_addr: U64
    ctx_size: U32
    singlestep: U8
    rep_complete: U8
    padding: U16
    ctx_data: Annotated[Array[c_uint8], c_uint8 * 256]


@layout
class EventSinglestep(Structure):
    """One instruction is done, or (`failed`) something else came up."""

    failed: U8
    padding: Annotated[Array[c_uint8], c_uint8 * 7]


@layout
class EventHiddenBreakpoint(Structure):
    """The instruction at RIP is about to be executed."""

    gva: U64
    gpa: U64


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an event; `new_value` is what a register shall get, of CR and MSR events."""

    action: Action
    new_value: int = 0


# --- The table ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    """Layout of a command: `trailing` is the element type that follows the request, `trailing_reply` the one behind the reply."""

    request: type[Structure] | None = None
    reply: type[Structure] | None = None
    trailing: type[Structure] | type[c_uint8] | type[c_uint32] | type[ctypes.c_uint64] | None = None
    trailing_reply: type[Structure] | type[c_uint8] | None = None


MESSAGES: Mapping[Command, Message] = {
    Command.GET_VERSION: Message(None, GetVersionReply),
    Command.VM_CHECK_COMMAND: Message(Check),
    Command.VM_CHECK_EVENT: Message(Check),
    Command.VM_GET_INFO: Message(None, GetInfoReply),
    Command.VM_CONTROL_EVENTS: Message(ControlEvents),
    Command.VM_READ_PHYSICAL: Message(Physical, trailing_reply=c_uint8),
    Command.VM_WRITE_PHYSICAL: Message(Physical, trailing=c_uint8),
    Command.VCPU_GET_INFO: Message(None, VcpuGetInfoReply),
    Command.VCPU_PAUSE: Message(Pause),
    Command.VCPU_CONTROL_EVENTS: Message(ControlEvents),
    Command.VCPU_GET_REGISTERS: Message(GetRegisters, GetRegistersReply, trailing=c_uint32, trailing_reply=MsrEntry),
    Command.VCPU_SET_REGISTERS: Message(SetRegisters),
    Command.VCPU_GET_CPUID: Message(GetCpuid, GetCpuidReply),
    Command.VM_CONTROL_CLEANUP: Message(ControlCleanup),
    Command.VCPU_CONTROL_CR: Message(ControlCr),
    Command.VCPU_INJECT_EXCEPTION: Message(InjectException),
    Command.VM_GET_MAX_GFN: Message(None, GetMaxGfnReply),
    Command.VCPU_GET_XCR: Message(GetXcr, GetXcrReply),
    Command.VCPU_GET_XSAVE: Message(None, trailing_reply=c_uint8),
    Command.VCPU_SET_XSAVE: Message(None, trailing=c_uint8),
    Command.VCPU_GET_MTRR_TYPE: Message(GetMtrrType, GetMtrrTypeReply),
    Command.VCPU_CONTROL_MSR: Message(ControlMsr),
    Command.VM_SET_PAGE_ACCESS: Message(SetPageAccess, trailing=PageAccessEntry),
    Command.VCPU_CONTROL_SINGLESTEP: Message(ControlSinglestep),
    Command.VCPU_TRANSLATE_GVA: Message(TranslateGva, TranslateGvaReply),
    Command.VM_SET_BREAKPOINTS: Message(SetBreakpoints, trailing=BreakpointEntry),
    Command.VM_SET_EVENT_FILTER: Message(SetEventFilter, trailing=FilterRange),
    Command.VM_READ_PAGES: Message(ReadPages, ReadPagesReply, trailing=ctypes.c_uint64, trailing_reply=c_uint8),
    Command.VM_GET_MEMORY_MAP: Message(None, GetMemoryMapReply, trailing_reply=MemoryRange),
    Command.CONTROL_CMD_RESPONSE: Message(ControlCmdResponse),
}
"""v9's layouts; `Dialect.messages` has what another dialect lays out differently."""

VCPU_COMMANDS = frozenset(command for command in Command if command.name.startswith("VCPU_"))
"""Commands to one vCPU; all but VCPU_PAUSE are done by its own thread."""

ALWAYS_ALLOWED = frozenset({Command.GET_VERSION, Command.VM_CHECK_COMMAND, Command.VM_CHECK_EVENT})


@dataclass(frozen=True, slots=True)
class EventLayout:
    """An event's own data, the data of its reply, the actions it may be answered with, and the fields that a filter may look at."""

    data: type[Structure] | None = None
    reply: type[Structure] | None = None
    actions: frozenset[Action] = frozenset({Action.CONTINUE, Action.CRASH})
    filters: Mapping[FilterField, str] = field(default_factory=dict)


_ALL = frozenset(Action)
_VALUE = {FilterField.VALUE: "new_value"}
_ADDRESSES = {FilterField.GPA: "gpa", FilterField.GVA: "gva"}

EVENTS: Mapping[Event, EventLayout] = {
    Event.UNHOOK: EventLayout(actions=frozenset()),
    Event.PAUSE_VCPU: EventLayout(),
    Event.HYPERCALL: EventLayout(),
    Event.BREAKPOINT: EventLayout(EventBreakpoint, actions=_ALL, filters={FilterField.GPA: "gpa"}),
    Event.CR: EventLayout(EventCr, NewValueReply, filters={FilterField.INDEX: "cr", **_VALUE}),
    Event.TRAP: EventLayout(EventTrap),
    Event.XSETBV: EventLayout(EventXsetbv, filters=_VALUE),
    Event.DESCRIPTOR: EventLayout(EventDescriptor, actions=_ALL),
    Event.MSR: EventLayout(EventMsr, NewValueReply, filters={FilterField.INDEX: "msr", **_VALUE}),
    Event.PF: EventLayout(EventPf, actions=_ALL, filters=_ADDRESSES),
    Event.SINGLESTEP: EventLayout(EventSinglestep),
    Event.HIDDEN_BREAKPOINT: EventLayout(EventHiddenBreakpoint, actions=_ALL, filters=_ADDRESSES),
}

VM_EVENTS = frozenset({Event.UNHOOK})
"""Controlled by VM_CONTROL_EVENTS, sent without a vCPU's state, and not answered; all others are a vCPU's."""

REQUESTED_EVENTS = frozenset({Event.PAUSE_VCPU, Event.TRAP, Event.SINGLESTEP})
"""Come of a command of their own (VCPU_PAUSE, INJECT_EXCEPTION, CONTROL_SINGLESTEP), whether enabled or not."""


# --- Ioctls of the VM's descriptor -------------------------------------------------------------------------------------------------


@layout
class Hook(Structure):
    """`struct kvm_introspection_hook`; the uuid is for messages only."""

    fd: S32
    padding: U32
    uuid: Annotated[Array[c_uint8], c_uint8 * 16]


@layout
class Feature(Structure):
    """`struct kvm_introspection_feature`: allow (1) or disallow (0) a command or event by the dialect's id, -1 = all."""

    allow: U32
    id: S32


@dataclass(frozen=True, slots=True)
class Ioctls:
    """Numbers of one dialect: they tell KVM which dialect the VMM was built for."""

    capability: int
    hook: int
    unhook: int
    command: int
    event: int
    preunhook: int


def _ioctls(capability: int, hook: int, unhook: int, command: int, event: int, preunhook: int) -> Ioctls:
    hook_size, feature_size = ctypes.sizeof(Hook), ctypes.sizeof(Feature)
    plain, write = 0xAE00, 0x4000_AE00
    return Ioctls(
        capability,
        write | hook_size << 16 | hook,
        plain | unhook,
        write | feature_size << 16 | command,
        write | feature_size << 16 | event,
        plain | preunhook,
    )


# --- Dialects ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a peer numbers commands and events, and where its layouts differ from v9's."""

    name: str
    commands: Mapping[Command, int]
    events: Mapping[Event, int]
    vm_event: int
    vcpu_event: int
    event_reply: int
    ioctls: Ioctls
    messages: Mapping[Command, Message]
    event_replies: Mapping[Event, type[Structure]]
    by_id: Mapping[int, Command]
    event_by_id: Mapping[int, Event]
    vcpu_commands: frozenset[Command]
    """Commands that begin with `VcpuHeader`."""
    split_ids: bool
    """v12: events have `EventHeaderV12` first."""

    def reply_layout(self, event: Event) -> type[Structure] | None:
        """What may follow `EventReply` for that event."""
        return self.event_replies.get(event) or EVENTS[event].reply


def _dialect(
    name: str,
    commands: Mapping[Command, int],
    events: Mapping[Event, int],
    message_ids: tuple[int, int, int],
    ioctls: Ioctls,
    messages: Mapping[Command, Message] | None = None,
    event_replies: Mapping[Event, type[Structure]] | None = None,
    split_ids: bool = False,
) -> Dialect:
    commands = {**commands, **{command: int(command) for command in Command if EXTENSION <= command < 1 << 16}}
    events = {**events, Event.HIDDEN_BREAKPOINT: int(Event.HIDDEN_BREAKPOINT)}
    return Dialect(
        name,
        commands,
        events,
        *message_ids,
        ioctls,
        {**MESSAGES, **(messages or {})},
        event_replies or {},
        {number: command for command, number in commands.items()},
        {number: event for event, number in events.items()},
        VCPU_COMMANDS - {Command.VCPU_PAUSE} if split_ids else VCPU_COMMANDS,
        split_ids,
    )


V9 = _dialect(
    "v9",
    {command: int(command) for command in Command if command < NUM_MESSAGES},
    {event: int(event) for event in Event if event < NUM_EVENTS},
    (0, 0, 0),
    _ioctls(184, hook=0xC3, unhook=0xC4, command=0xC5, event=0xC6, preunhook=0xC7),
)

LIBKVMI = _dialect(
    "libkvmi",
    {
        Command.GET_VERSION: 2,
        Command.VM_CHECK_COMMAND: 3,
        Command.VM_CHECK_EVENT: 4,
        Command.VM_GET_INFO: 5,
        Command.VCPU_GET_INFO: 6,
        Command.VCPU_PAUSE: 7,
        Command.VM_CONTROL_EVENTS: 8,
        Command.VCPU_CONTROL_EVENTS: 9,
        Command.VCPU_CONTROL_CR: 10,
        Command.VCPU_CONTROL_MSR: 11,
        Command.VCPU_GET_REGISTERS: 13,
        Command.VCPU_SET_REGISTERS: 14,
        Command.VCPU_GET_CPUID: 15,
        Command.VCPU_GET_XSAVE: 16,
        Command.VM_READ_PHYSICAL: 17,
        Command.VM_WRITE_PHYSICAL: 18,
        Command.VCPU_INJECT_EXCEPTION: 19,
        Command.VM_SET_PAGE_ACCESS: 21,
        Command.VCPU_GET_MTRR_TYPE: 23,
        Command.CONTROL_CMD_RESPONSE: 27,
        Command.VM_GET_MAX_GFN: 29,
        Command.VCPU_TRANSLATE_GVA: 35,
        Command.VCPU_GET_XCR: 37,
        Command.VCPU_SET_XSAVE: 38,
        Command.VCPU_CONTROL_SINGLESTEP: 63,
    },
    {
        Event.UNHOOK: 0,
        Event.CR: 1,
        Event.MSR: 2,
        Event.XSETBV: 3,
        Event.BREAKPOINT: 4,
        Event.HYPERCALL: 5,
        Event.PF: 6,
        Event.TRAP: 7,
        Event.DESCRIPTOR: 8,
        Event.PAUSE_VCPU: 10,
        Event.SINGLESTEP: 11,
    },
    (1, 1, 0),
    _ioctls(180, hook=0xFF, unhook=0xFB, command=0xFD, event=0xFC, preunhook=0xFE),
    {
        Command.GET_VERSION: Message(None, GetVersionReplyLibkvmi),
        Command.VCPU_CONTROL_CR: Message(ControlCrLibkvmi),
        Command.VM_SET_PAGE_ACCESS: Message(SetPageAccessLibkvmi, trailing=PageAccessEntry),
    },
    {Event.PF: PfReplyLibkvmi},
)

V12 = _dialect(
    "v12",
    {
        Command.GET_VERSION: 2,
        Command.VM_CHECK_COMMAND: 4,
        Command.VM_CHECK_EVENT: 6,
        Command.VM_GET_INFO: 8,
        Command.VM_CONTROL_EVENTS: 10,
        Command.VM_READ_PHYSICAL: 12,
        Command.VM_WRITE_PHYSICAL: 14,
        Command.VCPU_PAUSE: 16,
        Command.VM_CONTROL_CLEANUP: 18,
        Command.VM_SET_PAGE_ACCESS: 20,
        Command.VCPU_GET_INFO: 3,
        Command.VCPU_CONTROL_EVENTS: 5,
        Command.VCPU_GET_REGISTERS: 7,
        Command.VCPU_SET_REGISTERS: 9,
        Command.VCPU_GET_CPUID: 11,
        Command.VCPU_CONTROL_CR: 13,
        Command.VCPU_INJECT_EXCEPTION: 15,
        Command.VCPU_GET_XCR: 17,
        Command.VCPU_GET_XSAVE: 19,
        Command.VCPU_SET_XSAVE: 21,
        Command.VCPU_GET_MTRR_TYPE: 23,
        Command.VCPU_CONTROL_MSR: 25,
        Command.VCPU_CONTROL_SINGLESTEP: 27,
        Command.VCPU_TRANSLATE_GVA: 29,
    },
    {
        Event.UNHOOK: 0,
        Event.PAUSE_VCPU: 1,
        Event.HYPERCALL: 3,
        Event.BREAKPOINT: 5,
        Event.CR: 7,
        Event.TRAP: 9,
        Event.XSETBV: 11,
        Event.DESCRIPTOR: 13,
        Event.MSR: 15,
        Event.PF: 17,
        Event.SINGLESTEP: 19,
    },
    (0, 1, 1),
    _ioctls(206, hook=0xC8, unhook=0xC9, command=0xCA, event=0xCB, preunhook=0xCC),
    {
        Command.GET_VERSION: Message(None, GetVersionReplyV12),
        Command.VCPU_PAUSE: Message(PauseV12),
        Command.VM_SET_PAGE_ACCESS: Message(SetPageAccess, trailing=PageAccessEntryV12),
    },
    split_ids=True,
)

DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (V9, LIBKVMI, V12)}


# --- The VMM's handshake with the tool, before KVM gets the socket ---------------------------------------------------------------------


@layout
class HandshakeToTool(Structure):
    """QEMU's `qemu_vmi_to_introspector`, sent first; `struct_size` counts itself, and a longer one is read and its tail ignored."""

    struct_size: U32
    uuid: Annotated[Array[c_uint8], c_uint8 * 16]
    padding: U32
    start_time: S64
    name: Annotated[Array[c_char], c_char * 64]


@layout
class HandshakeToToolV12(Structure):
    """The same with the highest guest-physical address."""

    base: HandshakeToTool
    max_gpa: U64


@layout
class HandshakeFromTool(Structure):
    """QEMU's `qemu_vmi_from_introspector`: SHA-1 of the shared secret, zeros without one."""

    struct_size: U32
    cookie_hash: Annotated[Array[c_uint8], c_uint8 * 20]


HANDSHAKE_MAX = 65536
