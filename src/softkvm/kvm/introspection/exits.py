"""VM exits while a tool is hooked: the events that it asked for, and behind them what KVM does anyway.

Answers to the calls of `kvmi_*_event()` in `x86.c`, `vmx.c` and `svm.c` of "VM introspection" v9, patches 60-81. A vCPU that is
introspected has these handlers in its table in place of the vendor's (`overlay()`); one that is not pays nothing. Each handler here gets
the plain one, and returns what exit handlers return.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from softkvm.kvm import cr, events, exits, msr, regs, waive
from softkvm.kvm.introspection import svm, vmx
from softkvm.kvm.introspection.facts import Facts, Hook
from softkvm.silicon import EXIT_ACCESS, EXIT_BREAKPOINT, EXIT_EMULATED, RIGHT_R, RIGHT_W
from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Action, Event

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vendor import Handler

_VENDORS: dict[str, Facts] = {"intel": vmx, "amd": svm}
_U32 = 0xFFFF_FFFF


def overlay(vcpu: Vcpu, handlers: Mapping[int, Handler]) -> dict[int, Handler]:
    """The table of a vCPU that is introspected, made of the one that it would have."""
    facts = _VENDORS[vcpu.model.vendor]
    table = dict(handlers)
    for reason, hook in facts.hooks(_HOOKS).items():
        table[reason] = partial(hook, plain=handlers.get(reason, partial(vcpu.vendor.handle_unknown, reason=reason)))
    table[EXIT_ACCESS] = partial(_access, plain=handlers[EXIT_ACCESS])
    table[EXIT_BREAKPOINT] = _hidden_breakpoint
    introspection = vcpu.introspection
    if introspection is not None and introspection.singlestep:
        quiet = {EXIT_ACCESS, EXIT_EMULATED, *facts.undisturbed}
        table = {reason: handler if reason in quiet else partial(_step_failed, plain=handler) for reason, handler in table.items()}
    return table


# --- Memory ------------------------------------------------------------------------------------------------------------------------


def _page(vcpu: Vcpu, gpa: int, gva: int, access: int, walk: bool, plain: Handler) -> int:
    """The nested page tables refused an access."""
    result = waive.violation(vcpu, gpa, gva, access, walk)
    return plain(vcpu) if result is None else result


def _access(vcpu: Vcpu, plain: Handler) -> int:
    """An emulated instruction wants memory that it may not have: a device's, or a tracked page's."""
    access = vcpu.exit.access
    return _page(vcpu, access.gpa, vcpu.exit.gla, RIGHT_W if access.write else RIGHT_R, False, plain)


def _hidden_breakpoint(vcpu: Vcpu) -> int:
    """The silicon stopped before an instruction of `NestedPageTable.set_breakpoints()`."""
    introspection = vcpu.introspection
    if introspection is not None and Event.HIDDEN_BREAKPOINT in introspection.enabled:
        data = kvmi.EventHiddenBreakpoint(gva=vcpu.exit.gla, gpa=vcpu.exit.gpa)
        if introspection.session.filters.passes(vcpu, Event.HIDDEN_BREAKPOINT, data):
            rip = vcpu.state.rip
            reply = introspection.ask(Event.HIDDEN_BREAKPOINT, data)
            if reply.action is Action.CRASH:
                return introspection.crash()
            if reply.action is Action.RETRY or vcpu.state.rip != rip:
                return 1
    waive.hold(vcpu)
    return 1


# --- Registers ---------------------------------------------------------------------------------------------------------------------


def _write_cr(vcpu: Vcpu, number: int, value: int, plain: Handler) -> int:
    """MOV to CR0, CR3 or CR4, or LMSW."""
    introspection = vcpu.introspection
    if introspection is None or number not in introspection.control_registers:
        return plain(vcpu)
    if cr.refuses(vcpu, number, value):
        events.inject_gp(vcpu)
        return 1
    keep = 0
    if number == 3 and vcpu.state.cr4 & regs.CR4_PCIDE:
        keep, value = value & cr.NO_FLUSH, value & ~cr.NO_FLUSH
    old, rip = cr.read(vcpu, number), vcpu.state.rip
    if value != old and Event.CR in introspection.enabled:
        data = kvmi.EventCr(cr=number, old_value=old, new_value=value)
        if introspection.session.filters.passes(vcpu, Event.CR, data):
            reply = introspection.ask(Event.CR, data)
            if reply.action is Action.CRASH:
                return introspection.crash()
            value = reply.new_value
    if cr.refuses(vcpu, number, value) or not cr.load(vcpu, number, value | keep):
        events.inject_gp(vcpu)
        return 1
    return exits.skip(vcpu) if vcpu.state.rip == rip else 1


def _write_msr(vcpu: Vcpu, plain: Handler) -> int:
    """WRMSR."""
    introspection, gpr = vcpu.introspection, vcpu.gpr
    index, value = gpr[regs.RCX] & _U32, (gpr[regs.RDX] & _U32) << 32 | gpr[regs.RAX] & _U32
    if introspection is None or index not in introspection.msrs or Event.MSR not in introspection.enabled:
        return plain(vcpu)
    try:
        old = msr.get(vcpu, index, True)
    except msr.MsrError:
        return plain(vcpu)
    data = kvmi.EventMsr(msr=index, old_value=old, new_value=value)
    if old == value or not introspection.session.filters.passes(vcpu, Event.MSR, data):
        return plain(vcpu)
    rip = vcpu.state.rip
    reply = introspection.ask(Event.MSR, data)
    if reply.action is Action.CRASH:
        return introspection.crash()
    try:
        msr.set(vcpu, index, reply.new_value, False)
    except msr.MsrError:
        events.inject_gp(vcpu)
        return 1
    return exits.skip(vcpu) if vcpu.state.rip == rip else 1


def _xsetbv(vcpu: Vcpu, plain: Handler) -> int:
    """XSETBV: the tool is told when it is done."""
    introspection, old, rip = vcpu.introspection, vcpu.state.xcr0, vcpu.state.rip
    if introspection is None or Event.XSETBV not in introspection.enabled:
        return plain(vcpu)
    if not exits.execute_xsetbv(vcpu):
        return 1
    data = kvmi.EventXsetbv(xcr=0, old_value=old, new_value=vcpu.state.xcr0)
    tell = data.new_value != old and introspection.session.filters.passes(vcpu, Event.XSETBV, data)
    if tell and introspection.ask(Event.XSETBV, data).action is Action.CRASH:
        return introspection.crash()
    return exits.skip(vcpu) if vcpu.state.rip == rip else 1


def _descriptor(vcpu: Vcpu, descriptor: int, write: bool, plain: Handler) -> int:
    """SGDT, SIDT, SLDT, STR and the loads: the silicon executes the instruction afterwards."""
    introspection, rip = vcpu.introspection, vcpu.state.rip
    if introspection is not None and Event.DESCRIPTOR in introspection.enabled:
        data = kvmi.EventDescriptor(descriptor=descriptor, write=write)
        if introspection.session.filters.passes(vcpu, Event.DESCRIPTOR, data):
            reply = introspection.ask(Event.DESCRIPTOR, data)
            if reply.action is Action.CRASH:
                return introspection.crash()
            if reply.action is Action.RETRY or vcpu.state.rip != rip:
                return 1
    waive.hold(vcpu)
    return 1


# --- Instructions ------------------------------------------------------------------------------------------------------------------


def _breakpoint(vcpu: Vcpu, length: int, plain: Handler) -> int:
    """INT3: the guest gets its #BP, unless the tool has placed the instruction."""
    introspection = vcpu.introspection
    if introspection is None or Event.BREAKPOINT not in introspection.enabled:
        return plain(vcpu)
    state, rip = vcpu.state, vcpu.state.rip
    gpa = vcpu.translate_gva(regs.linear_rip(vcpu), RIGHT_R)
    data = kvmi.EventBreakpoint(gpa=kvmi.INVALID_GPA if gpa is None else gpa, insn_len=length)
    if introspection.session.filters.passes(vcpu, Event.BREAKPOINT, data):
        reply = introspection.ask(Event.BREAKPOINT, data)
        if reply.action is Action.CRASH:
            return introspection.crash()
        if reply.action is Action.RETRY or state.rip != rip:
            return 1
    vcpu.events.instruction_length = length
    events.queue_exception(vcpu, events.BP)
    return 1


def hypercall(vcpu: Vcpu) -> int | None:
    """The tool's hypercall: 0 if the event was sent, None if nobody wanted it. A negative result means that the VM ends."""
    introspection = vcpu.introspection
    if introspection is None or Event.HYPERCALL not in introspection.enabled:
        return None
    gpr = vcpu.gpr
    long_mode = regs.is_64_bit_mode(vcpu)
    function, argument = (gpr[regs.RDI], gpr[regs.RSI]) if long_mode else (gpr[regs.RBX] & _U32, gpr[regs.RCX] & _U32)
    if (function, argument) != (kvmi.HYPERCALL_FUNCTION, 0) or not introspection.session.filters.passes(vcpu, Event.HYPERCALL, None):
        return None
    return -1 if introspection.ask(Event.HYPERCALL).action is Action.CRASH else 0


def _hypercall(vcpu: Vcpu, plain: Handler) -> int:
    """VMCALL, VMMCALL."""
    if vcpu.gpr[regs.RAX] & _U32 != kvmi.HYPERCALL_NUMBER:
        return plain(vcpu)
    rip = vcpu.state.rip
    result = hypercall(vcpu)
    if result is None:
        return plain(vcpu)
    if result < 0 and vcpu.introspection is not None:
        return vcpu.introspection.crash()
    if vcpu.state.rip != rip:
        return 1
    vcpu.gpr[regs.RAX] = 0
    return exits.skip(vcpu)


def _step(vcpu: Vcpu, plain: Handler) -> int:
    """The monitor trap flag: one instruction is done."""
    introspection = vcpu.introspection
    if introspection is None or not introspection.singlestep:
        return plain(vcpu)
    return _tell_step(vcpu, failed=False) or 1


def _step_failed(vcpu: Vcpu, plain: Handler) -> int:
    """Something else came up while the tool was stepping: it hears of it first."""
    result = _tell_step(vcpu, failed=True)
    return plain(vcpu) if result is None else result


def _tell_step(vcpu: Vcpu, failed: bool) -> int | None:
    introspection = vcpu.introspection
    data = kvmi.EventSinglestep(failed=failed)
    if introspection is None or not introspection.session.filters.passes(vcpu, Event.SINGLESTEP, data):
        return None
    if introspection.ask(Event.SINGLESTEP, data).action is Action.CRASH:
        return introspection.crash()
    return None


_HOOKS = Hook(
    page=_page,
    write_cr=_write_cr,
    write_msr=_write_msr,
    xsetbv=_xsetbv,
    descriptor=_descriptor,
    breakpoint=_breakpoint,
    hypercall=_hypercall,
    step=_step,
)
