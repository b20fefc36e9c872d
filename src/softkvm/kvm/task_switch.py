"""Hardware task switches, which always leave the guest: KVM does them.

Answers to `emulator_do_task_switch()` and `__load_segment_descriptor()` of Linux 6.1 `arch/x86/kvm/emulate.c`, to `handle_task_switch()` of
`vmx/vmx.c` and `task_switch_interception()` of `svm/svm.c`; SDM vol. 3, ch. 7 and 26.4.2. The silicon has checked the gate or descriptor
that led to the exit, but for the TSS of the new task.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from softkvm.kvm import cr, events, exits, regs
from softkvm.kvm.memslots import PAGE_SIZE
from softkvm.kvm.regs import CS, DS, ES, FS, GS, LDTR, SS, TR
from softkvm.silicon import RIGHT_R, RIGHT_W

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

CALL, IRET, JMP, GATE = range(4)
"""What started a switch, as VMX's exit qualification numbers it."""

_RFLAGS_FIXED, _RFLAGS_NT, _RFLAGS_VM = 1 << 1, 1 << 14, 1 << 17
_RFLAGS_KNOWN = 0x3F_7FD7
_DR7_LOCAL = 0x155
"""L0 to L3 and LE, which a switch clears."""
_RSP = 4
_USER = 8
"""`Core.translate`: an access by user mode."""
_U16, _U32 = 0xFFFF, 0xFFFF_FFFF

_TYPE_AT = 5
"""Offset of a descriptor's type byte."""
_ACCESSED, _RW, _DC, _CODE, _S = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 4
_BUSY = 1 << 1
_TSS_32 = 1 << 3
_LDT = 2
_PRESENT, _DB, _GRANULARITY, _UNUSABLE = 1 << 7, 1 << 14, 1 << 15, 1 << 16
_VIRTUAL_8086 = _PRESENT | 3 << 5 | _S | _RW | _ACCESSED


class _Format(NamedTuple):
    """Where a TSS has the task: EIP, EFLAGS and general registers in the order of their numbers; selectors; LDT; CR3 (0: none)."""

    registers: struct.Struct
    registers_at: int
    selectors: struct.Struct
    selectors_at: int
    segments: tuple[int, ...]
    ldt_at: int
    cr3_at: int
    size: int
    word: int


_FORMAT_32 = _Format(struct.Struct("<10I"), 32, struct.Struct("<" + 6 * "H2x"), 72, (ES, CS, SS, DS, FS, GS), 96, 28, 0x68, 4)
_FORMAT_16 = _Format(struct.Struct("<10H"), 14, struct.Struct("<4H"), 34, (ES, CS, SS, DS), 42, 0, 0x2C, 2)


class _Fault(Exception):
    """What the switch raises in the guest."""

    def __init__(self, vector: int, error_code: int, address: int | None = None) -> None:
        super().__init__(vector)
        self.vector, self.error_code, self.address = vector, error_code, address


@dataclass(frozen=True)
class _Descriptor:
    """Eight bytes of a descriptor table, and where they are."""

    value: int
    address: int

    @property
    def rights(self) -> int:
        """As `Segment.access_rights`."""
        return self.value >> 40 & 0xF0FF

    @property
    def type(self) -> int:
        """Type field."""
        return self.rights & 0xF

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return self.rights >> 5 & 3

    @property
    def base(self) -> int:
        """Base address."""
        return self.value >> 16 & 0xFF_FFFF | self.value >> 32 & 0xFF00_0000

    @property
    def limit(self) -> int:
        """Limit in bytes."""
        limit = self.value & 0xFFFF | self.value >> 32 & 0xF_0000
        return limit << 12 | 0xFFF if self.rights & _GRANULARITY else limit


# --- Exits -------------------------------------------------------------------------------------------------------------------------------


def handle(vcpu: Vcpu, selector: int, reason: int) -> int:
    """A switch to the task of `selector`, as an exit handler. An event whose delivery led here by a task gate has arrived with it."""
    info = vcpu.exit
    delivers = reason == GATE and info.vectoring & events.EVENT_VALID
    error_code = info.vectoring_error if delivers and info.vectoring & events.HAS_ERROR else None
    if delivers:
        _forget_event(vcpu)
        if info.vectoring & events.TYPE_MASK == events.TYPE_NMI:
            vcpu.state.interruptibility |= events.BLOCKED_BY_NMI
    if not delivers or events.is_soft(info.vectoring):
        result = exits.skip(vcpu)
        if result <= 0:
            return result
    try:
        _switch(vcpu, selector, reason, error_code)
    except _Fault as fault:
        events.queue_exception(vcpu, fault.vector, fault.error_code, fault.address)
    return 1


def _forget_event(vcpu: Vcpu) -> None:
    queue = vcpu.events
    queue.exception_injected = queue.interrupt_injected = queue.nmi_injected = False


# --- The switch --------------------------------------------------------------------------------------------------------------------------


def _switch(vcpu: Vcpu, selector: int, reason: int, error_code: int | None) -> None:
    state = vcpu.state
    old = state.segments[TR]
    old_selector, old_base = old.selector, old.base
    new = _descriptor(vcpu, selector, events.TS)
    layout = _FORMAT_32 if new.type & _TSS_32 else _FORMAT_16
    if not new.rights & _PRESENT:
        raise _Fault(events.NP, selector & ~3)
    if new.limit < layout.size - 1:
        raise _Fault(events.TS, selector & ~3)
    if reason in (IRET, JMP):
        _set_type(vcpu, _descriptor(vcpu, old_selector, events.TS), busy=False)
    if reason == IRET:
        state.rflags &= ~_RFLAGS_NT
    _save(vcpu, old_base, _FORMAT_32 if old.access_rights & _TSS_32 else _FORMAT_16)
    if reason in (CALL, GATE):
        _write(vcpu, new.base, struct.pack("<H", old_selector))
    if reason != IRET:
        _set_type(vcpu, new, busy=True)
    state.cr0 |= cr.CR0_TS
    tr = state.segments[TR]
    tr.selector, tr.access_rights, tr.limit, tr.base = selector & _U16, new.rights | _BUSY, new.limit, new.base
    vcpu.debug_registers.dr7 &= ~_DR7_LOCAL
    _load(vcpu, new.base, layout, nested=reason in (CALL, GATE))
    if error_code is not None:
        _push(vcpu, error_code, layout.word)


def _save(vcpu: Vcpu, base: int, layout: _Format) -> None:
    """The task that stops: all but CR3 and the LDT, which a task keeps for life."""
    state = vcpu.state
    mask = _U32 if layout.word == 4 else _U16
    values = [state.rip, state.rflags, *state.gpr[:8]]
    _write(vcpu, base + layout.registers_at, layout.registers.pack(*(value & mask for value in values)))
    selectors = layout.selectors.pack(*(state.segments[number].selector for number in layout.segments))
    _write(vcpu, base + layout.selectors_at, selectors)


def _load(vcpu: Vcpu, base: int, layout: _Format, nested: bool) -> None:
    """The task that runs: what raises a fault from here on raises it in the new task."""
    state = vcpu.state
    image = _read(vcpu, base, layout.size)
    rip, flags, *general = layout.registers.unpack_from(image, layout.registers_at)
    selectors = layout.selectors.unpack_from(image, layout.selectors_at)
    (ldt,) = struct.unpack_from("<H", image, layout.ldt_at)
    if layout.cr3_at and state.cr0 & regs.CR0_PG:
        cr3 = struct.unpack_from("<I", image, layout.cr3_at)[0]
        if cr.refuses(vcpu, 3, cr3) or not cr.load(vcpu, 3, cr3):
            raise _Fault(events.GP, 0)
    state.rip, state.rflags = rip, (flags | _RFLAGS_FIXED | (_RFLAGS_NT if nested else 0)) & _RFLAGS_KNOWN
    upper = 0 if layout.word == 4 else _U32 & ~_U16
    for number, value in enumerate(general):
        state.gpr[number] = state.gpr[number] & upper | value
    for number, selector in ((LDTR, ldt), *zip(layout.segments, selectors, strict=True)):
        segment = state.segments[number]
        segment.selector, segment.access_rights = selector, segment.access_rights | _UNUSABLE
    virtual = bool(flags & _RFLAGS_VM and layout.word == 4)
    level = 3 if virtual else selectors[layout.segments.index(CS)] & 3
    _load_segment(vcpu, LDTR, ldt, level, False)
    for number, selector in zip(layout.segments, selectors, strict=True):
        _load_segment(vcpu, number, selector, level, virtual)
    for number in {FS, GS} - set(layout.segments):
        _load_segment(vcpu, number, 0, level, False)


def _load_segment(vcpu: Vcpu, number: int, selector: int, level: int, virtual: bool) -> None:
    segment = vcpu.state.segments[number]
    segment.selector = selector
    if virtual:
        segment.access_rights, segment.limit, segment.base = _VIRTUAL_8086, _U16, selector << 4
        return
    if not selector & ~3:
        if number in (CS, SS):
            raise _Fault(events.TS, 0)
        segment.access_rights, segment.limit, segment.base = _UNUSABLE, 0, 0
        return
    descriptor = _descriptor(vcpu, selector, events.TS)
    if not _fits(descriptor, number, selector & 3, level):
        raise _Fault(events.TS, selector & ~3)
    if not descriptor.rights & _PRESENT:
        raise _Fault(events.SS if number == SS else events.NP, selector & ~3)
    rights = descriptor.rights
    if rights & _S and not rights & _ACCESSED:
        rights |= _ACCESSED
        _write(vcpu, descriptor.address + _TYPE_AT, bytes((rights & 0xFF,)))
    segment.access_rights, segment.limit, segment.base = rights, descriptor.limit, descriptor.base


def _fits(descriptor: _Descriptor, number: int, rpl: int, level: int) -> bool:
    """Whether the segment register may hold the descriptor at privilege `level`."""
    kind, dpl = descriptor.type, descriptor.dpl
    if number == LDTR:
        return not descriptor.rights & _S and kind == _LDT
    if not descriptor.rights & _S:
        return False
    if number == SS:
        return rpl == dpl == level and kind & (_CODE | _RW) == _RW
    if number == CS:
        return bool(kind & _CODE) and (dpl <= level if kind & _DC else dpl == level)
    if kind & (_CODE | _RW) == _CODE:
        return False
    return kind & (_CODE | _DC) == _CODE | _DC or max(rpl, level) <= dpl


def _push(vcpu: Vcpu, value: int, size: int) -> None:
    """An error code on the new task's stack."""
    state = vcpu.state
    stack = state.segments[SS]
    mask = _U32 if stack.access_rights & _DB else _U16
    pointer = state.gpr[_RSP] - size & mask
    _write(vcpu, stack.base + pointer, value.to_bytes(4, "little")[:size], user=regs.cpl(vcpu) == 3)
    state.gpr[_RSP] = state.gpr[_RSP] & ~mask | pointer


# --- Tables and memory -------------------------------------------------------------------------------------------------------------------


def _descriptor(vcpu: Vcpu, selector: int, vector: int) -> _Descriptor:
    """The descriptor of `selector`; `vector` if it is in no table."""
    state = vcpu.state
    local = selector & 4
    table = state.segments[LDTR] if local else state.gdtr
    unusable = local and state.segments[LDTR].access_rights & _UNUSABLE
    if unusable or (selector & ~7) + 7 > table.limit:
        raise _Fault(vector, selector & ~3 & _U16)
    address = table.base + (selector & ~7 & _U16)
    return _Descriptor(int.from_bytes(_read(vcpu, address, 8), "little"), address)


def _set_type(vcpu: Vcpu, descriptor: _Descriptor, busy: bool) -> None:
    """Mark a TSS descriptor busy or available in its table."""
    rights = descriptor.rights | _BUSY if busy else descriptor.rights & ~_BUSY
    _write(vcpu, descriptor.address + _TYPE_AT, bytes((rights & 0xFF,)))


def _pieces(vcpu: Vcpu, address: int, size: int, access: int) -> list[tuple[int, int]]:
    """(GPA, bytes) of a linear range of the guest; #PF where it has none."""
    pieces = []
    while size:
        address &= _U32
        count = min(size, PAGE_SIZE - address % PAGE_SIZE)
        gpa = vcpu.translate_gva(address, access)
        if gpa is None:
            raise _Fault(events.PF, access & RIGHT_W, address)
        pieces.append((gpa, count))
        address, size = address + count, size - count
    return pieces


def _read(vcpu: Vcpu, address: int, size: int) -> bytes:
    """Guest memory as the CPU itself reads it; #PF also for what is no RAM."""
    try:
        return b"".join(vcpu.vm.memory.read(gpa, count) for gpa, count in _pieces(vcpu, address, size, RIGHT_R))
    except OSError:
        raise _Fault(events.PF, 0, address) from None


def _write(vcpu: Vcpu, address: int, data: bytes, user: bool = False) -> None:
    """Guest memory as the CPU itself writes it."""
    try:
        for gpa, count in _pieces(vcpu, address, len(data), RIGHT_W | (_USER if user else 0)):
            vcpu.vm.memory.write(gpa, data[:count])
            data = data[count:]
    except OSError:
        raise _Fault(events.PF, RIGHT_W, address) from None
