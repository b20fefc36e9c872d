"""Intel's virtual PMU: what CPUID leaf 0Ah and PERF_CAPABILITIES give the guest, and its registers.

Answers to Linux 6.1 `arch/x86/kvm/vmx/pmu_intel.c` and `vmx/capabilities.h`, and SDM vol. 3, ch. 20.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.intel import (
    EVENTSEL0,
    FIXED,
    FIXED_CTR0,
    FIXED_CTR_CTRL,
    FULL_WIDTH_PMC0,
    FULL_WIDTH_WRITE,
    GLOBAL_CTRL,
    GLOBAL_OVF_CTRL,
    GLOBAL_STATUS,
    LBR_FORMAT,
    PERF_CAPABILITIES,
    PMC0,
)
from softkvm.kvm import cpuid
from softkvm.kvm.msr_kinds import Handler, MsrError, require
from softkvm.kvm.pmu.offer import MAX_FIXED, MAX_GENERIC, supported_capabilities, supported_leaf
from softkvm.kvm.pmu.passthrough import COND_CHANGED, OVF_DS

if TYPE_CHECKING:
    from softkvm.kvm.cpuid_policy import Registers
    from softkvm.kvm.pmu.counter import Counter
    from softkvm.kvm.pmu.vpmu import VirtualPmu
    from softkvm.kvm.types import Model, Vcpu

INSTRUCTIONS = 0x00C0
"""Code of the event to which KVM adds the instructions that it has executed."""

_LEAF = 0xA
_EVENTSEL_RESERVED = 0xFFFF_FFFF_0020_0000
_RAW_EVENT_MASK = 0xFFDF_FFFF & ~(1 << 16 | 1 << 17 | 1 << 19 | 1 << 20 | 1 << 22)
"""Event, unit mask, EDGE, INV and CMASK."""
_FIXED_FIELD = 0b1011
"""OS, USR and PMI of FIXED_CTR_CTRL; ANY is reserved."""


def refresh(vcpu: Vcpu, pmu: VirtualPmu) -> None:
    """`intel_pmu_refresh()`."""
    leaf: Registers | None = vcpu.cpuid.lookup(_LEAF, 0)
    offered = supported_leaf(vcpu.model)
    version = 0 if leaf is None else leaf.eax & 0xFF
    if leaf is None or not version or not offered[0]:
        return
    pmu.version = version
    generic = min(leaf.eax >> 8 & 0xFF, offered[0] >> 8 & 0xFF)
    fixed = min(leaf.edx & 0x1F, offered[3] & 0x1F) if version > 1 else 0
    pmu.set_counters(generic, fixed)
    pmu.mask = (1 << min(leaf.eax >> 16 & 0xFF, offered[0] >> 16 & 0xFF)) - 1
    pmu.raw_event_mask, pmu.eventsel_reserved = _RAW_EVENT_MASK, _EVENTSEL_RESERVED
    pmu.has_global_ctrl = version > 1
    pmu.global_ctrl_mask = (1 << generic) - 1 | (1 << fixed) - 1 << FIXED
    if not pmu.has_global_ctrl:
        pmu.set_global_ctrl(pmu.global_ctrl_mask)


# --- Registers ---------------------------------------------------------------------------------------------------------------------


def _counter(vcpu: Vcpu, index: int, first: int, base: int = 0) -> Counter:
    """The counter that an MSR belongs to; MsrError if the guest does not have it."""
    counter = vcpu.pmu.counters.get(index - first + base)
    if counter is None:
        raise MsrError(index)
    counter.used = True
    return counter


def _need_global(vcpu: Vcpu, index: int) -> VirtualPmu:
    require(vcpu.pmu.has_global_ctrl, index)
    return vcpu.pmu


def _get_pmc(vcpu: Vcpu, index: int, host: bool) -> int:
    if index - PMC0 not in vcpu.pmu.counters and index < PMC0 + 2:
        return 0  # P6 counters of a guest without this PMU read as zero
    return _counter(vcpu, index, PMC0).read()


def _set_pmc(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """32 bits, sign-extended; user space restores all of them."""
    if index - PMC0 not in vcpu.pmu.counters and index < PMC0 + 2:
        return
    if not host:
        value = (value & 0xFFFF_FFFF ^ 1 << 31) - (1 << 31)
    _counter(vcpu, index, PMC0).write(value & vcpu.pmu.mask)


def _get_full_width(vcpu: Vcpu, index: int, _host: bool) -> int:
    require(bool(vcpu.msrs.values[PERF_CAPABILITIES] & FULL_WIDTH_WRITE), index)
    return _counter(vcpu, index, FULL_WIDTH_PMC0).read()


def _set_full_width(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    require(bool(vcpu.msrs.values[PERF_CAPABILITIES] & FULL_WIDTH_WRITE) and not value & ~vcpu.pmu.mask, index)
    _counter(vcpu, index, FULL_WIDTH_PMC0).write(value)


def _get_eventsel(vcpu: Vcpu, index: int, _host: bool) -> int:
    if index - EVENTSEL0 not in vcpu.pmu.counters and index < EVENTSEL0 + 2:
        return 0
    return _counter(vcpu, index, EVENTSEL0).eventsel


def _set_eventsel(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    if index - EVENTSEL0 not in vcpu.pmu.counters and index < EVENTSEL0 + 2:
        return
    counter = _counter(vcpu, index, EVENTSEL0)
    require(not value & vcpu.pmu.eventsel_reserved, index)
    vcpu.pmu.set_eventsel(counter, value)


def _get_fixed(vcpu: Vcpu, index: int, _host: bool) -> int:
    return _counter(vcpu, index, FIXED_CTR0, FIXED).read()


def _set_fixed(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    counter = _counter(vcpu, index, FIXED_CTR0, FIXED)
    require(host or not value & ~vcpu.pmu.mask, index)
    counter.write(value)


def _get_fixed_ctr_ctrl(vcpu: Vcpu, index: int, _host: bool) -> int:
    return _need_global(vcpu, index).fixed_ctr_ctrl


def _set_fixed_ctr_ctrl(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    pmu = _need_global(vcpu, index)
    allowed = sum(_FIXED_FIELD << (idx - FIXED) * 4 for idx in pmu.counters if idx >= FIXED)
    require(not value & ~allowed, index)
    pmu.set_fixed_ctr_ctrl(value)


def _get_global_status(vcpu: Vcpu, index: int, _host: bool) -> int:
    return _need_global(vcpu, index).global_status


def _set_global_status(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    require(host, index)
    _need_global(vcpu, index).global_status = value


def _get_global_ctrl(vcpu: Vcpu, index: int, _host: bool) -> int:
    return _need_global(vcpu, index).global_ctrl


def _set_global_ctrl(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    pmu = _need_global(vcpu, index)
    require(not value & ~pmu.global_ctrl_mask, index)
    pmu.set_global_ctrl(value)


def _get_global_ovf_ctrl(vcpu: Vcpu, index: int, _host: bool) -> int:
    _need_global(vcpu, index)
    return 0


def _set_global_ovf_ctrl(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    pmu = _need_global(vcpu, index)
    require(not value & ~(pmu.global_ctrl_mask | OVF_DS | COND_CHANGED), index)
    if not host:
        pmu.global_status &= ~value


def _get_capabilities(vcpu: Vcpu, index: int, host: bool) -> int:
    require(host or vcpu.cpuid.has(cpuid.PDCM), index)
    return vcpu.msrs.values[PERF_CAPABILITIES]


def _set_capabilities(vcpu: Vcpu, index: int, value: int, host: bool) -> None:
    """Only user space writes it: what the host has, and an LBR format only for a guest of the host's own model."""
    supported = supported_capabilities(vcpu.model)
    require(host and not (value and not vcpu.pmu.version), index)
    require(not value & ~LBR_FORMAT & ~supported, index)
    if value & LBR_FORMAT:
        require(value & LBR_FORMAT == supported & LBR_FORMAT and vcpu.lbr.same_model, index)
    vcpu.msrs.values[PERF_CAPABILITIES] = value
    vcpu.pmu.refresh()
    vcpu.lbr.refresh()


_FULL_WIDTH = range(FULL_WIDTH_PMC0, FULL_WIDTH_PMC0 + MAX_GENERIC)

HANDLERS: dict[int, Handler] = {
    **dict.fromkeys(range(PMC0, PMC0 + MAX_GENERIC), Handler(_get_pmc, _set_pmc)),
    **dict.fromkeys(range(EVENTSEL0, EVENTSEL0 + MAX_GENERIC), Handler(_get_eventsel, _set_eventsel)),
    **dict.fromkeys(_FULL_WIDTH, Handler(_get_full_width, _set_full_width)),
    **dict.fromkeys(range(FIXED_CTR0, FIXED_CTR0 + MAX_FIXED), Handler(_get_fixed, _set_fixed)),
    FIXED_CTR_CTRL: Handler(_get_fixed_ctr_ctrl, _set_fixed_ctr_ctrl),
    GLOBAL_STATUS: Handler(_get_global_status, _set_global_status),
    GLOBAL_CTRL: Handler(_get_global_ctrl, _set_global_ctrl),
    GLOBAL_OVF_CTRL: Handler(_get_global_ovf_ctrl, _set_global_ovf_ctrl),
    PERF_CAPABILITIES: Handler(_get_capabilities, _set_capabilities),
}


def saved_msrs(model: Model) -> list[int]:
    """What KVM_GET_MSR_INDEX_LIST adds: the registers of the counters that there can be."""
    eax, _, _, edx = supported_leaf(model)
    if not eax:
        return []
    generic, fixed = eax >> 8 & 0xFF, edx & 0x1F
    registers = [FIXED_CTR_CTRL, GLOBAL_STATUS, GLOBAL_CTRL, GLOBAL_OVF_CTRL]
    for base, count in ((FIXED_CTR0, fixed), (PMC0, generic), (EVENTSEL0, generic)):
        registers += range(base, base + count)
    return registers
