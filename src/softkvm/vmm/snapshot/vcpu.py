"""A vCPU's state by KVM's ioctls, in an order in which no step undoes another.

Answers to Linux 6.1 `Documentation/virt/kvm/api.rst`. The special registers have the APIC's mode, so they come before its page; the page
has the timer's mode, so it comes before the TSC deadline; a deadline is a TSC value, so it comes after the TSC (`clock.py`), as do the MSRs
that have KVM write time into guest memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from softkvm import kvm
from softkvm.uapi import kvm as uapi
from softkvm.vmm.assembly import tell_of_pause
from softkvm.vmm.errors import StateError
from softkvm.vmm.snapshot.records import VcpuState, from_blob, to_blob

_IA32_TSC, _TSC_DEADLINE = 0x10, 0x6E0
_PERF_CAPABILITIES, _DEBUGCTL = 0x345, 0x1D9
_MTRRS = (*range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x2FF)
_BRANCH_RECORDS = (0x1C8, 0x1C9, *range(0x680, 0x6A0), *range(0x6C0, 0x6E0), *range(0xDC0, 0xDE0))
"""State that KVM_GET_MSR_INDEX_LIST leaves out: SDM vol. 4, tables 2-2 and 2-39. PERF_CAPABILITIES comes first, as writing it resets
counters; branch records that are zero stay untouched, as writing one claims them all."""
_TIME_MSRS = (
    uapi.MSR_KVM_WALL_CLOCK,
    uapi.MSR_KVM_SYSTEM_TIME,
    uapi.MSR_KVM_WALL_CLOCK_NEW,
    uapi.MSR_KVM_SYSTEM_TIME_NEW,
    uapi.MSR_KVM_STEAL_TIME,
    _TSC_DEADLINE,
)


def save(vcpu: kvm.Vcpu, indices: Iterable[int], tsc: int) -> VcpuState:
    """The state of a vCPU that stands still; `indices` are the MSRs that KVM lists, `tsc` is its TSC at the snapshot's instant."""
    mp_state = vcpu.get_mp_state().mp_state  # first, because it acts on INIT and SIPI that wait
    return VcpuState(
        mp_state=mp_state,
        tsc_khz=vcpu.get_tsc_khz(),
        tsc=tsc,
        sregs=to_blob(vcpu.get_sregs2()),
        regs=to_blob(vcpu.get_regs()),
        xcrs=to_blob(vcpu.get_xcrs()),
        xsave=to_blob(vcpu.get_xsave()),
        debugregs=to_blob(vcpu.get_debugregs()),
        lapic=to_blob(vcpu.get_lapic()),
        events=to_blob(vcpu.get_vcpu_events()),
        msrs=_get_msrs(vcpu, (_PERF_CAPABILITIES, *(index for index in indices if index != _IA32_TSC), *_MTRRS, _DEBUGCTL))
        + [(index, value) for index, value in _get_msrs(vcpu, _BRANCH_RECORDS) if value],
    )


def _get_msrs(vcpu: kvm.Vcpu, indices: Iterable[int]) -> list[tuple[int, int]]:
    """Those of the MSRs that the vCPU has."""
    return [(index, value) for index in indices for value in vcpu.get_msrs([index])]


def restore_registers(vcpu: kvm.Vcpu, state: VcpuState) -> None:
    """Take over what does not depend on the TSC; OSError, StateError."""
    vcpu.set_tsc_khz(state.tsc_khz)
    vcpu.set_sregs2(from_blob(uapi.Sregs2, state.sregs))
    vcpu.set_regs(from_blob(uapi.Regs, state.regs))
    vcpu.set_xcrs(from_blob(uapi.Xcrs, state.xcrs))
    vcpu.set_xsave(from_blob(uapi.Xsave, state.xsave))
    vcpu.set_debugregs(from_blob(uapi.Debugregs, state.debugregs))
    vcpu.set_lapic(from_blob(uapi.LapicState, state.lapic))
    _set_msrs(vcpu, [(index, value) for index, value in state.msrs if index not in _TIME_MSRS])


def restore_events(vcpu: kvm.Vcpu, state: VcpuState) -> None:
    """Take over the rest; OSError, StateError."""
    _set_msrs(vcpu, [(index, value) for index, value in state.msrs if index in _TIME_MSRS])
    vcpu.set_vcpu_events(from_blob(uapi.VcpuEvents, state.events))
    vcpu.set_mp_state(uapi.MpState(mp_state=state.mp_state))
    tell_of_pause(vcpu)


def _set_msrs(vcpu: kvm.Vcpu, values: list[tuple[int, int]]) -> None:
    done = vcpu.set_msrs(values)
    if done != len(values):
        index, value = values[done]
        raise StateError(f"the MSR {index:#x} cannot be {value:#x}")
