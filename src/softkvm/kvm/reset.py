"""RESET, INIT and SIPI.

Answers to SDM vol. 3, table 10-1 (state after power-up, RESET and INIT) and 9.4 (SIPI), and Linux 6.1 `kvm_vcpu_reset()` and
`kvm_apic_accept_events()`.
"""

from __future__ import annotations

from ctypes import addressof, memset, sizeof
from typing import TYPE_CHECKING

from softkvm.kvm import regs
from softkvm.kvm.request import REQ_EVENT
from softkvm.kvm.smm import DEFAULT_BASE
from softkvm.silicon.control import SegmentRegister
from softkvm.uapi.kvm import KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE

if TYPE_CHECKING:
    from softkvm.kvm.vcpu import Vcpu

_DATA_RIGHTS, _CODE_RIGHTS, _LDT_RIGHTS, _TSS_RIGHTS = 0x93, 0x9B, 0x82, 0x8B
_RIGHTS = {SegmentRegister.CS: _CODE_RIGHTS, SegmentRegister.LDTR: _LDT_RIGHTS, SegmentRegister.TR: _TSS_RIGHTS}
_CLEARED_MSRS = ["star", "lstar", "cstar", "fmask", "kernel_gs_base", "sysenter_cs", "sysenter_esp", "sysenter_eip", "tsc_aux", "spec_ctrl"]
PAT_DEFAULT = 0x0007_0406_0007_0406


def reset(vcpu: Vcpu, init: bool) -> None:
    """Put the vCPU into the state after RESET, or after INIT (`init`), which leaves caches, FPU and most MSRs alone."""
    state = vcpu.state
    kept_cr0 = state.cr0 & (regs.CR0_CD | regs.CR0_NW) if init else regs.CR0_CD | regs.CR0_NW
    if vcpu.lapic is not None:
        vcpu.lapic.reset(init)
    vcpu.events.clear()
    for index, segment in enumerate(state.segments):
        segment.selector, segment.base, segment.limit = 0, 0, 0xFFFF
        segment.access_rights = _RIGHTS.get(SegmentRegister(index), _DATA_RIGHTS)
    state.segments[regs.CS].selector, state.segments[regs.CS].base = 0xF000, 0xFFFF_0000
    for table in (state.gdtr, state.idtr):
        table.base, table.limit = 0, 0xFFFF
    state.gpr[:] = [0] * 16
    version = vcpu.cpuid.lookup(1, 0)
    state.gpr[regs.RDX] = version[0] if version is not None else 0x600
    state.rip, state.rflags = 0xFFF0, regs.RFLAGS_FIXED
    state.cr0 = 0x10 | kept_cr0
    state.cr2 = state.cr3 = state.cr4 = state.cr8 = state.efer = 0
    own = vcpu.debug_registers
    own.dr[:] = [0] * 4
    own.dr6, own.dr7 = 0xFFFF_0FF0, 0x400
    state.pending_debug = state.interruptibility = state.activity = 0
    state.debugctl = 0
    if not init:
        _power_up(vcpu)
        vcpu.pmu.reset()
        vcpu.lbr.release()
    regs.control_registers_changed(vcpu)
    vcpu.make_request(REQ_EVENT)


def _power_up(vcpu: Vcpu) -> None:
    """What RESET clears and INIT does not: FPU, XCR0, system-call MSRs, SMBASE."""
    state = vcpu.state
    vcpu.smm.base = DEFAULT_BASE
    fpu = state.fpu
    memset(addressof(fpu), 0, sizeof(fpu))
    fpu.fcw, fpu.mxcsr = 0x37F, 0x1F80
    state.xcr0, state.xss = 1, 0
    state.pat = PAT_DEFAULT
    for name in _CLEARED_MSRS:
        setattr(state, name, 0)


def accept_events(vcpu: Vcpu) -> None:
    """Act on INIT and SIPI that the local APIC has received (`kvm_apic_accept_events()`); a SIPI counts only after an INIT."""
    lapic = vcpu.lapic
    if lapic is None:
        return
    if vcpu.smm.active:  # INIT waits for RSM; a SIPI would count in the wait for it only
        lapic.sipi_vector = None
        return
    if lapic.pending_init:
        lapic.pending_init = False
        reset(vcpu, init=True)
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE if vcpu.vcpu_id == vcpu.vm.boot_cpu_id else KVM_MP_STATE_INIT_RECEIVED
    vector, lapic.sipi_vector = lapic.sipi_vector, None
    if vector is not None and vcpu.mp_state == KVM_MP_STATE_INIT_RECEIVED:
        code = vcpu.state.segments[regs.CS]
        code.selector, code.base = vector << 8, vector << 12
        vcpu.state.rip = 0
        vcpu.mp_state = KVM_MP_STATE_RUNNABLE
