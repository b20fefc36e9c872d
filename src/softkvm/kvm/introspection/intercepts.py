"""What the silicon must report for the tool: interceptions, turned on and off, and restored at the end.

Answers to `kvmi_arch_vcpu_control_event()`, `kvmi_control_bp_intercept()`, `kvmi_control_cr()`, `kvmi_control_msr()`, `kvmi_control_
desc_intercept()` and their restoring at un-hook, "VM introspection" v9, patches 60-62, 64, 65 and 73-76.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import cr, events, msr_bitmap
from softkvm.kvm.introspection.failures import Refused
from softkvm.silicon.control import Intercept
from softkvm.uapi.kvmi import Error, Event

if TYPE_CHECKING:
    from softkvm.kvm.introspection.vcpu import VcpuIntrospection

_BP = 1 << events.BP
_CR3_WRITE = 1 << 3
_ALL = (1 << 64) - 1


def control_event(introspection: VcpuIntrospection, event: Event, enable: bool) -> None:
    """Enable or disable an event; Refused(EBUSY) for breakpoints that a debugger or the tool itself has already, or that it has not.

    The event counts as enabled or disabled even if the interception is refused, as in v9.
    """
    before = introspection.enabled
    introspection.enabled = before | {event} if enable else before - {event}
    if event is Event.BREAKPOINT:
        _control_breakpoints(introspection, enable)
    elif event is Event.DESCRIPTOR:
        introspection.vcpu.set_intercept(Intercept.DESCRIPTOR_TABLE, enable)


def _control_breakpoints(introspection: VcpuIntrospection, enable: bool) -> None:
    vcpu, mine = introspection.vcpu, introspection.intercepts_breakpoints
    if vcpu.control.exception_bitmap & _BP if enable else not mine:
        raise Refused(Error.EBUSY)
    introspection.intercepts_breakpoints = enable
    vcpu.update_exception_bitmap()


def control_cr(introspection: VcpuIntrospection, number: int, enable: bool) -> None:
    """Report writes to CR0, CR3 or CR4, of the bits that KVM does not leave to the guest."""
    before, control, state = introspection.control_registers, introspection.vcpu.control, introspection.vcpu.state
    introspection.control_registers = before | {number} if enable else before - {number}
    if number == 0:
        control.cr0_mask = _ALL & ~cr.CR0_GUEST_OWNED if enable else 0
        control.cr0_shadow = state.cr0
    elif number == 3:
        control.cr_write = control.cr_write | _CR3_WRITE if enable else control.cr_write & ~_CR3_WRITE
    else:
        introspection.vcpu.update_cr4_mask()


def control_msr(introspection: VcpuIntrospection, index: int, enable: bool) -> None:
    """Report writes to an MSR."""
    before = introspection.msrs
    introspection.msrs = before | {index} if enable else before - {index}
    passed = introspection.vcpu.msrs_passed_through
    if enable and (index, True) in passed:
        introspection.msrs_taken.add(index)
        msr_bitmap.intercept(introspection.vcpu, index, write=True)
    elif not enable and index in introspection.msrs_taken:
        introspection.msrs_taken.remove(index)
        msr_bitmap.pass_through(introspection.vcpu, index, write=True)


def restore(introspection: VcpuIntrospection) -> None:
    """Nothing is reported to this tool any more."""
    vcpu = introspection.vcpu
    if vcpu.introspection is not introspection:
        return
    vcpu.set_intercept(Intercept.DESCRIPTOR_TABLE, False)
    introspection.set_singlestep(False)
    for number in introspection.control_registers:
        control_cr(introspection, number, False)
    for index in introspection.msrs:
        control_msr(introspection, index, False)
    introspection.enabled = frozenset()
    vcpu.set_introspection(None)
    vcpu.update_exception_bitmap()
