"""The table of MSRs: which exist, and what each does.

Answers to SDM vol. 4, APM vol. 2 appendix A, and Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_{get,set}_msr_common()`), `vmx/vmx.c`, `svm/svm.c`.
MSRs that the silicon keeps are fields of `State`, those of clocks and the local APIC live there, the rest in `MsrState`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.kvm import cpuid, kvmclock, lbr, mce, mtrr, request
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr_kinds import (
    Handler,
    MsrError,
    canonical,
    constant,
    decode_config,
    from_host,
    ignore,
    lockable,
    memory_type,
    no_cpuid_fault,
    of_intel,
    only_enable,
    paravirtual,
    refuse,
    require,
    resident,
    segment_base,
    spec_ctrl,
    stored,
    sysenter_pointer,
    unreadable,
)
from softkvm.kvm.pmu import amd as pmu_amd
from softkvm.kvm.pmu import intel as pmu_intel
from softkvm.silicon.control import SegmentRegister
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.types import Vcpu

_U32 = 0xFFFF_FFFF
_CR0_PG = 1 << 31
_APIC_BASE_X2APIC, _APIC_BASE_ENABLE = 1 << 10, 1 << 11
_APIC_BASE_RESERVED = 0x2FF
_X2APIC_MSRS = range(0x800, 0x900)
_SPEED_OF_K7 = 0x2000_0000
_BBL_CR_CTL3 = 0xBE70_2111
_EBC_FREQUENCY = 1 << 24
_PERF_STATUS = 1000 | 4 << 40  # TSC increment and bus ratio of a CPU that does not change its clock


def _set_efer(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    state, table = vcpu.state, vcpu.cpuid
    require(not value & ~(n.EFER_SCE | n.EFER_LME | n.EFER_LMA | n.EFER_NX | n.EFER_FFXSR), index)
    if not host:
        needs = ((n.EFER_NX, cpuid.NX), (n.EFER_FFXSR, cpuid.FXSR_OPT), (n.EFER_LME | n.EFER_LMA, cpuid.LM))
        require(all(table.has(feature) for bits, feature in needs if value & bits), index)
        require(not (state.cr0 & _CR0_PG and (state.efer ^ value) & n.EFER_LME), index)
    value = value & ~n.EFER_LMA | state.efer & n.EFER_LMA
    if (state.efer ^ value) & n.EFER_NX:
        vcpu.make_request(request.REQ_TLB_FLUSH)
    state.efer = value


def _set_tsc(vcpu: Vcpu, _index: int, value: int, host: bool) -> None:
    if host:
        vcpu.tsc.synchronize(value)
    else:
        vcpu.tsc.guest_write(value)


def _set_tsc_adjust(vcpu: Vcpu, _index: int, value: int, host: bool) -> None:
    if not vcpu.cpuid.has(cpuid.TSC_ADJUST):
        return
    if host:
        vcpu.tsc.adjust = value
    else:
        vcpu.tsc.guest_write_adjust(value)


def _get_tsc_deadline(vcpu: Vcpu, _index: int, _host: bool) -> int:
    return 0 if vcpu.lapic is None else vcpu.lapic.tsc_deadline


def _set_tsc_deadline(vcpu: Vcpu, _index: int, value: int, _host: bool) -> None:
    if vcpu.lapic is not None:
        vcpu.lapic.set_tsc_deadline(value)


_POLL_CONTROL = stored(only_enable)


def _set_poll_control(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    _POLL_CONTROL.set(vcpu, index, value, host)
    vcpu.control.halt_window = 0  # the next HLT exits, and `halt.py` chooses


def _set_tsc_aux(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    require(host or vcpu.cpuid.has(cpuid.RDTSCP) or vcpu.cpuid.has(cpuid.RDPID), index)
    require(vcpu.cpuid.is_amd or not value >> 32, index)  # AMD drops the upper half
    vcpu.state.tsc_aux = value & _U32


def _get_tsc_aux(vcpu: Vcpu, index: int, host: bool) -> int:
    require(host or vcpu.cpuid.has(cpuid.RDTSCP) or vcpu.cpuid.has(cpuid.RDPID), index)
    return int(vcpu.state.tsc_aux)


def _set_apic_base(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """SDM vol. 3, 11.12.5: from disabled only to xAPIC, from x2APIC only to disabled."""
    modes = _APIC_BASE_X2APIC | _APIC_BASE_ENABLE
    old, new = vcpu.apic_base & modes, value & modes
    reserved = _APIC_BASE_RESERVED | (0 if vcpu.cpuid.has(cpuid.X2APIC) else _APIC_BASE_X2APIC)
    require(not value & reserved and not value >> vcpu.cpuid.physical_address_bits and new != _APIC_BASE_X2APIC, index)
    if not host:
        require(not (old == modes and new == _APIC_BASE_ENABLE) and not (old == 0 and new == modes), index)
    if vcpu.lapic is not None:
        vcpu.lapic.set_base(value)
    else:
        vcpu.apic_base = value
        cpuid.update_runtime(vcpu)


def _get_x2apic(vcpu: Vcpu, index: int, _host: bool) -> int:
    if vcpu.lapic is None:
        raise MsrError(index)
    return vcpu.lapic.msr_read(index)


def _set_x2apic(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    if vcpu.lapic is None:
        raise MsrError(index)
    vcpu.lapic.msr_write(index, value)


def _set_misc_enable(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    old = vcpu.msrs.values[index]
    if not host:
        require(not (old ^ value) & (n.MISC_ENABLE_BTS_UNAVAILABLE | n.MISC_ENABLE_PEBS_UNAVAILABLE), index)
        value = value & ~n.MISC_ENABLE_EMON | old & n.MISC_ENABLE_EMON
    vcpu.msrs.values[index] = value


def _set_ucode_rev(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    if host:  # a guest writes 0 before it asks, and reads the revision
        vcpu.msrs.values[index] = value


def _set_pred_cmd(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """A barrier for branch prediction, which this silicon does not do."""
    require(host or vcpu.cpuid.has(cpuid.SPEC_CTRL) or vcpu.cpuid.has(cpuid.AMD_IBPB), index)
    require(not value & ~n.PRED_CMD_IBPB, index)


def _get_platform_info(vcpu: Vcpu, index: int, host: bool) -> int:
    require(host or vcpu.vm.guest_reads_platform_info, index)
    return vcpu.msrs.values[index]


def _get_smbase(vcpu: Vcpu, index: int, host: bool) -> int:
    require(host, index)
    return vcpu.smm.base


def _set_smbase(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    require(host, index)
    vcpu.smm.base = value & 0xFFFF_FFFF


def _set_hwcr(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    value &= ~n.HWCR_IGNORED
    require(value in (0, n.HWCR_MC_STATUS_WRITE), index)
    vcpu.msrs.values[index] = value


def _zero_only(_vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    require(value == 0, index)


def _get_machine_check(vcpu: Vcpu, index: int, host: bool) -> int:
    value = vcpu.msrs.machine_check.read(index, host)
    if value is None:
        raise MsrError(index)
    return value


def _set_machine_check(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    status_writable = vcpu.cpuid.is_amd and bool(vcpu.msrs.values.get(n.HWCR, 0) & n.HWCR_MC_STATUS_WRITE)
    require(vcpu.msrs.machine_check.write(index, value, host, status_writable), index)


def _set_wall_clock(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    vcpu.msrs.values[uapi.MSR_KVM_WALL_CLOCK] = value
    vcpu.vm.kvmclock.write_wall_clock(value)


def _get_wall_clock(vcpu: Vcpu, _index: int, _host: bool) -> int:
    return vcpu.msrs.values.get(uapi.MSR_KVM_WALL_CLOCK, 0)


def _set_system_time(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    vcpu.pvclock.set_system_time(value, index == uapi.MSR_KVM_SYSTEM_TIME, host)


def _set_steal_time(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    require(not value & kvmclock.STEAL_RESERVED, index)
    vcpu.pvclock.set_steal_time(value)


# --- The table -----------------------------------------------------------------------------------------------------------------------

_WALL_CLOCK = Handler(_get_wall_clock, _set_wall_clock)
_SYSTEM_TIME = Handler(lambda vcpu, _index, _host: vcpu.pvclock.system_time_msr, _set_system_time)
_STEAL_TIME = Handler(lambda vcpu, _index, _host: vcpu.pvclock.steal_msr, _set_steal_time)
_MACHINE_CHECK = Handler(_get_machine_check, _set_machine_check)
_ZERO, _IGNORED = constant(0), constant(0, ignore)
_READ_AS_ZERO = (
    n.P5_MC_ADDR,
    n.P5_MC_TYPE,
    n.IA32_PLATFORM_ID,
    n.EBL_CR_POWERON,
    n.LAST_BRANCH_FROM,
    n.LAST_BRANCH_TO,
    n.LAST_INT_FROM,
    n.LAST_INT_TO,
    n.IA32_PERF_CTL,
    n.RAPL_POWER_UNIT,
    n.PKG_ENERGY,
    n.DRAM_ENERGY,
    n.PP0_ENERGY,
    n.PP1_ENERGY,
    n.SYSCFG,
    n.INT_PENDING_MSG,
    n.TSEG_ADDR,
    n.TSEG_MASK,
    n.VM_CR,
    n.IC_CFG,
)
_READ_AS_ZERO_WRITES_IGNORED = (
    n.IA32_UCODE_WRITE,
    n.NB_CFG,
    n.PATCH_LOADER,
    n.VM_IGNNE,
    n.VM_HSAVE_PA,
    n.DC_CFG,
    n.BU_CFG2,
    n.EX_CFG,
)

HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_READ_AS_ZERO, _ZERO),
    **dict.fromkeys(_READ_AS_ZERO_WRITES_IGNORED, _IGNORED),
    **dict.fromkeys(_X2APIC_MSRS, Handler(_get_x2apic, _set_x2apic)),
    **dict.fromkeys(mtrr.ALL, stored(memory_type)),
    **dict.fromkeys((*mce.BANKS, *mce.BANKS_CTL2, n.IA32_MCG_STATUS, n.IA32_MCG_CTL), _MACHINE_CHECK),
    n.IA32_MCG_CAP: Handler(_get_machine_check, refuse),
    n.IA32_MTRRCAP: constant(mtrr.CAPABILITIES),
    n.IA32_PAT: resident("pat", memory_type),
    n.IA32_APIC_BASE: Handler(lambda vcpu, _index, _host: vcpu.apic_base, _set_apic_base),
    n.IA32_TSC: Handler(lambda vcpu, _index, _host: vcpu.tsc.read(), _set_tsc),
    n.IA32_TSC_ADJUST: Handler(lambda vcpu, _index, _host: vcpu.tsc.adjust, _set_tsc_adjust),
    n.IA32_TSC_DEADLINE: Handler(_get_tsc_deadline, _set_tsc_deadline),
    n.TSC_AUX: Handler(_get_tsc_aux, _set_tsc_aux),
    n.EFER: Handler(lambda vcpu, _index, _host: vcpu.state.efer, _set_efer),
    n.STAR: resident("star"),
    n.LSTAR: resident("lstar", canonical),
    n.CSTAR: resident("cstar", canonical),
    n.SYSCALL_MASK: resident("fmask"),
    n.KERNEL_GS_BASE: resident("kernel_gs_base", canonical),
    n.FS_BASE: segment_base(SegmentRegister.FS),
    n.GS_BASE: segment_base(SegmentRegister.GS),
    n.IA32_SYSENTER_CS: resident("sysenter_cs"),
    n.IA32_SYSENTER_ESP: sysenter_pointer("sysenter_esp"),
    n.IA32_SYSENTER_EIP: sysenter_pointer("sysenter_eip"),
    n.IA32_SPEC_CTRL: resident("spec_ctrl", spec_ctrl, (cpuid.SPEC_CTRL, cpuid.AMD_IBRS, cpuid.AMD_STIBP, cpuid.AMD_SSBD)),
    n.IA32_PRED_CMD: Handler(unreadable, _set_pred_cmd),
    n.IA32_PKRS: resident("pkrs", lambda _vcpu, _index, value, _host: not value >> 32, (cpuid.PKS,)),
    n.IA32_XSS: resident("xss", lambda _vcpu, _index, value, _host: value == 0, (cpuid.XSAVES,)),
    n.IA32_FEATURE_CONTROL: of_intel(stored(lockable)),
    n.IA32_MISC_ENABLE: Handler(lambda vcpu, index, _host: vcpu.msrs.values[index], _set_misc_enable),
    n.IA32_UCODE_REV: Handler(lambda vcpu, index, _host: vcpu.msrs.values[index], _set_ucode_rev),
    n.IA32_ARCH_CAPABILITIES: stored(from_host, cpuid.ARCH_CAPABILITIES),
    n.PLATFORM_INFO: Handler(_get_platform_info, stored(from_host).set),
    n.MISC_FEATURES_ENABLES: stored(no_cpuid_fault),
    n.POWER_CTL: stored(),
    n.SMI_COUNT: stored(from_host),
    n.IA32_SMBASE: Handler(_get_smbase, _set_smbase),
    n.IA32_PERF_STATUS: constant(_PERF_STATUS),
    n.EBC_FREQUENCY_ID: constant(_EBC_FREQUENCY),
    n.FSB_FREQ: constant(3),
    n.BBL_CR_CTL3: constant(_BBL_CR_CTL3, ignore),
    n.HWCR: Handler(lambda vcpu, index, _host: vcpu.msrs.values.get(index, 0), _set_hwcr),
    n.DE_CFG: stored(decode_config),
    n.K7_CLK_CTL: constant(_SPEED_OF_K7, ignore),
    n.MMIO_CONF_BASE: constant(0, _zero_only),
    n.OSVW_ID_LENGTH: stored(from_host),
    n.OSVW_STATUS: stored(from_host),
    **{index: of_intel(handler) for index, handler in pmu_intel.HANDLERS.items()},
    **{index: of_intel(handler) for index, handler in lbr.HANDLERS.items()},
    n.IA32_DEBUGCTL: Handler(lbr.get_debugctl, lbr.set_debugctl),
    **pmu_amd.HANDLERS,
    uapi.MSR_KVM_WALL_CLOCK: paravirtual(_WALL_CLOCK, uapi.KVM_FEATURE_CLOCKSOURCE),
    uapi.MSR_KVM_WALL_CLOCK_NEW: paravirtual(_WALL_CLOCK, uapi.KVM_FEATURE_CLOCKSOURCE2),
    uapi.MSR_KVM_SYSTEM_TIME: paravirtual(_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE),
    uapi.MSR_KVM_SYSTEM_TIME_NEW: paravirtual(_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE2),
    uapi.MSR_KVM_STEAL_TIME: paravirtual(_STEAL_TIME, uapi.KVM_FEATURE_STEAL_TIME),
    uapi.MSR_KVM_POLL_CONTROL: paravirtual(Handler(_POLL_CONTROL.get, _set_poll_control), uapi.KVM_FEATURE_POLL_CONTROL),
}
