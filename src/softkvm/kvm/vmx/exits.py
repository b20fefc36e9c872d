"""VMX exit handlers, by basic exit reason.

Answers to SDM vol. 3, app. C (basic exit reasons) and 28.2.1 (exit qualifications), and to `kvm_vmx_exit_handlers` of Linux 6.1
`arch/x86/kvm/vmx/vmx.c`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate, events, exits, guest_debug, hypercall, pio, task_switch, virtual_time
from softkvm.kvm.vendor import Handler
from softkvm.uapi.vmx import ENTRY_FAILURE, EXIT_NAMES, ExitReason

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_VECTOR_MASK, _TYPE_MASK, _TYPE_NMI = 0xFF, 7 << 8, 2 << 8
_MOV_TO_CR, _MOV_FROM_CR = 0, 1
_MOV_FROM_DR = 1 << 4
_EPT_WRITE = 1 << 1

exit_memory_fault = ExitReason.EPT_VIOLATION
exit_names = EXIT_NAMES | emulate.EXIT_NAMES | virtual_time.EXIT_NAMES


def next_rip(vcpu: Vcpu) -> int | None:
    """RIP plus the instruction length that the silicon reports with every instruction exit."""
    length = vcpu.exit.instruction_length
    return vcpu.state.rip + length if length else None


def handle_unknown(vcpu: Vcpu, reason: int) -> int:
    """What is in no table is a failed entry or KVM's own surprise."""
    return exits.fail_entry(vcpu, reason) if reason & ENTRY_FAILURE else exits.unexpected_exit(vcpu, reason)


def _ept_violation(vcpu: Vcpu) -> int:
    info = vcpu.exit
    return exits.memory_fault(vcpu, info.gpa, bool(info.qualification & _EPT_WRITE))


def _exception_or_nmi(vcpu: Vcpu) -> int:
    if vcpu.exit.interruption & _TYPE_MASK == _TYPE_NMI:
        return exits.handle_nmi(vcpu)
    vector = vcpu.exit.interruption & _VECTOR_MASK
    if vector == events.UD:
        return emulate.handle_ud(vcpu)
    if vector == events.DB:
        return guest_debug.handle_db(vcpu, vcpu.exit.qualification)
    if vector == events.BP:
        return guest_debug.handle_bp(vcpu)
    return exits.handle_exception(vcpu)


def _cr_access(vcpu: Vcpu) -> int:
    """MOV to CR4 with a host-owned bit, MOV to and from CR8: nothing else is intercepted."""
    qualification = vcpu.exit.qualification
    number, access, register = qualification & 15, qualification >> 4 & 3, qualification >> 8 & 15
    if number == 8 and access == _MOV_FROM_CR:
        return exits.read_cr8(vcpu, register)
    if number == 8 and access == _MOV_TO_CR:
        return exits.write_cr8(vcpu, vcpu.gpr[register])
    if number == 4 and access == _MOV_TO_CR:
        return exits.write_cr4(vcpu, vcpu.gpr[register])
    return exits.unexpected_exit(vcpu, ExitReason.CR_ACCESS)


def _dr_access(vcpu: Vcpu) -> int:
    qualification = vcpu.exit.qualification
    return guest_debug.handle_dr(vcpu, qualification & 7, qualification >> 8 & 15, not qualification & _MOV_FROM_DR)


def _task_switch(vcpu: Vcpu) -> int:
    qualification = vcpu.exit.qualification
    return task_switch.handle(vcpu, qualification & 0xFFFF, qualification >> 30 & 3)


def _eoi_induced(vcpu: Vcpu) -> int:
    return exits.handle_end_of_interrupt(vcpu, vcpu.exit.qualification & _VECTOR_MASK)


handlers: dict[int, Handler] = {
    **emulate.handlers,
    **virtual_time.handlers,
    ExitReason.EXCEPTION_NMI: _exception_or_nmi,
    ExitReason.EXTERNAL_INTERRUPT: exits.handle_interrupt,
    ExitReason.TRIPLE_FAULT: exits.handle_triple_fault,
    ExitReason.INTERRUPT_WINDOW: exits.handle_interrupt_window,
    ExitReason.NMI_WINDOW: exits.handle_nmi_window,
    ExitReason.TASK_SWITCH: _task_switch,
    ExitReason.CPUID: exits.handle_cpuid,
    ExitReason.HLT: exits.handle_halt,
    ExitReason.INVD: exits.handle_nop,
    ExitReason.RDPMC: exits.handle_rdpmc,
    ExitReason.VMCALL: hypercall.handle_hypercall,
    ExitReason.CR_ACCESS: _cr_access,
    ExitReason.DR_ACCESS: _dr_access,
    ExitReason.IO_INSTRUCTION: pio.handle_io,
    ExitReason.MSR_READ: exits.handle_rdmsr,
    ExitReason.MSR_WRITE: exits.handle_wrmsr,
    ExitReason.MWAIT_INSTRUCTION: exits.handle_nop,
    ExitReason.MONITOR_INSTRUCTION: exits.handle_nop,
    ExitReason.PAUSE_INSTRUCTION: exits.handle_pause,
    ExitReason.EOI_INDUCED: _eoi_induced,
    ExitReason.APIC_WRITE: exits.handle_icr_write,
    ExitReason.EPT_VIOLATION: _ept_violation,
    ExitReason.WBINVD: exits.handle_nop,
    ExitReason.XSETBV: exits.handle_xsetbv,
}
_VM_INSTRUCTIONS = (*range(ExitReason.VMCLEAR, ExitReason.VMON + 1), ExitReason.INVEPT, ExitReason.INVVPID, ExitReason.VMFUNC)
handlers.update(dict.fromkeys(_VM_INSTRUCTIONS, exits.handle_ud))
