"""SVM exit handlers, by exit code.

Answers to APM vol. 2, app. C (exit codes) and 15.7-15.9 (exit information), and to `svm_exit_handlers` of Linux 6.1
`arch/x86/kvm/svm/svm.c`. Where an instruction ends comes from the silicon's next-RIP save (15.7.1) or from decoding it, never from a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate, events, exits, guest_debug, hypercall, pio, task_switch, virtual_time
from softkvm.kvm.vendor import Handler
from softkvm.uapi.svm import EXIT_NAMES, ExitCode

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_NPF_WRITE = 1 << 1
_DR_WRITE = 0x10
_VECTOR_MASK = 0xFF
_TASK_SWITCH_IRET, _TASK_SWITCH_JUMP = 1 << 36, 1 << 38
"""EXITINFO2 of a task switch (APM vol. 2, 15.14.1)."""
_GPR_MASK = 15
"""EXITINFO1 of a MOV to or from CRn with decode assists: the general register (APM vol. 2, 15.8.1)."""

exit_memory_fault = ExitCode.NPF
exit_names = EXIT_NAMES | emulate.EXIT_NAMES | virtual_time.EXIT_NAMES


def next_rip(vcpu: Vcpu) -> int | None:
    """The VMCB's next RIP, which is zero where the silicon does not save it; for IN and OUT EXITINFO2, which all silicon has."""
    info = vcpu.exit
    if vcpu.saves_next_rip and info.next_rip:
        return int(info.next_rip)
    return int(info.info2) if info.reason == ExitCode.IOIO else None


def handle_unknown(vcpu: Vcpu, reason: int) -> int:
    """What is in no table is a failed entry or KVM's own surprise."""
    return exits.fail_entry(vcpu, reason) if reason == ExitCode.INVALID else exits.unexpected_exit(vcpu, reason)


def _nested_page_fault(vcpu: Vcpu) -> int:
    info = vcpu.exit
    return exits.memory_fault(vcpu, info.info2, bool(info.qualification & _NPF_WRITE))


def _msr(vcpu: Vcpu) -> int:
    return exits.handle_wrmsr(vcpu) if vcpu.exit.qualification & 1 else exits.handle_rdmsr(vcpu)


def _cr4_write(vcpu: Vcpu) -> int:
    return exits.write_cr4(vcpu, vcpu.gpr[vcpu.exit.qualification & _GPR_MASK])


def _cr8_write(vcpu: Vcpu) -> int:
    return exits.write_cr8(vcpu, vcpu.gpr[vcpu.exit.qualification & _GPR_MASK])


def _cr8_read(vcpu: Vcpu) -> int:
    return exits.read_cr8(vcpu, vcpu.exit.qualification & _GPR_MASK)


def _db(vcpu: Vcpu) -> int:
    return guest_debug.handle_db(vcpu, vcpu.state.dr6)


def _dr_access(vcpu: Vcpu) -> int:
    code = vcpu.exit.reason - ExitCode.READ_DR0
    return guest_debug.handle_dr(vcpu, code & 7, vcpu.exit.qualification & _GPR_MASK, bool(code & _DR_WRITE))


def _task_switch(vcpu: Vcpu) -> int:
    info = vcpu.exit
    if info.info2 & _TASK_SWITCH_IRET:
        reason = task_switch.IRET
    elif info.info2 & _TASK_SWITCH_JUMP:
        reason = task_switch.JMP
    else:
        reason = task_switch.GATE if info.vectoring & events.EVENT_VALID else task_switch.CALL
    return task_switch.handle(vcpu, info.qualification & 0xFFFF, reason)


def _avic_unaccelerated_access(vcpu: Vcpu) -> int:
    """The only access that the silicon does not complete is an EOI."""
    return exits.handle_end_of_interrupt(vcpu, vcpu.exit.info2 & _VECTOR_MASK)


handlers: dict[int, Handler] = {
    **emulate.handlers,
    **virtual_time.handlers,
    ExitCode.READ_CR0 + 8: _cr8_read,
    ExitCode.WRITE_CR0 + 4: _cr4_write,
    ExitCode.WRITE_CR0 + 8: _cr8_write,
    ExitCode.INTR: exits.handle_interrupt,
    ExitCode.NMI: exits.handle_nmi,
    ExitCode.VINTR: exits.handle_interrupt_window,
    ExitCode.RDPMC: exits.handle_rdpmc,
    ExitCode.CPUID: exits.handle_cpuid,
    ExitCode.IRET: exits.handle_nmi_window,
    ExitCode.INVD: exits.handle_nop,
    ExitCode.PAUSE: exits.handle_pause,
    ExitCode.HLT: exits.handle_halt,
    ExitCode.INVLPGA: exits.handle_ud,
    ExitCode.IOIO: pio.handle_io,
    ExitCode.MSR: _msr,
    ExitCode.SHUTDOWN: exits.handle_triple_fault,
    ExitCode.VMRUN: exits.handle_ud,
    ExitCode.VMMCALL: hypercall.handle_hypercall,
    ExitCode.WBINVD: exits.handle_nop,
    ExitCode.MONITOR: exits.handle_nop,
    ExitCode.MWAIT: exits.handle_nop,
    ExitCode.XSETBV: exits.handle_xsetbv,
    ExitCode.AVIC_INCOMPLETE_IPI: exits.handle_icr_write,
    ExitCode.AVIC_UNACCELERATED_ACCESS: _avic_unaccelerated_access,
    ExitCode.NPF: _nested_page_fault,
    ExitCode.TASK_SWITCH: _task_switch,
}
handlers.update(dict.fromkeys(range(ExitCode.EXCP_BASE, ExitCode.EXCP_BASE + 32), exits.handle_exception))
handlers[ExitCode.EXCP_BASE + events.UD] = emulate.handle_ud
handlers[ExitCode.EXCP_BASE + events.DB] = _db
handlers[ExitCode.EXCP_BASE + events.BP] = guest_debug.handle_bp
handlers.update(
    dict.fromkeys((*range(ExitCode.READ_DR0, ExitCode.READ_DR0 + 8), *range(ExitCode.WRITE_DR0, ExitCode.WRITE_DR0 + 8)), _dr_access)
)
handlers.update(dict.fromkeys(range(ExitCode.VMLOAD, ExitCode.SKINIT + 1), exits.handle_ud))
