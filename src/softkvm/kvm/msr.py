"""MSRs: what RDMSR, WRMSR and KVM_{GET,SET}_MSRS do, MSR by MSR.

Answers to SDM vol. 4, APM vol. 2 appendix A, and Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_{get,set}_msr_common()`), `vmx/vmx.c`, `svm/svm.c`.
MSRs that the silicon keeps are fields of `State`, those of clocks and the local APIC live there, the rest in `MsrState`. An MSR that is
not in the table does not exist: #GP for the guest, a short count for the ioctl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from softkvm.kvm import cpuid, kvmclock, mce, mtrr, request
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr_index import IA32_APIC_BASE as IA32_APIC_BASE
from softkvm.silicon.control import SegmentRegister
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.cpuid import Feature
    from softkvm.kvm.types import Model, Vcpu

_U32, _U64 = 0xFFFF_FFFF, (1 << 64) - 1
_CR0_PG, _CR4_LA57 = 1 << 31, 1 << 12
_APIC_BASE_X2APIC, _APIC_BASE_ENABLE = 1 << 10, 1 << 11
_APIC_BASE_RESERVED = 0x2FF
_X2APIC_MSRS = range(0x800, 0x900)
_SPEED_OF_K7 = 0x2000_0000
_BBL_CR_CTL3 = 0xBE70_2111
_EBC_FREQUENCY = 1 << 24
_PERF_STATUS = 1000 | 4 << 40  # TSC increment and bus ratio of a CPU that does not change its clock


class MsrError(Exception):
    """The MSR does not exist, or refuses the value: #GP(0) for the guest, the end of the array for KVM_{GET,SET}_MSRS."""

    def __init__(self, index: int) -> None:
        super().__init__(f"MSR {index:#x}")
        self.index = index


class MsrState:
    """The MSRs of one vCPU that are nothing but a value, and the machine check banks."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Values after RESET, with the model's own where it has any."""
        silicon = vcpu.model.msrs()
        self.machine_check = mce.MachineCheck()
        self.enforce_pv_features = False
        """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: paravirtual MSRs exist only if leaf 40000001h says so."""
        self.values = {
            n.IA32_MISC_ENABLE: silicon.get(n.IA32_MISC_ENABLE, 0) | n.MISC_ENABLE_BTS_UNAVAILABLE | n.MISC_ENABLE_PEBS_UNAVAILABLE,
            n.PLATFORM_INFO: silicon.get(n.PLATFORM_INFO, 0) & ~n.PLATFORM_INFO_CPUID_FAULT,
            n.IA32_ARCH_CAPABILITIES: silicon.get(n.IA32_ARCH_CAPABILITIES, 0),
            n.IA32_UCODE_REV: silicon.get(n.IA32_UCODE_REV, 1 << 32),
            n.DE_CFG: n.DE_CFG_LFENCE_SERIALIZE,
            uapi.MSR_KVM_POLL_CONTROL: 1,
        }


class Handler(NamedTuple):
    """How one MSR is read and written; both raise MsrError, and get whether user space asks (`host_initiated`)."""

    get: Callable[[Vcpu, int, bool], int]
    set: Callable[[Vcpu, int, int, bool], None]


def get(vcpu: Vcpu, index: int, host_initiated: bool) -> int:
    """Read an MSR; MsrError if it does not exist or may not be read."""
    handler = _HANDLERS.get(index)
    if handler is None:
        raise MsrError(index)
    return handler.get(vcpu, index, host_initiated)


def set(vcpu: Vcpu, index: int, value: int, host_initiated: bool) -> None:
    """Write an MSR; MsrError if it does not exist, may not be written, or refuses the value."""
    handler = _HANDLERS.get(index)
    if handler is None:
        raise MsrError(index)
    handler.set(vcpu, index, value, host_initiated)


# --- Kinds of MSR ------------------------------------------------------------------------------------------------------------------

Check = Callable[["Vcpu", int, int, bool], bool]
"""Whether a write of (vcpu, index, value, host_initiated) is allowed."""


def _anything(_vcpu: Vcpu, _index: int, _value: int, _host: bool) -> bool:
    return True


def _from_host(_vcpu: Vcpu, _index: int, _value: int, host: bool) -> bool:
    return host


def _refuse(_vcpu: Vcpu, index: int, _value: int, _host: bool) -> None:
    raise MsrError(index)


def _ignore(_vcpu: Vcpu, _index: int, _value: int, _host: bool) -> None:
    """A write that silicon takes and KVM has no use for."""


def _unreadable(_vcpu: Vcpu, index: int, _host: bool) -> int:
    raise MsrError(index)


def _require(condition: bool, index: int) -> None:
    if not condition:
        raise MsrError(index)


def _constant(value: int, write: Callable[[Vcpu, int, int, bool], None] = _refuse) -> Handler:
    return Handler(lambda _vcpu, _index, _host: value, write)


def _stored(check: Check = _anything, feature: Feature | None = None) -> Handler:
    """A value in `MsrState.values`; the guest needs `feature`, if one is named."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        _require(host or feature is None or vcpu.cpuid.has(feature), index)
        return vcpu.msrs.values.get(index, 0)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        _require(host or feature is None or vcpu.cpuid.has(feature), index)
        _require(check(vcpu, index, value, host), index)
        vcpu.msrs.values[index] = value

    return Handler(read, write)


def _resident(name: str, check: Check = _anything, features: tuple[Feature, ...] = ()) -> Handler:
    """A field of `State`; the guest needs one of `features`, if any are named."""

    def offered(vcpu: Vcpu, host: bool) -> bool:
        return host or not features or any(vcpu.cpuid.has(feature) for feature in features)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        _require(offered(vcpu, host), index)
        return int(getattr(vcpu.state, name))

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        _require(offered(vcpu, host) and check(vcpu, index, value, host), index)
        setattr(vcpu.state, name, value)

    return Handler(read, write)


def _of_intel(handler: Handler) -> Handler:
    """An MSR that AMD CPUs do not have."""

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        _require(vcpu.model.vendor == "intel", index)
        return handler.get(vcpu, index, host)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        _require(vcpu.model.vendor == "intel", index)
        handler.set(vcpu, index, value, host)

    return Handler(read, write)


def _paravirtual(handler: Handler, bit: int) -> Handler:
    """An MSR of the KVM feature `bit`, which need not be offered unless user space enforces that."""
    feature = cpuid.Feature(cpuid.HYPERVISOR_FEATURES, 0, cpuid.EAX, bit)

    def read(vcpu: Vcpu, index: int, host: bool) -> int:
        _require(not vcpu.msrs.enforce_pv_features or vcpu.cpuid.has(feature), index)
        return handler.get(vcpu, index, host)

    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        _require(not vcpu.msrs.enforce_pv_features or vcpu.cpuid.has(feature), index)
        handler.set(vcpu, index, value, host)

    return Handler(read, write)


def _sysenter_pointer(name: str) -> Handler:
    """Made canonical rather than refused: AMD CPUs take any value, and the silicon of an Intel model must not see a bad one."""

    def write(vcpu: Vcpu, _index: int, value: int, _host: bool) -> None:
        width = _linear_address_bits(vcpu)
        sign = value & 1 << width - 1
        setattr(vcpu.state, name, (value & (1 << width) - 1) - (sign << 1) & _U64)

    return Handler(lambda vcpu, _index, _host: int(getattr(vcpu.state, name)), write)


def _segment_base(segment: SegmentRegister) -> Handler:
    def write(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
        _require(_canonical(vcpu, index, value, host), index)
        vcpu.state.segments[segment].base = value

    return Handler(lambda vcpu, _index, _host: int(vcpu.state.segments[segment].base), write)


# --- Checks ------------------------------------------------------------------------------------------------------------------------


def _linear_address_bits(vcpu: Vcpu) -> int:
    return 57 if vcpu.state.cr4 & _CR4_LA57 else 48


def _canonical(vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    sign = _linear_address_bits(vcpu) - 1
    return value >> sign in (0, _U64 >> sign)


def _memory_type(vcpu: Vcpu, index: int, value: int, _host: bool) -> bool:
    return mtrr.is_valid(index, value, vcpu.cpuid.physical_address_bits)


def _spec_ctrl(vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    return not value & ~(n.SPEC_CTRL_IBRS | n.SPEC_CTRL_STIBP | n.SPEC_CTRL_SSBD)


def _lockable(vcpu: Vcpu, index: int, value: int, host: bool) -> bool:
    locked = vcpu.msrs.values.get(index, 0) & n.FEATURE_CONTROL_LOCKED
    return not value & ~n.FEATURE_CONTROL_LOCKED and (host or not locked)


def _no_cpuid_fault(_vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    return value == 0  # PLATFORM_INFO does not offer CPUID faulting


def _only_enable(_vcpu: Vcpu, _index: int, value: int, _host: bool) -> bool:
    return not value >> 1


def _decode_config(_vcpu: Vcpu, _index: int, value: int, host: bool) -> bool:
    return value == n.DE_CFG_LFENCE_SERIALIZE or (host and value == 0)


# --- MSRs with a behaviour of their own -----------------------------------------------------------------------------------------------


def _set_efer(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    state, table = vcpu.state, vcpu.cpuid
    _require(not value & ~(n.EFER_SCE | n.EFER_LME | n.EFER_LMA | n.EFER_NX | n.EFER_FFXSR), index)
    if not host:
        needs = ((n.EFER_NX, cpuid.NX), (n.EFER_FFXSR, cpuid.FXSR_OPT), (n.EFER_LME | n.EFER_LMA, cpuid.LM))
        _require(all(table.has(feature) for bits, feature in needs if value & bits), index)
        _require(not (state.cr0 & _CR0_PG and (state.efer ^ value) & n.EFER_LME), index)
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


def _set_tsc_aux(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    _require(host or vcpu.cpuid.has(cpuid.RDTSCP) or vcpu.cpuid.has(cpuid.RDPID), index)
    _require(vcpu.cpuid.is_amd or not value >> 32, index)  # AMD drops the upper half
    vcpu.state.tsc_aux = value & _U32


def _get_tsc_aux(vcpu: Vcpu, index: int, host: bool) -> int:
    _require(host or vcpu.cpuid.has(cpuid.RDTSCP) or vcpu.cpuid.has(cpuid.RDPID), index)
    return int(vcpu.state.tsc_aux)


def _set_apic_base(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """SDM vol. 3, 11.12.5: from disabled only to xAPIC, from x2APIC only to disabled."""
    modes = _APIC_BASE_X2APIC | _APIC_BASE_ENABLE
    old, new = vcpu.apic_base & modes, value & modes
    reserved = _APIC_BASE_RESERVED | (0 if vcpu.cpuid.has(cpuid.X2APIC) else _APIC_BASE_X2APIC)
    _require(not value & reserved and not value >> vcpu.cpuid.physical_address_bits and new != _APIC_BASE_X2APIC, index)
    if not host:
        _require(not (old == modes and new == _APIC_BASE_ENABLE) and not (old == 0 and new == modes), index)
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
        _require(not (old ^ value) & (n.MISC_ENABLE_BTS_UNAVAILABLE | n.MISC_ENABLE_PEBS_UNAVAILABLE), index)
        value = value & ~n.MISC_ENABLE_EMON | old & n.MISC_ENABLE_EMON
    vcpu.msrs.values[index] = value


def _set_ucode_rev(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    if host:  # a guest writes 0 before it asks, and reads the revision
        vcpu.msrs.values[index] = value


def _set_debugctl(_vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    """Branch recording is not offered: its bits are dropped, all others refused."""
    _require(not value & ~(n.DEBUGCTL_LBR | n.DEBUGCTL_BTF), index)


def _set_pred_cmd(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """A barrier for branch prediction, which this silicon does not do."""
    _require(host or vcpu.cpuid.has(cpuid.SPEC_CTRL) or vcpu.cpuid.has(cpuid.AMD_IBPB), index)
    _require(not value & ~n.PRED_CMD_IBPB, index)


def _set_hwcr(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    value &= ~n.HWCR_IGNORED
    _require(value in (0, n.HWCR_MC_STATUS_WRITE), index)
    vcpu.msrs.values[index] = value


def _zero_only(_vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    _require(value == 0, index)


def _get_machine_check(vcpu: Vcpu, index: int, host: bool) -> int:
    value = vcpu.msrs.machine_check.read(index, host)
    if value is None:
        raise MsrError(index)
    return value


def _set_machine_check(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    status_writable = vcpu.cpuid.is_amd and bool(vcpu.msrs.values.get(n.HWCR, 0) & n.HWCR_MC_STATUS_WRITE)
    _require(vcpu.msrs.machine_check.write(index, value, host, status_writable), index)


def _set_wall_clock(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    vcpu.msrs.values[uapi.MSR_KVM_WALL_CLOCK] = value
    vcpu.vm.kvmclock.write_wall_clock(value)


def _get_wall_clock(vcpu: Vcpu, _index: int, _host: bool) -> int:
    return vcpu.msrs.values.get(uapi.MSR_KVM_WALL_CLOCK, 0)


def _set_system_time(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    vcpu.pvclock.set_system_time(value, index == uapi.MSR_KVM_SYSTEM_TIME, host)


def _set_steal_time(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    _require(not value & kvmclock.STEAL_RESERVED, index)
    vcpu.pvclock.set_steal_time(value)


# --- The table -----------------------------------------------------------------------------------------------------------------------

_WALL_CLOCK = Handler(_get_wall_clock, _set_wall_clock)
_SYSTEM_TIME = Handler(lambda vcpu, _index, _host: vcpu.pvclock.system_time_msr, _set_system_time)
_STEAL_TIME = Handler(lambda vcpu, _index, _host: vcpu.pvclock.steal_msr, _set_steal_time)
_MACHINE_CHECK = Handler(_get_machine_check, _set_machine_check)
_ZERO, _IGNORED = _constant(0), _constant(0, _ignore)
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
    n.P6_PERFCTR0,
    n.P6_PERFCTR1,
    n.P6_EVNTSEL0,
    n.P6_EVNTSEL1,
    *range(n.K7_EVNTSEL0, n.K7_PERFCTR0 + 4),
    n.NB_CFG,
    n.PATCH_LOADER,
    n.VM_IGNNE,
    n.VM_HSAVE_PA,
    n.DC_CFG,
    n.BU_CFG2,
    n.EX_CFG,
)

_HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(_READ_AS_ZERO, _ZERO),
    **dict.fromkeys(_READ_AS_ZERO_WRITES_IGNORED, _IGNORED),
    **dict.fromkeys(_X2APIC_MSRS, Handler(_get_x2apic, _set_x2apic)),
    **dict.fromkeys(mtrr.ALL, _stored(_memory_type)),
    **dict.fromkeys((*mce.BANKS, *mce.BANKS_CTL2, n.IA32_MCG_STATUS, n.IA32_MCG_CTL), _MACHINE_CHECK),
    n.IA32_MCG_CAP: Handler(_get_machine_check, _refuse),
    n.IA32_MTRRCAP: _constant(mtrr.CAPABILITIES),
    n.IA32_PAT: _resident("pat", _memory_type),
    n.IA32_APIC_BASE: Handler(lambda vcpu, _index, _host: vcpu.apic_base, _set_apic_base),
    n.IA32_TSC: Handler(lambda vcpu, _index, _host: vcpu.tsc.read(), _set_tsc),
    n.IA32_TSC_ADJUST: Handler(lambda vcpu, _index, _host: vcpu.tsc.adjust, _set_tsc_adjust),
    n.IA32_TSC_DEADLINE: Handler(_get_tsc_deadline, _set_tsc_deadline),
    n.TSC_AUX: Handler(_get_tsc_aux, _set_tsc_aux),
    n.EFER: Handler(lambda vcpu, _index, _host: vcpu.state.efer, _set_efer),
    n.STAR: _resident("star"),
    n.LSTAR: _resident("lstar", _canonical),
    n.CSTAR: _resident("cstar", _canonical),
    n.SYSCALL_MASK: _resident("fmask"),
    n.KERNEL_GS_BASE: _resident("kernel_gs_base", _canonical),
    n.FS_BASE: _segment_base(SegmentRegister.FS),
    n.GS_BASE: _segment_base(SegmentRegister.GS),
    n.IA32_SYSENTER_CS: _resident("sysenter_cs"),
    n.IA32_SYSENTER_ESP: _sysenter_pointer("sysenter_esp"),
    n.IA32_SYSENTER_EIP: _sysenter_pointer("sysenter_eip"),
    n.IA32_SPEC_CTRL: _resident("spec_ctrl", _spec_ctrl, (cpuid.SPEC_CTRL, cpuid.AMD_IBRS, cpuid.AMD_STIBP, cpuid.AMD_SSBD)),
    n.IA32_PRED_CMD: Handler(_unreadable, _set_pred_cmd),
    n.IA32_XSS: _resident("xss", lambda _vcpu, _index, value, _host: value == 0, (cpuid.XSAVES,)),
    n.IA32_DEBUGCTL: Handler(lambda vcpu, _index, _host: vcpu.state.debugctl, _set_debugctl),
    n.IA32_FEATURE_CONTROL: _of_intel(_stored(_lockable)),
    n.IA32_MISC_ENABLE: Handler(lambda vcpu, index, _host: vcpu.msrs.values[index], _set_misc_enable),
    n.IA32_UCODE_REV: Handler(lambda vcpu, index, _host: vcpu.msrs.values[index], _set_ucode_rev),
    n.IA32_ARCH_CAPABILITIES: _stored(_from_host, cpuid.ARCH_CAPABILITIES),
    n.PLATFORM_INFO: _stored(_from_host),
    n.MISC_FEATURES_ENABLES: _stored(_no_cpuid_fault),
    n.POWER_CTL: _stored(),
    n.SMI_COUNT: _stored(_from_host),
    n.IA32_PERF_STATUS: _constant(_PERF_STATUS),
    n.EBC_FREQUENCY_ID: _constant(_EBC_FREQUENCY),
    n.FSB_FREQ: _constant(3),
    n.BBL_CR_CTL3: _constant(_BBL_CR_CTL3, _ignore),
    n.HWCR: Handler(lambda vcpu, index, _host: vcpu.msrs.values.get(index, 0), _set_hwcr),
    n.DE_CFG: _stored(_decode_config),
    n.K7_CLK_CTL: _constant(_SPEED_OF_K7, _ignore),
    n.MMIO_CONF_BASE: _constant(0, _zero_only),
    n.OSVW_ID_LENGTH: _stored(_from_host),
    n.OSVW_STATUS: _stored(_from_host),
    uapi.MSR_KVM_WALL_CLOCK: _paravirtual(_WALL_CLOCK, uapi.KVM_FEATURE_CLOCKSOURCE),
    uapi.MSR_KVM_WALL_CLOCK_NEW: _paravirtual(_WALL_CLOCK, uapi.KVM_FEATURE_CLOCKSOURCE2),
    uapi.MSR_KVM_SYSTEM_TIME: _paravirtual(_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE),
    uapi.MSR_KVM_SYSTEM_TIME_NEW: _paravirtual(_SYSTEM_TIME, uapi.KVM_FEATURE_CLOCKSOURCE2),
    uapi.MSR_KVM_STEAL_TIME: _paravirtual(_STEAL_TIME, uapi.KVM_FEATURE_STEAL_TIME),
    uapi.MSR_KVM_POLL_CONTROL: _paravirtual(_stored(_only_enable), uapi.KVM_FEATURE_POLL_CONTROL),
}

# --- Lists -----------------------------------------------------------------------------------------------------------------------------

_SAVED = (
    n.IA32_TSC,
    n.IA32_SYSENTER_CS,
    n.IA32_SYSENTER_ESP,
    n.IA32_SYSENTER_EIP,
    n.STAR,
    n.CSTAR,
    n.KERNEL_GS_BASE,
    n.SYSCALL_MASK,
    n.LSTAR,
    n.IA32_PAT,
    n.TSC_AUX,
    n.IA32_SPEC_CTRL,
    uapi.MSR_KVM_WALL_CLOCK,
    uapi.MSR_KVM_SYSTEM_TIME,
    uapi.MSR_KVM_WALL_CLOCK_NEW,
    uapi.MSR_KVM_SYSTEM_TIME_NEW,
    uapi.MSR_KVM_STEAL_TIME,
    uapi.MSR_KVM_POLL_CONTROL,
    n.IA32_TSC_ADJUST,
    n.IA32_TSC_DEADLINE,
    n.IA32_ARCH_CAPABILITIES,
    n.IA32_MISC_ENABLE,
    n.IA32_MCG_STATUS,
    n.IA32_MCG_CTL,
    n.SMI_COUNT,
    n.PLATFORM_INFO,
    n.MISC_FEATURES_ENABLES,
    n.POWER_CTL,
    n.IA32_UCODE_REV,
    n.HWCR,
)
_SAVED_INTEL = (n.IA32_FEATURE_CONTROL,)
_FEATURE_MSRS = (n.IA32_UCODE_REV, n.IA32_ARCH_CAPABILITIES)
_FEATURE_MSRS_AMD = (n.DE_CFG,)


def index_list(model: Model) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the MSRs that a VMM should save and restore."""
    return [*_SAVED, *(() if model.vendor == "amd" else _SAVED_INTEL)]


def feature_index_list(model: Model) -> list[int]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe what KVM offers."""
    return [*_FEATURE_MSRS, *(_FEATURE_MSRS_AMD if model.vendor == "amd" else ())]


def get_feature(model: Model, index: int) -> int:
    """KVM_GET_MSRS of the system: the offered value of a feature MSR; MsrError if it is none."""
    if index not in feature_index_list(model):
        raise MsrError(index)
    if index == n.DE_CFG:
        return n.DE_CFG_LFENCE_SERIALIZE
    return model.msrs().get(index, 1 << 32 if index == n.IA32_UCODE_REV else 0)
