"""What SVM exits tell: APM vol. 2, 15.8 and 15.9 (intercepts), 15.25.6 (nested page faults), app. C."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from softkvm.kvm import events
from softkvm.kvm.introspection.facts import Hook, Hooked
from softkvm.silicon import EXIT_MONITOR_TRAP_AMD, RIGHT_R, RIGHT_W, RIGHT_X
from softkvm.uapi.kvmi import Descriptor
from softkvm.uapi.svm import ExitCode

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu
    from softkvm.kvm.vendor import Handler

_WRITE, _FETCH, _WALK = 1 << 1, 1 << 4, 1 << 33
_MOV_CR, _GPR = 1 << 63, 15
_LMSW_BITS, _PE = 0xF, 1
_INT3_LENGTH = 1

undisturbed = frozenset((EXIT_MONITOR_TRAP_AMD, int(ExitCode.NPF), int(ExitCode.INTR)))


def hooks(hook: Hook) -> Mapping[int, Hooked]:
    """Exit code -> handler."""
    tables = (
        (ExitCode.IDTR_READ, Descriptor.IDTR),
        (ExitCode.GDTR_READ, Descriptor.GDTR),
        (ExitCode.LDTR_READ, Descriptor.LDTR),
        (ExitCode.TR_READ, Descriptor.TR),
    )
    writes = ExitCode.IDTR_WRITE - ExitCode.IDTR_READ
    return {
        ExitCode.NPF: partial(_nested_page_fault, hook.page),
        ExitCode.EXCP_BASE + events.BP: partial(_breakpoint, hook.breakpoint),
        **{ExitCode.WRITE_CR0 + number: partial(_write_cr, hook.write_cr, number) for number in (0, 3, 4)},
        ExitCode.MSR: partial(_msr, hook.write_msr),
        ExitCode.XSETBV: hook.xsetbv,
        **{code: partial(_table, hook.descriptor, table, False) for code, table in tables},
        **{code + writes: partial(_table, hook.descriptor, table, True) for code, table in tables},
        ExitCode.VMMCALL: hook.hypercall,
        EXIT_MONITOR_TRAP_AMD: hook.step,
    }


def _nested_page_fault(page: Callable[[Vcpu, int, int, int, bool, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    info = vcpu.exit
    facts = info.qualification
    access = RIGHT_X if facts & _FETCH else RIGHT_W if facts & _WRITE else RIGHT_R
    return page(vcpu, info.info2, info.gla, access, bool(facts & _WALK), plain)


def _breakpoint(breakpoint: Callable[[Vcpu, int, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    return breakpoint(vcpu, vcpu.exit.instruction_length or _INT3_LENGTH, plain)


def _write_cr(write: Callable[[Vcpu, int, int, Handler], int], number: int, vcpu: Vcpu, plain: Handler) -> int:
    info = vcpu.exit
    if number == 0 and not info.qualification & _MOV_CR:  # LMSW, whose source the silicon leaves in EXITINFO2
        return write(vcpu, 0, vcpu.state.cr0 & ~(_LMSW_BITS & ~_PE) | info.info2 & _LMSW_BITS, plain)
    return write(vcpu, number, vcpu.gpr[info.qualification & _GPR], plain)


def _msr(write: Callable[[Vcpu, Handler], int], vcpu: Vcpu, plain: Handler) -> int:
    return write(vcpu, plain) if vcpu.exit.qualification & 1 else plain(vcpu)


def _table(tell: Callable[[Vcpu, int, bool, Handler], int], table: int, write: bool, vcpu: Vcpu, plain: Handler) -> int:
    return tell(vcpu, table, write, plain)
