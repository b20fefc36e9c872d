"""Registers between the ABI's structures and the silicon's state, with Linux's checks.

Answers to Linux 6.1 `arch/x86/kvm/x86.c`: `__get_regs()`, `__set_sregs()`, `kvm_is_valid_{cr0,cr4,sregs}()`, `kvm_vcpu_ioctl_x86_{get,set}_
{debugregs,vcpu_events}()`; SDM vol. 3, 2.5 (control registers) and 25.4.1 (access rights).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from softkvm.kvm import cpuid, events, guest_debug, smm
from softkvm.kvm.cpuid import Feature
from softkvm.kvm.request import REQ_EVENT, REQ_NMI, REQ_SMI, REQ_TLB_FLUSH, REQ_TRIPLE_FAULT
from softkvm.silicon.control import Segment as HardwareSegment
from softkvm.silicon.control import SegmentRegister
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS, LDTR, TR = (int(register) for register in SegmentRegister)

CR0_PE = 1 << 0
CR0_NW = 1 << 29
CR0_CD = 1 << 30
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
CR4_MCE = 1 << 6
CR4_LA57 = 1 << 12
CR4_VMXE = 1 << 13
CR4_SMXE = 1 << 14
CR4_PCIDE = 1 << 17
CR4_OSXSAVE = 1 << 18
CR4_PKE = 1 << 22
CR4_PKS = 1 << 24
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_FIXED = 1 << 1
_CR4_ALWAYS = 0x1FF  # VME PVI TSD DE PSE PAE MCE PGE PCE
_CR4_FEATURES = (
    (1 << 9 | 1 << 10, Feature(1, 0, 3, 25)),  # OSFXSR, OSXMMEXCPT: SSE
    (1 << 11, Feature(7, 0, 2, 2)),  # UMIP
    (CR4_LA57, Feature(7, 0, 2, 16)),
    (1 << 16, Feature(7, 0, 1, 0)),  # FSGSBASE
    (CR4_PCIDE, Feature(1, 0, 2, 17)),
    (CR4_OSXSAVE, Feature(1, 0, 2, 26)),
    (1 << 20, Feature(7, 0, 1, 7)),  # SMEP
    (1 << 21, Feature(7, 0, 1, 20)),  # SMAP
    (CR4_PKE, Feature(7, 0, 2, 3)),
    (CR4_PKS, Feature(7, 0, 2, 31)),
)
"""CR4 bits that need a feature of CPUID."""

_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
_SEGMENTS = (("cs", CS), ("ds", DS), ("es", ES), ("fs", FS), ("gs", GS), ("ss", SS), ("tr", TR), ("ldt", LDTR))
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_UNUSABLE = 1 << 16


def cr4_reserved(vcpu: Vcpu) -> int:
    """CR4 bits that the guest's CPUID does not allow (`__cr4_reserved_bits()`)."""
    allowed = _CR4_ALWAYS
    for bits, feature in _CR4_FEATURES:
        if vcpu.cpuid.has(feature):
            allowed |= bits
    return ~allowed & (1 << 64) - 1


def is_64_bit_mode(vcpu: Vcpu) -> bool:
    """Whether the guest executes 64-bit code."""
    state = vcpu.state
    return bool(state.efer & EFER_LMA and state.segments[CS].access_rights & 1 << 13)


def linear_rip(vcpu: Vcpu) -> int:
    """`kvm_get_linear_rip()`."""
    state = vcpu.state
    return int(state.rip) if is_64_bit_mode(vcpu) else state.segments[CS].base + state.rip & 0xFFFF_FFFF


def cpl(vcpu: Vcpu) -> int:
    """Current privilege level: SS.DPL, 0 in real mode."""
    state = vcpu.state
    return state.segments[SS].access_rights >> 5 & 3 if state.cr0 & CR0_PE else 0


def get_regs(vcpu: Vcpu) -> uapi.Regs:
    """KVM_GET_REGS."""
    state = vcpu.state
    return uapi.Regs(rip=state.rip, rflags=guest_debug.visible_rflags(vcpu), **dict(zip(_GENERAL, state.gpr, strict=True)))


def set_regs(vcpu: Vcpu, regs: uapi.Regs) -> None:
    """KVM_SET_REGS: also drops an exception that waits to be injected."""
    state = vcpu.state
    for index, name in enumerate(_GENERAL):
        state.gpr[index] = getattr(regs, name)
    state.rip = regs.rip
    guest_debug.set_rflags(vcpu, regs.rflags)
    vcpu.events.exception_pending = False
    vcpu.make_request(REQ_EVENT)


def get_segment(segment: HardwareSegment) -> uapi.Segment:
    """The hidden part taken apart."""
    rights = segment.access_rights
    unusable = rights >> 16 & 1
    return uapi.Segment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        type=rights & 15,
        present=rights >> 7 & 1 & ~unusable,
        dpl=rights >> 5 & 3,
        db=rights >> 14 & 1,
        s=rights >> 4 & 1,
        l=rights >> 13 & 1,
        g=rights >> 15 & 1,
        avl=rights >> 12 & 1,
        unusable=unusable,
    )


def set_segment(segment: HardwareSegment, value: uapi.Segment) -> None:
    """The inverse: a segment that is unusable or not present is loaded as unusable."""
    segment.base, segment.limit, segment.selector = value.base, value.limit, value.selector
    rights = value.type & 15 | (value.s & 1) << 4 | (value.dpl & 3) << 5 | (value.present & 1) << 7
    rights |= (value.avl & 1) << 12 | (value.l & 1) << 13 | (value.db & 1) << 14 | (value.g & 1) << 15
    segment.access_rights = rights | (_UNUSABLE if value.unusable or not value.present else 0)


def get_cr8(vcpu: Vcpu) -> int:
    """The task priority."""
    return vcpu.lapic.cr8 if vcpu.lapic is not None else int(vcpu.state.cr8)


def set_cr8(vcpu: Vcpu, value: int) -> bool:
    """`kvm_set_cr8()`; False (a #GP) for a reserved bit."""
    if value & ~0xF:
        return False
    if vcpu.lapic is not None:
        vcpu.lapic.cr8 = value
    else:
        vcpu.state.cr8 = value
    return True


def get_sregs(vcpu: Vcpu) -> uapi.Sregs:
    """KVM_GET_SREGS."""
    sregs = uapi.Sregs()
    _get_common(vcpu, sregs)
    queue = vcpu.events
    vector = queue.interrupt_nr if queue.interrupt_injected and not queue.interrupt_soft else vcpu.userspace_irq
    if vector >= 0:
        sregs.interrupt_bitmap[vector >> 6] = 1 << (vector & 63)
    return sregs


def set_sregs(vcpu: Vcpu, sregs: uapi.Sregs) -> None:
    """KVM_SET_SREGS; OSError(EINVAL) for a state that no CPU can be in, with nothing changed."""
    _set_common(vcpu, sregs)
    for word, bits in enumerate(sregs.interrupt_bitmap):
        if bits:
            vcpu.events.queue_interrupt(word * 64 + (bits & -bits).bit_length() - 1, False)
            break


def get_sregs2(vcpu: Vcpu) -> uapi.Sregs2:
    """KVM_GET_SREGS2."""
    sregs = uapi.Sregs2()
    _get_common(vcpu, sregs)
    if _pae_paging(sregs):
        sregs.flags = uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
        sregs.pdptrs[:] = vcpu.state.pdpte[:]
    return sregs


def set_sregs2(vcpu: Vcpu, sregs: uapi.Sregs2) -> None:
    """KVM_SET_SREGS2; OSError(EINVAL) as KVM_SET_SREGS, and for PDPTEs without PAE paging."""
    if sregs.flags & ~uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID or (sregs.flags and not _pae_paging(sregs)):
        raise OSError(errno.EINVAL, "bad flags")
    _set_common(vcpu, sregs)
    if sregs.flags:
        vcpu.state.pdpte[:] = sregs.pdptrs[:]


def _pae_paging(sregs: uapi.Sregs | uapi.Sregs2) -> bool:
    return bool(sregs.cr0 & CR0_PG and sregs.cr4 & CR4_PAE and not sregs.efer & EFER_LMA)


def _get_common(vcpu: Vcpu, sregs: uapi.Sregs | uapi.Sregs2) -> None:
    state = vcpu.state
    for name, index in _SEGMENTS:
        setattr(sregs, name, get_segment(state.segments[index]))
    sregs.gdt.base, sregs.gdt.limit = state.gdtr.base, state.gdtr.limit
    sregs.idt.base, sregs.idt.limit = state.idtr.base, state.idtr.limit
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    sregs.cr8 = get_cr8(vcpu)
    sregs.apic_base = vcpu.apic_base


def check_sregs(vcpu: Vcpu, sregs: uapi.Sregs | uapi.Sregs2) -> bool:
    """`kvm_is_valid_sregs()`: whether a CPU can be in that state."""
    if not valid_control_registers(vcpu, sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer):
        return False
    return bool(sregs.efer & EFER_LMA or not sregs.cs.l)


def valid_control_registers(vcpu: Vcpu, cr0: int, cr3: int, cr4: int, efer: int) -> bool:
    """Whether a CPU of this CPUID can have them together."""
    if cr0 >> 32 or (cr0 & CR0_NW and not cr0 & CR0_CD) or (cr0 & CR0_PG and not cr0 & CR0_PE):
        return False
    if cr4 & cr4_reserved(vcpu):
        return False
    if cr0 & CR0_PG and efer & EFER_LME:
        return bool(cr4 & CR4_PAE and efer & EFER_LMA and not cr3 >> vcpu.cpuid.physical_address_bits)
    return not efer & EFER_LMA


def _set_common(vcpu: Vcpu, sregs: uapi.Sregs | uapi.Sregs2) -> None:
    if not check_sregs(vcpu, sregs):
        raise OSError(errno.EINVAL, "no CPU can be in this state")
    vcpu.set_apic_base(sregs.apic_base)
    state = vcpu.state
    for name, index in _SEGMENTS:
        set_segment(state.segments[index], getattr(sregs, name))
    state.gdtr.base, state.gdtr.limit = sregs.gdt.base, sregs.gdt.limit
    state.idtr.base, state.idtr.limit = sregs.idt.base, sregs.idt.limit
    for name in _CONTROL:
        setattr(state, name, getattr(sregs, name))
    set_cr8(vcpu, sregs.cr8 & 0xF)
    control_registers_changed(vcpu)
    if vcpu.vcpu_id == vcpu.vm.boot_cpu_id and state.rip == 0xFFF0 and sregs.cs.selector == 0xF000 and not state.cr0 & CR0_PE:
        vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE  # user space that resets a vCPU by its registers alone
    vcpu.make_request(REQ_EVENT)


def control_registers_changed(vcpu: Vcpu) -> None:
    """KVM wrote CR0, CR3, CR4 or EFER: the shadows, what CPUID shows of CR4, and the TLB follow."""
    vcpu.control.cr0_shadow, vcpu.control.cr4_shadow = vcpu.state.cr0, vcpu.state.cr4
    cpuid.update_runtime(vcpu)
    vcpu.make_request(REQ_TLB_FLUSH)


def get_debugregs(vcpu: Vcpu) -> uapi.Debugregs:
    """KVM_GET_DEBUGREGS."""
    own = vcpu.debug_registers
    debugregs = uapi.Debugregs(dr6=own.dr6, dr7=own.dr7)
    debugregs.db[:] = list(own.dr)
    return debugregs


def set_debugregs(vcpu: Vcpu, debugregs: uapi.Debugregs) -> None:
    """KVM_SET_DEBUGREGS; OSError(EINVAL) for flags, and for DR6 and DR7 above 32 bits."""
    if debugregs.flags or debugregs.dr6 >> 32 or debugregs.dr7 >> 32:
        raise OSError(errno.EINVAL, "bad debug registers")
    own = vcpu.debug_registers
    own.dr[:] = debugregs.db[:]
    own.dr6 = debugregs.dr6 | events.DR6_FIXED
    own.dr7 = debugregs.dr7 | 1 << 10


def get_vcpu_events(vcpu: Vcpu) -> uapi.VcpuEvents:
    """KVM_GET_VCPU_EVENTS: a pending exception is reported as injected unless its payload is still apart."""
    if vcpu.requests & REQ_NMI:
        vcpu.clear_request(REQ_NMI)
        events.process_nmi(vcpu)
        vcpu.make_request(REQ_EVENT)
    queue, state = vcpu.events, vcpu.state
    result = uapi.VcpuEvents()
    exception: Any = result.exception
    exception.injected = queue.exception_injected or (queue.exception_pending and not vcpu.vm.exception_payload)
    exception.pending = queue.exception_pending and vcpu.vm.exception_payload
    exception.nr, exception.has_error_code, exception.error_code = queue.vector, queue.has_error, queue.error_code
    if vcpu.vm.exception_payload:
        result.exception_has_payload, result.exception_payload = queue.payload is not None, queue.payload or 0
    result.interrupt.injected = queue.interrupt_injected and not queue.interrupt_soft
    result.interrupt.nr = queue.interrupt_nr
    result.interrupt.shadow = shadow_to_abi(state.interruptibility)
    result.nmi.injected = queue.nmi_injected
    result.nmi.pending = queue.nmi_pending != 0
    result.nmi.masked = bool(state.interruptibility & events.BLOCKED_BY_NMI)
    result.sipi_vector = 0  # never valid when reporting
    result.smi.smm, result.smi.pending = vcpu.smm.active, vcpu.smm.pending or bool(vcpu.requests & REQ_SMI)
    result.smi.smm_inside_nmi = vcpu.smm.inside_nmi
    result.smi.latched_init = vcpu.lapic is not None and vcpu.lapic.pending_init
    result.flags = uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW | uapi.KVM_VCPUEVENT_VALID_SMM
    if vcpu.vm.exception_payload:
        result.flags |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    if vcpu.vm.triple_fault_event:
        result.triple_fault.pending = bool(vcpu.requests & REQ_TRIPLE_FAULT)
        result.flags |= uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    return result


_VALID_EVENTS = (
    uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    | uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | uapi.KVM_VCPUEVENT_VALID_SHADOW
    | uapi.KVM_VCPUEVENT_VALID_SMM
    | uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    | uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
)


def _check_events(vcpu: Vcpu, new: uapi.VcpuEvents) -> bool:
    flags, exception = new.flags, new.exception
    if flags & ~_VALID_EVENTS:
        return False
    if flags & uapi.KVM_VCPUEVENT_VALID_PAYLOAD:
        if not vcpu.vm.exception_payload or (exception.pending and exception.injected):
            return False
    elif exception.pending:
        return False
    if (exception.injected or exception.pending) and (exception.nr > 31 or exception.nr == events.NMI):
        return False
    waits = vcpu.mp_state == uapi.KVM_MP_STATE_INIT_RECEIVED
    if flags & uapi.KVM_VCPUEVENT_VALID_SMM and (new.smi.smm or new.smi.pending) and waits:
        return False
    return not flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT or vcpu.vm.triple_fault_event


def set_vcpu_events(vcpu: Vcpu, new: uapi.VcpuEvents) -> None:
    """KVM_SET_VCPU_EVENTS; OSError(EINVAL) for unknown flags, vectors above 31, or fields of capabilities that are off."""
    if not _check_events(vcpu, new):
        raise OSError(errno.EINVAL, "bad vCPU events")
    queue, state, flags, exception = vcpu.events, vcpu.state, new.flags, new.exception
    payload = flags & uapi.KVM_VCPUEVENT_VALID_PAYLOAD and new.exception_has_payload
    queue.exception_injected, queue.exception_pending = bool(exception.injected), bool(exception.pending)
    queue.vector, queue.has_error, queue.error_code = exception.nr, bool(exception.has_error_code), exception.error_code
    queue.payload = new.exception_payload if payload else None
    queue.interrupt_injected, queue.interrupt_nr = bool(new.interrupt.injected), new.interrupt.nr
    queue.interrupt_soft = bool(new.interrupt.soft)
    if flags & uapi.KVM_VCPUEVENT_VALID_SHADOW:
        state.interruptibility = state.interruptibility & ~events.SHADOW | shadow_from_abi(new.interrupt.shadow)
    queue.nmi_injected = bool(new.nmi.injected)
    if flags & uapi.KVM_VCPUEVENT_VALID_NMI_PENDING:
        queue.nmi_pending = new.nmi.pending
    masked = events.BLOCKED_BY_NMI if new.nmi.masked else 0
    state.interruptibility = state.interruptibility & ~events.BLOCKED_BY_NMI | masked
    if flags & uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR and vcpu.lapic is not None:
        vcpu.lapic.sipi_vector = new.sipi_vector
    if flags & uapi.KVM_VCPUEVENT_VALID_SMM:
        _set_smi(vcpu, new.smi)
    if flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT:
        vcpu.set_triple_fault(bool(new.triple_fault.pending))
    vcpu.make_request(REQ_EVENT)


def _set_smi(vcpu: Vcpu, new: uapi.EventSmi) -> None:
    if bool(new.smm) != vcpu.smm.active:
        smm.changed(vcpu, bool(new.smm))
    vcpu.smm.pending = bool(new.pending)
    vcpu.smm.inside_nmi = bool(new.smm and new.smm_inside_nmi)
    if vcpu.lapic is not None:
        vcpu.lapic.pending_init = bool(new.latched_init)


def shadow_to_abi(interruptibility: int) -> int:
    """Bit 0 STI, bit 1 MOV SS of the silicon to KVM's masks, which are the other way round."""
    return (interruptibility & 1) << 1 | (interruptibility & 2) >> 1


def shadow_from_abi(shadow: int) -> int:
    """The inverse; MOV SS wins over STI, as a VM entry with both fails."""
    if shadow & uapi.KVM_X86_SHADOW_INT_MOV_SS:
        return 2
    return 1 if shadow & uapi.KVM_X86_SHADOW_INT_STI else 0
