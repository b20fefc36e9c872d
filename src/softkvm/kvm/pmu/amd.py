"""AMD's virtual PMU: four counters under the names of the K7, or six under their own as well.

Answers to Linux 6.1 `arch/x86/kvm/svm/pmu.c`, APM vol. 2, 13.2. There is no global control and no status: a counter that is on counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.amd import PERF_CTL0
from softkvm.kvm import cpuid
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr_kinds import Handler, require

if TYPE_CHECKING:
    from softkvm.kvm.pmu.counter import Counter
    from softkvm.kvm.pmu.vpmu import VirtualPmu
    from softkvm.kvm.types import Model, Vcpu

INSTRUCTIONS = 0x00C0
_LEGACY, _CORE = 4, 6
_EVENTSEL_RESERVED = 0xFFFF_FFF0_0028_0000
_RAW_EVENT_MASK = 0xF_0000_FFFF | 0xFF << 24 | 1 << 23 | 1 << 18
"""Event, unit mask, CMASK, INV and EDGE."""


def refresh(vcpu: Vcpu, pmu: VirtualPmu) -> None:
    """`amd_pmu_refresh()`: every AMD CPU has counters."""
    pmu.version = 1
    pmu.set_counters(_CORE if vcpu.cpuid.has(cpuid.PERFCTR_CORE) else _LEGACY, 0)
    pmu.mask = (1 << 48) - 1
    pmu.raw_event_mask, pmu.eventsel_reserved = _RAW_EVENT_MASK, _EVENTSEL_RESERVED
    pmu.has_global_ctrl = False


def _counter(vcpu: Vcpu, index: int) -> tuple[Counter | None, bool]:
    """The counter of an MSR, and whether the MSR is its value rather than its control."""
    if index >= PERF_CTL0:
        require(vcpu.cpuid.is_amd and vcpu.cpuid.has(cpuid.PERFCTR_CORE), index)
        return vcpu.pmu.counters.get(index - PERF_CTL0 >> 1), bool(index - PERF_CTL0 & 1)
    return vcpu.pmu.counters.get(index - n.K7_EVNTSEL0 & 3) if vcpu.cpuid.is_amd else None, index >= n.K7_PERFCTR0


def _get(vcpu: Vcpu, index: int, _host: bool) -> int:
    counter, is_value = _counter(vcpu, index)
    if counter is None:
        return 0  # Linux tolerates guests that look for a K7
    return counter.read() if is_value else counter.eventsel


def _set(vcpu: Vcpu, index: int, value: int, _host: bool) -> None:
    counter, is_value = _counter(vcpu, index)
    if counter is None:
        return
    counter.used = True
    if is_value:
        counter.write(value & vcpu.pmu.mask)
    else:
        vcpu.pmu.set_eventsel(counter, value & ~vcpu.pmu.eventsel_reserved)


HANDLERS: dict[int, Handler] = dict.fromkeys(
    (*range(n.K7_EVNTSEL0, n.K7_PERFCTR0 + _LEGACY), *range(PERF_CTL0, PERF_CTL0 + 2 * _CORE)), Handler(_get, _set)
)


def saved_msrs(_model: Model) -> list[int]:
    """What KVM_GET_MSR_INDEX_LIST adds."""
    return [*range(n.K7_EVNTSEL0, n.K7_PERFCTR0 + _LEGACY), *range(PERF_CTL0, PERF_CTL0 + 2 * _CORE)]
