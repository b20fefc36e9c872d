"""A guest's counters without exits, as long as nobody else has an event on its core.

The way of Linux's later "mediated" vPMU, here on top of perf's events: what the guest owns it reads and writes in the silicon, together
with GLOBAL_CTRL, GLOBAL_STATUS and RDPMC, and the silicon brings it the counters' interrupts by its LVTPC. What chooses events
(IA32_PERFEVTSELx, FIXED_CTR_CTRL) stays intercepted, because user space filters events; so is what the guest's version does not have of
GLOBAL_OVF_CTRL, of which the silicon's has more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softkvm.host.perf.intel import (
    FULL_WIDTH_PMC0,
    FULL_WIDTH_WRITE,
    GLOBAL_CTRL,
    GLOBAL_OVF_CTRL,
    GLOBAL_STATUS,
    GLOBAL_STATUS_SET,
    PERF_CAPABILITIES,
    PMC0,
)
from softkvm.kvm import msr_bitmap
from softkvm.silicon.control import Intercept
from softkvm.silicon.pmu import MSR_LVTPC

if TYPE_CHECKING:
    from softkvm.kvm.pmu.counter import Counter
    from softkvm.kvm.pmu.vpmu import VirtualPmu
    from softkvm.silicon import Core

OVF_DS, COND_CHANGED = 1 << 62, 1 << 63
"""Bits of GLOBAL_OVF_CTRL that there are in every version, for units that the silicon lacks."""
_GLOBAL = frozenset({(GLOBAL_CTRL, False), (GLOBAL_CTRL, True), (GLOBAL_STATUS, False)})


class PassThrough:
    """Which of a vCPU's counters the guest has by itself."""

    def __init__(self, pmu: VirtualPmu) -> None:
        """None."""
        self._pmu = pmu
        self._owned: frozenset[int] = frozenset()
        self._msrs: frozenset[tuple[int, bool]] = frozenset()

    @property
    def on(self) -> bool:
        """Whether there are any, so that the global registers are in the silicon as well."""
        return bool(self._owned)

    def set(self, owned: frozenset[int]) -> None:
        """Let the guest have these counters, of which the vCPU's core is at hand."""
        pmu = self._pmu
        if not self._same_shape():
            owned = frozenset()
        if owned == self._owned:
            return
        vcpu, before = pmu.vcpu, self.on
        core = self._core
        if core is not None and before and not owned:
            core.pmu_write(GLOBAL_OVF_CTRL, pmu.global_ctrl_mask)
        self._owned = owned
        self.choose_msrs()
        vcpu.control.guest_status_mask = pmu.global_ctrl_mask | OVF_DS | COND_CHANGED
        if vcpu.cpu is not None:
            vcpu.cpu.perf.counters.guest_status = pmu.global_ctrl_mask if owned else 0
        if self.on != before:
            vcpu.set_intercept(Intercept.RDPMC, before)
        if self.on and not before:
            for counter in pmu.counters.values():
                self.mirror(counter)

    def choose_msrs(self) -> None:
        """Let the guest have the MSRs that follow from the counters that it has, and from the mode of its local APIC."""
        vcpu, msrs = self._pmu.vcpu, self._choose()
        for index, write in self._msrs - msrs:
            msr_bitmap.intercept(vcpu, index, write)
        for index, write in msrs - self._msrs:
            msr_bitmap.pass_through(vcpu, index, write)
        self._msrs = msrs

    def _same_shape(self) -> bool:
        """Whether the guest has all of the silicon's counters: RDPMC and the global registers know no fewer."""
        host, pmu = self._pmu.perf.pmu, self._pmu
        return pmu.has_global_ctrl and len(pmu.counters) == host.generic + host.fixed and pmu.mask == (1 << host.width) - 1

    def _choose(self) -> frozenset[tuple[int, bool]]:
        """The MSRs that pass, each with whether writes do."""
        if not self.on:
            return frozenset()
        pmu = self._pmu
        full_width = pmu.vcpu.msrs.values[PERF_CAPABILITIES] & FULL_WIDTH_WRITE
        names = {pmu.perf.pmu.counter(idx) for idx in self._owned if full_width or not self._is_generic(idx)}
        names |= {PMC0 + idx for idx in self._owned if self._is_generic(idx)}
        lapic = pmu.vcpu.lapic
        if lapic is not None and pmu.takes_interrupts and lapic.x2apic:
            names.add(MSR_LVTPC)
        passed = _GLOBAL | {(index, write) for index in names for write in (False, True)}
        return passed | {(GLOBAL_OVF_CTRL, True)} if pmu.takes_interrupts else passed

    def _is_generic(self, idx: int) -> bool:
        return self._pmu.perf.pmu.counter(idx) == FULL_WIDTH_PMC0 + idx

    # --- The silicon's registers ----------------------------------------------------------------------------------------------------

    @property
    def _core(self) -> Core | None:
        cpu = self._pmu.vcpu.cpu
        return None if cpu is None else cpu.core

    @property
    def status(self) -> int:
        """GLOBAL_STATUS as the silicon has it for the guest."""
        core = self._core
        return 0 if core is None else core.pmu_read(GLOBAL_STATUS) & self._pmu.global_ctrl_mask

    @status.setter
    def status(self, value: int) -> None:
        core, mask = self._core, self._pmu.global_ctrl_mask
        if core is not None:
            core.pmu_write(GLOBAL_OVF_CTRL, mask & ~value)
            core.pmu_write(GLOBAL_STATUS_SET, mask & value)

    def mirror(self, counter: Counter) -> None:
        """Keep in the silicon what a counter reads that the guest does not own, and nobody else."""
        core = self._core
        if self.on and counter.idx not in self._owned and core is not None:
            core.pmu_write(self._pmu.perf.pmu.counter(counter.idx), counter.value)
