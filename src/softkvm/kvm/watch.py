"""A VM entry that somebody watches: the crossing into the guest with tracepoints, interrupt state and context tracking.

Answers to Linux 6.1 `vmx_vcpu_run()` and `vmx_vcpu_enter_exit()`, and to `include/linux/kvm_host.h` (`guest_state_enter_irqoff()`). A vCPU
calls this in place of its core's `enter` while a hook on guest mode is on (`VcpuCore.update_static_calls()`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host import context_tracking, entry, trace
from softkvm.host.irqflags import local_irq_disable, local_irq_enable
from softkvm.host.task import current

if TYPE_CHECKING:
    from softkvm.kvm.vcpu_core import VcpuCore

_ISA = {"intel": trace.ISA_VMX, "amd": trace.ISA_SVM}


def wanted() -> bool:
    """Whether any hook on guest mode is on."""
    return trace.kvm_entry.enabled or trace.kvm_exit.enabled or context_tracking.enabled()


def enter(vcpu: VcpuCore, core_enter: Callable[[], int]) -> int:
    """Enter the guest by `core_enter` with interrupts off around it; the exit reason."""
    task = current()
    local_irq_disable(task)
    try:
        if trace.kvm_entry.enabled:
            trace.kvm_entry(vcpu.vcpu_id, vcpu.state.rip)
        reason = entry.run_guest(task, core_enter)
        if trace.kvm_exit.enabled:
            _trace_exit(vcpu, reason)
    finally:
        local_irq_enable(task)
    return reason


def _trace_exit(vcpu: VcpuCore, reason: int) -> None:
    info, isa = vcpu.exit, _ISA[vcpu.vm.model.vendor]
    event, error = info.interruption, info.interruption_error
    trace.kvm_exit(reason & 0xFFFF_FFFF, vcpu.state.rip, isa, info.qualification, info.info2, event, error, vcpu.vcpu_id)
