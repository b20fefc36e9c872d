"""KVM_SET_GUEST_DEBUG: user space steps through the guest, and has its breakpoints in the silicon's debug registers.

Answers to Linux 6.1 `kvm_arch_vcpu_ioctl_set_guest_debug()`, `kvm_vcpu_do_singlestep()` and `kvm_{get,set}_dr()` in `arch/x86/kvm/x86.c`,
and to `handle_dr()`, `handle_exception_nmi()` and `{db,bp}_interception()` of the vendor modules. While a debugger steps or has breakpoints
in the silicon, the guest's own debug registers are kept aside, and its accesses to them are KVM's work.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from softkvm.kvm import events, exits, regs
from softkvm.kvm.request import REQ_APICV_UPDATE
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_ALL = 0xFF
"""Every debug register, in `Control.dr_read` and `dr_write`."""
_STEPS, _HW_BP, _SW_BP = uapi.KVM_GUESTDBG_SINGLESTEP, uapi.KVM_GUESTDBG_USE_HW_BP, uapi.KVM_GUESTDBG_USE_SW_BP
_DR6_BD = 1 << 13
_DR6_BITS, _DR7_BITS, _DR7_FIXED = 0xE00F, 0xFFFF_2BFF, 1 << 10
_CR4_DE = 1 << 3


@dataclass
class DebugRegisters:
    """The guest's own debug registers while the silicon has others."""

    dr: list[int] = field(default_factory=lambda: [0] * 4)
    dr6: int = events.DR6_FIXED
    dr7: int = _DR7_FIXED


def set_guest_debug(vcpu: Vcpu, request: uapi.GuestDebug) -> None:
    """KVM_SET_GUEST_DEBUG; OSError(EBUSY) for an exception to inject while one waits, or breakpoints that an introspection tool has."""
    control = request.control
    tool = vcpu.introspection
    if control & uapi.KVM_GUESTDBG_ENABLE and control & _SW_BP and tool is not None and tool.intercepts_breakpoints:
        raise OSError(errno.EBUSY, "an introspection tool has the guest's breakpoints")
    if control & (uapi.KVM_GUESTDBG_INJECT_DB | uapi.KVM_GUESTDBG_INJECT_BP):
        if vcpu.events.exception_pending or vcpu.events.exception_injected:
            raise OSError(errno.EBUSY, "an exception waits already")
        events.queue_exception(vcpu, events.DB if control & uapi.KVM_GUESTDBG_INJECT_DB else events.BP)
    detach(vcpu)
    if control & uapi.KVM_GUESTDBG_ENABLE:
        _attach(vcpu, control, request)


def detach(vcpu: Vcpu) -> None:
    """The guest has its debug registers and its trap flag for itself again."""
    state, own, control = vcpu.state, vcpu.debug_registers, vcpu.guest_debug
    if own is not state:
        state.dr[:] = own.dr[:]
        state.dr6, state.dr7 = own.dr6, own.dr7
        vcpu.debug_registers = state
    if control & _STEPS:
        state.rflags &= ~events.RFLAGS_TF
    vcpu.control.dr_read = vcpu.control.dr_write = 0
    vcpu.guest_debug = 0
    vcpu.make_request(REQ_APICV_UPDATE)
    vcpu.update_exception_bitmap()


def _attach(vcpu: Vcpu, control: int, request: uapi.GuestDebug) -> None:
    state = vcpu.state
    vcpu.guest_debug = control
    vcpu.make_request(REQ_APICV_UPDATE)
    vcpu.update_exception_bitmap()
    if not control & (_STEPS | _HW_BP):
        return
    vcpu.debug_registers = DebugRegisters(list(state.dr), state.dr6, state.dr7)
    vcpu.control.dr_read = vcpu.control.dr_write = _ALL
    if control & _HW_BP:
        state.dr[:] = request.debugreg[:4]
        state.dr7 = request.debugreg[7] & _DR7_BITS | _DR7_FIXED
    state.dr6 = events.DR6_FIXED
    if control & _STEPS:
        _step(vcpu)


def exceptions(control: int) -> int:
    """What a debugger (KVM_GUESTDBG_*) must see."""
    return (1 << events.DB if control & (_STEPS | _HW_BP) else 0) | (1 << events.BP if control & _SW_BP else 0)


def _step(vcpu: Vcpu) -> None:
    """Trap behind the next instruction, whatever shadow it is in: one of MOV SS or STI would hold the trap back."""
    vcpu.state.rflags |= events.RFLAGS_TF
    vcpu.state.interruptibility &= ~events.SHADOW


def visible_rflags(vcpu: Vcpu) -> int:
    """`kvm_get_rflags()`: without the debugger's trap flag."""
    rflags: int = vcpu.state.rflags
    return rflags & ~events.RFLAGS_TF if vcpu.guest_debug & _STEPS else rflags


def set_rflags(vcpu: Vcpu, rflags: int) -> None:
    """`kvm_set_rflags()`: with it."""
    vcpu.state.rflags = rflags | regs.RFLAGS_FIXED | (events.RFLAGS_TF if vcpu.guest_debug & _STEPS else 0)


# --- Exits -------------------------------------------------------------------------------------------------------------------------


def handle_db(vcpu: Vcpu, dr6: int) -> int:
    """An intercepted #DB with the conditions `dr6`: a step, a breakpoint of the debugger's or, while it is there, of the guest's."""
    if vcpu.guest_debug & (_STEPS | _HW_BP):
        return exit_debug(vcpu, events.DB, dr6)
    events.queue_exception(vcpu, events.DB, payload=dr6 & ~events.DR6_FIXED)
    return 1


def handle_bp(vcpu: Vcpu) -> int:
    """An intercepted INT3."""
    vcpu.events.instruction_length = vcpu.exit.instruction_length
    return exit_debug(vcpu, events.BP, 0)


def exit_debug(vcpu: Vcpu, exception: int, dr6: int) -> int:
    """KVM_EXIT_DEBUG."""
    shared, state = vcpu.kvm_run.debug, vcpu.state
    shared.exception, shared.pc = exception, regs.linear_rip(vcpu)
    shared.dr6, shared.dr7 = dr6 | events.DR6_FIXED if exception == events.DB else 0, state.dr7
    if vcpu.debug_registers is not state:
        state.dr6 = events.DR6_FIXED
    if vcpu.guest_debug & _STEPS:
        _step(vcpu)
    return vcpu.exit_to_user(uapi.KVM_EXIT_DEBUG)


def single_step(vcpu: Vcpu) -> int:
    """`kvm_vcpu_do_singlestep()`: KVM has stepped over an instruction with TF set."""
    if vcpu.guest_debug & _STEPS:
        return exit_debug(vcpu, events.DB, events.DR6_BS)
    events.queue_exception(vcpu, events.DB, payload=events.DR6_BS)
    return 1


def handle_dr(vcpu: Vcpu, number: int, register: int, write: bool) -> int:
    """MOV to and from DRn while a debugger has the silicon's: the guest gets its own."""
    state, own = vcpu.state, vcpu.debug_registers
    if number in (4, 5):
        if state.cr4 & _CR4_DE:
            events.inject_ud(vcpu)
            return 1
        number += 2
    if regs.cpl(vcpu):
        events.inject_gp(vcpu)
        return 1
    if state.dr7 & events.DR7_GD:  # the exit came before the exception
        if vcpu.guest_debug & _HW_BP:
            return exit_debug(vcpu, events.DB, _DR6_BD)
        events.queue_exception(vcpu, events.DB, payload=_DR6_BD)
        return 1
    if not write:
        vcpu.gpr[register] = own.dr6 if number == 6 else own.dr7 if number == 7 else own.dr[number]
    elif not _write(vcpu, number, vcpu.gpr[register]):
        events.inject_gp(vcpu)
        return 1
    return exits.skip(vcpu)


def _write(vcpu: Vcpu, number: int, value: int) -> bool:
    state, own, theirs = vcpu.state, vcpu.debug_registers, not vcpu.guest_debug & _HW_BP
    if number >= 6 and value >> 32:
        return False
    if number == 6:
        own.dr6 = value & _DR6_BITS | events.DR6_FIXED
    elif number == 7:
        own.dr7 = value & _DR7_BITS | _DR7_FIXED
        if theirs:
            state.dr7 = own.dr7
    else:
        own.dr[number] = value
        if theirs:
            state.dr[number] = value
    return True
