"""SVM exit handlers, by exit code.

Answers to APM vol. 2, app. C (exit codes) and 15.7-15.9 (exit information), and to `svm_exit_handlers` of Linux 6.1
`arch/x86/kvm/svm/svm.c`. Where an instruction ends comes from the silicon's next-RIP save (15.7.1) or from decoding it, never from a table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import emulate, events, exits, hypercall, pio
from softkvm.kvm.vendor import Handler

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

CR_READ, CR_WRITE, EXCEPTION, INTR, NMI, SMI, INIT, VINTR = 0x00, 0x10, 0x40, 0x60, 0x61, 0x62, 0x63, 0x64
RDPMC, CPUID, IRET, INVD, HLT, INVLPGA, IOIO, MSR, SHUTDOWN = 0x6F, 0x72, 0x74, 0x76, 0x78, 0x7A, 0x7B, 0x7C, 0x7F
VMRUN, VMMCALL, VMLOAD, SKINIT, WBINVD, MONITOR, MWAIT, XSETBV = 0x80, 0x81, 0x82, 0x86, 0x89, 0x8A, 0x8B, 0x8D
NPF, INVALID = 0x400, 0xFFFF_FFFF

_NPF_WRITE = 1 << 1
_GPR_MASK = 15
"""EXITINFO1 of a MOV to or from CRn with decode assists: the general register (APM vol. 2, 15.8.1)."""

exit_interrupt = INTR
exit_memory_fault = NPF


def next_rip(vcpu: Vcpu) -> int | None:
    """The VMCB's next RIP, which is zero where the silicon does not save it; for IN and OUT EXITINFO2, which all silicon has."""
    info = vcpu.exit
    if vcpu.saves_next_rip and info.next_rip:
        return int(info.next_rip)
    return int(info.info2) if info.reason == IOIO else None


def memory_fault(vcpu: Vcpu) -> tuple[int, bool]:
    """EXITINFO2 has the guest-physical address, EXITINFO1 the error code."""
    info = vcpu.exit
    return info.info2, bool(info.qualification & _NPF_WRITE)


def handle_exit(vcpu: Vcpu, reason: int) -> int:
    """Look the code up; what is not there is a failed entry or KVM's own surprise."""
    handler = handlers.get(reason)
    if handler is not None:
        return handler(vcpu)
    if reason == INVALID:
        return exits.fail_entry(vcpu, reason)
    return exits.unexpected_exit(vcpu, reason)


def _nested_page_fault(vcpu: Vcpu) -> int:
    info = vcpu.exit
    return exits.memory_fault(vcpu, info.info2, bool(info.qualification & _NPF_WRITE))


def _msr(vcpu: Vcpu) -> int:
    return exits.handle_wrmsr(vcpu) if vcpu.exit.qualification & 1 else exits.handle_rdmsr(vcpu)


def _host_nmi(vcpu: Vcpu) -> int:
    return 1  # the host has handled it


def _cr4_write(vcpu: Vcpu) -> int:
    return exits.write_cr4(vcpu, vcpu.gpr[vcpu.exit.qualification & _GPR_MASK])


def _cr8_write(vcpu: Vcpu) -> int:
    return exits.write_cr8(vcpu, vcpu.gpr[vcpu.exit.qualification & _GPR_MASK])


def _cr8_read(vcpu: Vcpu) -> int:
    return exits.read_cr8(vcpu, vcpu.exit.qualification & _GPR_MASK)


handlers: dict[int, Handler] = {
    CR_READ + 8: _cr8_read,
    CR_WRITE + 4: _cr4_write,
    CR_WRITE + 8: _cr8_write,
    INTR: exits.handle_interrupt,
    NMI: _host_nmi,
    VINTR: exits.handle_interrupt_window,
    RDPMC: exits.handle_gp,
    CPUID: exits.handle_cpuid,
    IRET: exits.handle_nmi_window,
    INVD: exits.handle_nop,
    HLT: exits.handle_halt,
    INVLPGA: exits.handle_ud,
    IOIO: pio.handle_io,
    MSR: _msr,
    SHUTDOWN: exits.handle_triple_fault,
    VMRUN: exits.handle_ud,
    VMMCALL: hypercall.handle_hypercall,
    WBINVD: exits.handle_nop,
    MONITOR: exits.handle_nop,
    MWAIT: exits.handle_nop,
    XSETBV: exits.handle_xsetbv,
    NPF: _nested_page_fault,
}
handlers.update(dict.fromkeys(range(EXCEPTION, EXCEPTION + 32), exits.handle_exception))
handlers[EXCEPTION + events.UD] = emulate.handle_ud
handlers.update(dict.fromkeys(range(VMLOAD, SKINIT + 1), exits.handle_ud))
