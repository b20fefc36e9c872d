"""MSRs: what RDMSR, WRMSR and KVM_{GET,SET}_MSRS do, and which MSRs a VMM should know of.

Answers to Linux 6.1 `arch/x86/kvm/x86.c` (`kvm_{get,set}_msr()`, `msrs_to_save_all`) and `Documentation/virt/kvm/api.rst`. An MSR that is
not in `msr_table.HANDLERS` does not exist: #GP for the guest, a short count for the ioctl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.intel import PERF_CAPABILITIES
from softkvm.kvm import mce
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr_index import IA32_APIC_BASE as IA32_APIC_BASE
from softkvm.kvm.msr_kinds import MsrError as MsrError
from softkvm.kvm.msr_kinds import UnknownMsr
from softkvm.kvm.msr_table import HANDLERS
from softkvm.kvm.pmu import amd as pmu_amd
from softkvm.kvm.pmu import intel as pmu_intel
from softkvm.kvm.pmu.offer import supported_capabilities
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.types import Model, Vcpu


class MsrState:
    """The MSRs of one vCPU that are nothing but a value, and the machine check banks."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Values after RESET, with the model's own where it has any."""
        silicon = vcpu.model.msrs()
        self.machine_check = mce.MachineCheck()
        self.enforce_pv_features = False
        """KVM_CAP_ENFORCE_PV_FEATURE_CPUID: paravirtual MSRs exist only if leaf 40000001h says so."""
        self.values: dict[int, int] = {
            n.IA32_MISC_ENABLE: silicon.get(n.IA32_MISC_ENABLE, 0) | n.MISC_ENABLE_BTS_UNAVAILABLE | n.MISC_ENABLE_PEBS_UNAVAILABLE,
            n.PLATFORM_INFO: silicon.get(n.PLATFORM_INFO, 0) & ~n.PLATFORM_INFO_CPUID_FAULT,
            n.IA32_ARCH_CAPABILITIES: silicon.get(n.IA32_ARCH_CAPABILITIES, 0),
            n.IA32_UCODE_REV: silicon.get(n.IA32_UCODE_REV, 1 << 32),
            n.DE_CFG: n.DE_CFG_LFENCE_SERIALIZE,
            uapi.MSR_KVM_POLL_CONTROL: 1,
            PERF_CAPABILITIES: vcpu.vm.perf_capabilities,
        }

    @property
    def host_polls(self) -> bool:
        """Whether the guest lets its host wait awake in HLT; a guest that polls itself does not."""
        return bool(self.values[uapi.MSR_KVM_POLL_CONTROL] & 1)


def get(vcpu: Vcpu, index: int, host_initiated: bool) -> int:
    """Read an MSR; MsrError if it does not exist or may not be read."""
    handler = HANDLERS.get(index)
    if handler is None:
        raise UnknownMsr(index)
    return handler.get(vcpu, index, host_initiated)


def set(vcpu: Vcpu, index: int, value: int, host_initiated: bool) -> None:
    """Write an MSR; MsrError if it does not exist, may not be written, or refuses the value."""
    handler = HANDLERS.get(index)
    if handler is None:
        raise UnknownMsr(index)
    handler.set(vcpu, index, value, host_initiated)


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
    n.IA32_PKRS,
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
    n.IA32_SMBASE,
    n.PLATFORM_INFO,
    n.MISC_FEATURES_ENABLES,
    n.POWER_CTL,
    n.IA32_UCODE_REV,
    n.HWCR,
)
_SAVED_INTEL = (n.IA32_FEATURE_CONTROL,)
_FEATURE_MSRS = (n.IA32_UCODE_REV, n.IA32_ARCH_CAPABILITIES)
_FEATURE_MSRS_AMD = (n.DE_CFG,)
_FEATURE_MSRS_INTEL = (PERF_CAPABILITIES,)


def index_list(model: Model) -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: the MSRs that a VMM should save and restore."""
    if model.vendor == "amd":
        return [*_SAVED, *pmu_amd.saved_msrs(model)]
    return [*_SAVED, *_SAVED_INTEL, *pmu_intel.saved_msrs(model)]


def feature_index_list(model: Model) -> list[int]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe what KVM offers."""
    return [*_FEATURE_MSRS, *(_FEATURE_MSRS_AMD if model.vendor == "amd" else _FEATURE_MSRS_INTEL)]


def get_feature(model: Model, index: int) -> int:
    """KVM_GET_MSRS of the system: the offered value of a feature MSR; MsrError if it is none."""
    if index not in feature_index_list(model):
        raise MsrError(index)
    if index == n.DE_CFG:
        return n.DE_CFG_LFENCE_SERIALIZE
    if index == PERF_CAPABILITIES:
        return supported_capabilities(model)
    return model.msrs().get(index, 1 << 32 if index == n.IA32_UCODE_REV else 0)
