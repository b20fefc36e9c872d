"""Exit handlers that both vendors share: instructions that KVM performs for the guest, and the ways out to user space.

Answers to Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_emulate_*()`, `kvm_skip_emulated_instruction()`, `__kvm_set_xcr()`). A handler returns 1
to run the guest again, 0 to leave for user space, or -errno.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm.host import entry, nmi, trace
from softkvm.host.perf.interrupt import interrupted
from softkvm.host.task import current
from softkvm.kvm import cpuid, cr, emulate, events, guest_debug, msr, msr_filter, regs
from softkvm.kvm.mmu import Fault
from softkvm.kvm.pmu.registers import GuestRegisters
from softkvm.kvm.request import REQ_EVENT
from softkvm.kvm.vendor import PLE_WINDOW, PLE_WINDOW_MAX
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_U32 = 0xFFFF_FFFF
_XCR0_FP, _XCR0_SSE, _XCR0_YMM, _XCR0_BNDREGS, _XCR0_BNDCSR = 1, 2, 4, 8, 16
_XCR0_AVX512 = 7 << 5
_XCR0_TILE = 3 << 17
_INSTRUCTION_BYTES = 15
_TF_OR_RF, _SHADOW = events.RFLAGS_TF | events.RFLAGS_RF, events.SHADOW


def skip(vcpu: Vcpu) -> int:
    """Step over the instruction that exited: by what the silicon tells of its end, else by decoding it."""
    rip = vcpu.next_rip(vcpu)
    if rip is None:
        return emulate.emulate_instruction(vcpu, emulate.EMULTYPE_SKIP)
    return step_over(vcpu, rip)


def step_over(vcpu: Vcpu, rip: int) -> int:
    """Retire the instruction, which ends at `rip`: shadow and RF cleared, single-step trap queued.

    This is the one place where KVM retires an instruction in the guest's place (`kvm_skip_emulated_instruction()`).
    """
    state = vcpu.state
    if rip & _U32 < _INSTRUCTION_BYTES and not regs.is_64_bit_mode(vcpu):
        rip &= _U32  # IP wraps at 4 GB
    state.rip = rip
    vcpu.instructions_skipped += 1
    if vcpu.retired is not None:
        vcpu.retired()
    if state.interruptibility & _SHADOW:
        state.interruptibility &= ~_SHADOW
        vcpu.make_request(REQ_EVENT)
    rflags = state.rflags
    if rflags & _TF_OR_RF:
        state.rflags = rflags & ~events.RFLAGS_RF
        if rflags & events.RFLAGS_TF:
            return guest_debug.single_step(vcpu)
    return 1


def handle_cpuid(vcpu: Vcpu) -> int:
    """CPUID."""
    gpr = vcpu.gpr
    function, index = gpr[0] & _U32, gpr[1] & _U32
    eax, ebx, ecx, edx = vcpu.cpuid.execute(function, index)
    gpr[0], gpr[3], gpr[1], gpr[2] = eax, ebx, ecx, edx
    return skip(vcpu)


def trace_cpuid(vcpu: Vcpu) -> int:
    """CPUID while somebody listens; in the table in place of `handle_cpuid()`, which is too short to ask each time."""
    gpr = vcpu.gpr
    function, index = gpr[0] & _U32, gpr[1] & _U32
    result = handle_cpuid(vcpu)
    trace.kvm_cpuid(function, index, gpr[0], gpr[3], gpr[1], gpr[2], *vcpu.cpuid.how_found(function, index))
    return result


def handle_rdmsr(vcpu: Vcpu) -> int:
    """RDMSR; #GP for what the guest may not read."""
    gpr = vcpu.gpr
    index = gpr[1] & _U32
    try:
        value = vcpu.msr_get(vcpu, index, False)
    except msr.MsrError as error:
        if trace.kvm_msr.enabled:
            trace.kvm_msr(False, index, 0, True)
        return msr_filter.refuse(vcpu, error, None)
    if trace.kvm_msr.enabled:
        trace.kvm_msr(False, index, value, False)
    gpr[0], gpr[2] = value & _U32, value >> 32
    return skip(vcpu)


def handle_wrmsr(vcpu: Vcpu) -> int:
    """WRMSR; #GP for what the guest may not write."""
    gpr = vcpu.gpr
    index, value = gpr[1] & _U32, (gpr[2] & _U32) << 32 | gpr[0] & _U32
    refused: msr.MsrError | None = None
    try:
        vcpu.msr_set(vcpu, index, value, False)
    except msr.MsrError as error:
        refused = error
    if trace.kvm_msr.enabled:
        trace.kvm_msr(True, index, value, refused is not None)
    if refused is not None:
        return msr_filter.refuse(vcpu, refused, value)
    return skip(vcpu)


def handle_halt(vcpu: Vcpu) -> int:
    """HLT: wait in the kernel if the local APIC is there, else tell user space."""
    result = skip(vcpu)
    vcpu.stats["halt_exits"] += 1
    if vcpu.lapic is not None:
        vcpu.mp_state = uapi.KVM_MP_STATE_HALTED
        return result
    return result if result <= 0 else vcpu.exit_to_user(uapi.KVM_EXIT_HLT)


def handle_nop(vcpu: Vcpu) -> int:
    """An instruction that has no effect under KVM (INVD, WBINVD, MONITOR, MWAIT)."""
    return skip(vcpu)


def handle_pause(vcpu: Vcpu) -> int:
    """A loop of PAUSE: whoever the guest waits for may want our processor. Where nobody does, longer loops are let be."""
    result = skip(vcpu)
    control = vcpu.control
    crowded = vcpu.vm.scheduler.spin(vcpu)
    control.pause_window = PLE_WINDOW if crowded else min(2 * control.pause_window, PLE_WINDOW_MAX)
    return result


def handle_ud(vcpu: Vcpu) -> int:
    """An instruction that the guest does not have."""
    events.inject_ud(vcpu)
    return 1


def handle_rdpmc(vcpu: Vcpu) -> int:
    """RDPMC, if there is such a counter; silicon has checked CPL and CR4.PCE."""
    gpr = vcpu.gpr
    value = vcpu.pmu.rdpmc(gpr[1] & _U32)
    if value is None:
        events.inject_gp(vcpu)
        return 1
    gpr[0], gpr[2] = value & _U32, value >> 32
    return skip(vcpu)


def handle_interrupt(vcpu: Vcpu) -> int:
    """A host interrupt: a kick, or the core's timer."""
    entry.interrupt(current(), vcpu.core_interrupted)
    if vcpu.cpu is not None and vcpu.cpu.perf.rotate_necessary:
        vcpu.cpu.perf.rotate()
    return 1


def handle_nmi(vcpu: Vcpu) -> int:
    """A host NMI ended guest mode, and the host handles it now (`vmx_do_nmi_irqoff()`; on AMD silicon the STGI lets it in)."""
    if vcpu.cpu is not None:
        with interrupted(vcpu.cpu.perf, GuestRegisters(vcpu)):
            nmi.do_nmi(current())
    return 1


def handle_interrupt_window(vcpu: Vcpu) -> int:
    """The guest can take interrupts now."""
    vcpu.set_windows(vcpu.windows & ~events.INTERRUPT_WINDOW)
    vcpu.make_request(REQ_EVENT)
    vcpu.stats["irq_window_exits"] += 1
    return 1


def handle_nmi_window(vcpu: Vcpu) -> int:
    """The guest can take NMIs now."""
    vcpu.set_windows(vcpu.windows & ~events.NMI_WINDOW)
    vcpu.make_request(REQ_EVENT)
    vcpu.stats["nmi_window_exits"] += 1
    return 1


def handle_end_of_interrupt(vcpu: Vcpu, vector: int) -> int:
    """EOI of a virtual APIC, of a vector that concerns an IOAPIC; the instruction is complete."""
    assert vcpu.lapic is not None
    vcpu.lapic.end_of_interrupt(vector)
    return 1


def handle_icr_write(vcpu: Vcpu) -> int:
    """A command of a virtual APIC that the silicon does not execute; the instruction is complete."""
    assert vcpu.lapic is not None
    vcpu.lapic.icr_written()
    return 1


def handle_triple_fault(vcpu: Vcpu) -> int:
    """The guest has shut down."""
    return vcpu.exit_to_user(uapi.KVM_EXIT_SHUTDOWN)


def handle_xsetbv(vcpu: Vcpu) -> int:
    """XSETBV."""
    return skip(vcpu) if execute_xsetbv(vcpu) else 1


def execute_xsetbv(vcpu: Vcpu) -> bool:
    """XSETBV with all the checks of the instruction: silicon makes the first two itself. False if the guest gets an exception."""
    gpr = vcpu.gpr
    value = (gpr[2] & _U32) << 32 | gpr[0] & _U32
    if not vcpu.state.cr4 & regs.CR4_OSXSAVE:
        events.inject_ud(vcpu)
        return False
    if regs.cpl(vcpu) or not set_xcr(vcpu, gpr[1] & _U32, value):
        events.inject_gp(vcpu)
        return False
    return True


def set_xcr(vcpu: Vcpu, index: int, value: int) -> bool:
    """Write an extended control register (SDM vol. 1, 13.3); False = #GP to the guest, EINVAL to user space."""
    bad = (
        index != 0
        or not value & _XCR0_FP
        or (value & _XCR0_YMM and not value & _XCR0_SSE)
        or value & ~(vcpu.cpuid.supported_xcr0 | _XCR0_FP)
        or bool(value & _XCR0_BNDREGS) != bool(value & _XCR0_BNDCSR)
        or (value & _XCR0_AVX512 and value & (_XCR0_AVX512 | _XCR0_YMM) != _XCR0_AVX512 | _XCR0_YMM)
        or value & _XCR0_TILE not in (0, _XCR0_TILE)
    )
    if bad:
        return False
    vcpu.state.xcr0 = value
    cpuid.update_runtime(vcpu)
    return True


def write_cr4(vcpu: Vcpu, value: int) -> int:
    """MOV to CR4 that touches a bit of the host's mask; #GP for what `kvm_set_cr4()` refuses."""
    if trace.kvm_cr.enabled:
        trace.kvm_cr(True, 4, value)
    if cr.refuses(vcpu, 4, value) or not cr.load(vcpu, 4, value):
        events.inject_gp(vcpu)
        return 1
    return skip(vcpu)


def write_cr8(vcpu: Vcpu, value: int) -> int:
    """MOV to CR8: task priority; user space that has the local APIC hears of a lower one."""
    if trace.kvm_cr.enabled:
        trace.kvm_cr(True, 8, value)
    old = regs.get_cr8(vcpu)
    if not regs.set_cr8(vcpu, value):
        events.inject_gp(vcpu)
        return 1
    result = skip(vcpu)
    if result <= 0 or vcpu.lapic is not None or old <= value:
        return result
    return vcpu.exit_to_user(uapi.KVM_EXIT_SET_TPR)


def read_cr8(vcpu: Vcpu, register: int) -> int:
    """MOV from CR8."""
    value = vcpu.gpr[register] = regs.get_cr8(vcpu)
    if trace.kvm_cr.enabled:
        trace.kvm_cr(False, 8, value)
    return skip(vcpu)


def memory_fault(vcpu: Vcpu, gpa: int, write: bool) -> int:
    """EPT violation or nested page fault: RAM to map, or a device's address."""
    if trace.kvm_page_fault.enabled:
        trace.kvm_page_fault(vcpu.vcpu_id, vcpu.state.rip, gpa, int(write) << 1)
    fault = vcpu.mmu.fault(gpa, write)
    if fault is Fault.FIXED:
        return 1
    if fault is Fault.UNMAPPED:
        return -errno.EFAULT
    return emulate.emulate_instruction(vcpu, emulate.EMULTYPE_PF)


def append_internal_data(vcpu: Vcpu, *words: int) -> None:
    """More debug words behind `internal.data[:ndata]`."""
    internal = vcpu.kvm_run.internal
    for word in words:
        internal.data[internal.ndata] = word
        internal.ndata += 1


def unexpected_exit(vcpu: Vcpu, reason: int) -> int:
    """KVM_EXIT_INTERNAL_ERROR, suberror UNEXPECTED_EXIT_REASON: data are the reason and the core."""
    internal = vcpu.kvm_run.internal
    internal.suberror, internal.ndata = uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, 0
    append_internal_data(vcpu, reason, vcpu.cpu_index)
    return vcpu.exit_to_user(uapi.KVM_EXIT_INTERNAL_ERROR)


def fail_entry(vcpu: Vcpu, reason: int) -> int:
    """KVM_EXIT_FAIL_ENTRY: the silicon refused the guest state."""
    failure = vcpu.kvm_run.fail_entry
    failure.hardware_entry_failure_reason, failure.cpu = reason, vcpu.cpu_index
    return vcpu.exit_to_user(uapi.KVM_EXIT_FAIL_ENTRY)


def handle_exception(vcpu: Vcpu) -> int:
    """An exception that KVM intercepted and does not know what to do with."""
    info, exception = vcpu.exit, vcpu.kvm_run.ex
    exception.exception, exception.error_code = info.interruption & 0xFF, info.interruption_error
    return vcpu.exit_to_user(uapi.KVM_EXIT_EXCEPTION)
