"""VMX exit handlers, by basic exit reason.

Answers to SDM vol. 3, app. C (basic exit reasons) and 28.2.1 (exit qualifications), and to `kvm_vmx_exit_handlers` of Linux 6.1
`arch/x86/kvm/vmx/vmx.c`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate, events, exits, hypercall, pio
from softkvm.kvm.vendor import Handler

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

EXCEPTION_NMI, EXTERNAL_INTERRUPT, TRIPLE_FAULT, INIT_SIGNAL, SIPI = 0, 1, 2, 3, 4
INTERRUPT_WINDOW, NMI_WINDOW, CPUID, HLT, INVD, RDPMC = 7, 8, 10, 12, 13, 15
VMCALL, VMCLEAR, VMXON, CR_ACCESS, IO_INSTRUCTION, MSR_READ, MSR_WRITE = 18, 19, 27, 28, 30, 31, 32
MWAIT, MONITOR, EPT_VIOLATION, INVEPT, INVVPID, WBINVD, XSETBV, VMFUNC = 36, 39, 48, 50, 53, 54, 55, 59
ENTRY_FAILURE = 1 << 31

_VECTOR_MASK, _TYPE_MASK, _TYPE_NMI = 0xFF, 7 << 8, 2 << 8
_MOV_TO_CR, _MOV_FROM_CR = 0, 1
_EPT_WRITE = 1 << 1

exit_interrupt = EXTERNAL_INTERRUPT
exit_memory_fault = EPT_VIOLATION


def next_rip(vcpu: Vcpu) -> int | None:
    """RIP plus the instruction length that the silicon reports with every instruction exit."""
    length = vcpu.exit.instruction_length
    return vcpu.state.rip + length if length else None


def memory_fault(vcpu: Vcpu) -> tuple[int, bool]:
    """The guest-physical address, and the write bit of the qualification."""
    info = vcpu.exit
    return info.gpa, bool(info.qualification & _EPT_WRITE)


def handle_exit(vcpu: Vcpu, reason: int) -> int:
    """Look the reason up; what is not there is a failed entry or KVM's own surprise."""
    handler = handlers.get(reason)
    if handler is not None:
        return handler(vcpu)
    if reason & ENTRY_FAILURE:
        return exits.fail_entry(vcpu, reason)
    return exits.unexpected_exit(vcpu, reason)


def _ept_violation(vcpu: Vcpu) -> int:
    info = vcpu.exit
    return exits.memory_fault(vcpu, info.gpa, bool(info.qualification & _EPT_WRITE))


def _exception_or_nmi(vcpu: Vcpu) -> int:
    if vcpu.exit.interruption & _TYPE_MASK == _TYPE_NMI:
        return 1  # the host's, and the host has handled it
    if vcpu.exit.interruption & _VECTOR_MASK == events.UD:
        return emulate.handle_ud(vcpu)
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
    return exits.unexpected_exit(vcpu, CR_ACCESS)


handlers: dict[int, Handler] = {
    EXCEPTION_NMI: _exception_or_nmi,
    EXTERNAL_INTERRUPT: exits.handle_interrupt,
    TRIPLE_FAULT: exits.handle_triple_fault,
    INTERRUPT_WINDOW: exits.handle_interrupt_window,
    NMI_WINDOW: exits.handle_nmi_window,
    CPUID: exits.handle_cpuid,
    HLT: exits.handle_halt,
    INVD: exits.handle_nop,
    RDPMC: exits.handle_gp,
    VMCALL: hypercall.handle_hypercall,
    CR_ACCESS: _cr_access,
    IO_INSTRUCTION: pio.handle_io,
    MSR_READ: exits.handle_rdmsr,
    MSR_WRITE: exits.handle_wrmsr,
    MWAIT: exits.handle_nop,
    MONITOR: exits.handle_nop,
    EPT_VIOLATION: _ept_violation,
    WBINVD: exits.handle_nop,
    XSETBV: exits.handle_xsetbv,
}
handlers.update(dict.fromkeys((*range(VMCLEAR, VMXON + 1), INVEPT, INVVPID, VMFUNC), exits.handle_ud))
