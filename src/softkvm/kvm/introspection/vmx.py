"""What VMX exits tell: SDM vol. 3, 28.2.1 (exit qualifications), tables 28-3, 28-7, 28-10 and 28-11."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from softkvm.kvm import events
from softkvm.kvm.introspection.facts import Hook, Hooked
from softkvm.silicon import RIGHT_R, RIGHT_W, RIGHT_X
from softkvm.uapi.kvmi import INVALID_GPA, Descriptor
from softkvm.uapi.vmx import ExitReason

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vendor import Handler

_GLA_VALID, _FINAL = 1 << 7, 1 << 8
_MOV_TO_CR, _LMSW = 0, 3
_LMSW_BITS, _PE = 0xF, 1
_TYPE_MASK, _TYPE_NMI = 7 << 8, 2 << 8

undisturbed = frozenset(int(reason) for reason in (ExitReason.MONITOR_TRAP_FLAG, ExitReason.EPT_VIOLATION, ExitReason.EXTERNAL_INTERRUPT))


def hooks(hook: Hook) -> Mapping[int, Hooked]:
    """Exit reason -> handler."""
    return {
        ExitReason.EPT_VIOLATION: partial(_ept_violation, hook.page),
        ExitReason.EXCEPTION_NMI: partial(_exception, hook.breakpoint),
        ExitReason.CR_ACCESS: partial(_cr_access, hook.write_cr),
        ExitReason.MSR_WRITE: hook.write_msr,
        ExitReason.XSETBV: hook.xsetbv,
        ExitReason.GDTR_IDTR: partial(_tables, hook.descriptor, (Descriptor.GDTR, Descriptor.IDTR)),
        ExitReason.LDTR_TR: partial(_tables, hook.descriptor, (Descriptor.LDTR, Descriptor.TR)),
        ExitReason.VMCALL: hook.hypercall,
        ExitReason.MONITOR_TRAP_FLAG: hook.step,
    }


def _ept_violation(page: Callable[[Vcpu, int, int, int, bool, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    info = vcpu.exit
    facts = info.qualification
    access = RIGHT_R if facts & 1 else RIGHT_W if facts & 2 else RIGHT_X
    walk = bool(facts & _GLA_VALID and not facts & _FINAL)
    return page(vcpu, info.gpa, info.gla if facts & _GLA_VALID else INVALID_GPA, access, walk, plain)


def _exception(breakpoint: Callable[[Vcpu, int, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    event = vcpu.exit.interruption
    if event & _TYPE_MASK != _TYPE_NMI and event & 0xFF == events.BP:
        return breakpoint(vcpu, vcpu.exit.instruction_length, plain)
    return plain(vcpu)


def _cr_access(write: Callable[[Vcpu, int, int, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    facts = vcpu.exit.qualification
    number, access = facts & 15, facts >> 4 & 3
    if number in (0, 3, 4) and access == _MOV_TO_CR:
        return write(vcpu, number, vcpu.gpr[facts >> 8 & 15], plain)
    if access == _LMSW:
        cr0 = vcpu.state.cr0
        return write(vcpu, 0, cr0 & ~(_LMSW_BITS & ~_PE) | facts >> 16 & _LMSW_BITS, plain)
    return plain(vcpu)


def _tables(tell: Callable[[Vcpu, int, bool, Handler], int], tables: tuple[int, int], vcpu: Vcpu, plain: Handler) -> int:
    instruction = vcpu.exit.instruction_info >> 28 & 3
    return tell(vcpu, tables[instruction & 1], bool(instruction & 2), plain)
