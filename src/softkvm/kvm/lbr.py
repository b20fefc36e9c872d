"""Guest LBR: a vCPU's claim to the last branch records of the core that it is on.

Answers to "Guest LBR Enabling" (v8, Wang, August 2019, patches 3 to 14), with the rules of Linux 6.1 `arch/x86/kvm/vmx/pmu_intel.c` where
v8 as posted does not work (docs/series.md). The registers are intercepted until the guest touches one; then an event of the host's perf
claims the records, and the guest uses them without exits. Each time slice begins intercepted, so that a guest that has stopped using them
loses the event after a whole slice; a host event with more right takes them at once, and what the guest then reads is zero.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from softkvm.host.perf.branches import Layout
from softkvm.host.perf.event import Attr, Event, State
from softkvm.host.perf.intel import LBR_FORMAT, PERF_CAPABILITIES
from softkvm.kvm import cpuid, msr_bitmap
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr_kinds import Handler, MsrError, require
from softkvm.kvm.pmu.offer import supported_capabilities
from softkvm.silicon.pmu import VIRTUAL_PMI
from softkvm.uapi import series
from softkvm.uapi.perf import BranchSample, SampleFormat

if TYPE_CHECKING:
    from softkvm.kvm import types
    from softkvm.kvm.vcpu import Vcpu

_VLBR_EVENT = 0x1B00
"""`INTEL_FIXED_VLBR_EVENT`: a code that no counter counts."""
_MODEL = 0xF_00F0
"""Model and extended model of leaf 1 EAX."""
_FAMILY = 0xFF0_0F00
_ATTR = Attr(
    config=_VLBR_EVENT,
    pinned=True,
    exclude_host=True,
    sample_type=SampleFormat.BRANCH_STACK,
    branch_sample_type=BranchSample.CALL_STACK | BranchSample.USER,
)


class GuestLbr:
    """The last branch records as one vCPU has them."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Not offered yet."""
        self.vcpu = vcpu
        self.layout: Layout | None = None
        """The records that the guest is offered; None if it is offered none."""
        self.event: Event | None = None
        self.passed_through = False
        self.used = False
        """The guest has touched them in this time slice."""
        self._host_debugctl = self._debugctl = 0
        self._writes_debugctl = False

    @property
    def same_model(self) -> bool:
        """Whether the guest's family and model are the core's, whose records alone it could use."""
        guest, host = self.vcpu.cpuid.lookup(1, 0), self.vcpu.model.cpuid(1, 0)
        return guest is not None and not (guest[0] ^ host[0]) & (_MODEL | _FAMILY)

    def refresh(self) -> None:
        """CPUID, PERF_CAPABILITIES or the VM's capability have changed: `intel_pmu_refresh()` for the records."""
        vcpu = self.vcpu
        told = vcpu.cpuid.has(cpuid.PDCM) and vcpu.msrs.values[PERF_CAPABILITIES] & LBR_FORMAT
        offered = told and vcpu.pmu.version > 1 and self.same_model
        self.release()
        self.layout = vcpu.vm.scheduler.perf.pmu.layout if offered else None

    # --- The event ------------------------------------------------------------------------------------------------------------------

    @property
    def owned(self) -> bool:
        """Whether the core's records are the vCPU's now (`event->oncpu != -1`)."""
        return self.event is not None and self.event.oncpu >= 0

    def claim(self) -> bool:
        """`intel_pmu_create_guest_lbr_event()`, and once more if the event was taken away; whether the records are the guest's."""
        if self.event is not None and self.event.state is State.ERROR:
            self.release()
        if self.event is None:
            pmu = self.vcpu.pmu
            try:
                self.event = pmu.perf.create_kernel_counter(_ATTR, pmu.task_events)
            except OSError:
                return False
        return self.owned

    def release(self) -> None:
        """Give the records back to the host."""
        self.intercept()
        if self.event is not None:
            self.vcpu.pmu.perf.release(self.event)
            self.event = None

    # --- Interception ---------------------------------------------------------------------------------------------------------------

    def pass_through(self) -> None:
        """Let the guest use the records without exits, and read DEBUGCTL."""
        if self.layout is not None and not self.passed_through:
            self.passed_through = True
            for msr in self.layout.msrs():
                msr_bitmap.pass_through(self.vcpu, msr, write=False)
                msr_bitmap.pass_through(self.vcpu, msr, write=True)
            msr_bitmap.pass_through(self.vcpu, n.IA32_DEBUGCTL, write=False)
            self.choose_debugctl()
            self._guard_entry()

    def intercept(self) -> None:
        """Take every access of the guest to KVM."""
        if self.layout is not None and self.passed_through:
            self.passed_through = False
            for msr in self.layout.msrs():
                msr_bitmap.intercept(self.vcpu, msr, write=False)
                msr_bitmap.intercept(self.vcpu, msr, write=True)
            msr_bitmap.intercept(self.vcpu, n.IA32_DEBUGCTL, write=False)
            self.choose_debugctl()
            self._guard_entry()

    def _guard_entry(self) -> None:
        """Look right before each entry, as long as there is something to look at."""
        self.vcpu.guard_entry(self.confirm_and_enter if self.passed_through or self._host_debugctl else None)

    def confirm_and_enter(self, enter: Callable[[], int]) -> int:
        """A VM entry: only the owner has the records passed through (`vmx_passthrough_lbr_msrs()`); the host may want some, too."""
        if not self.owned:
            self.intercept()
        if self._host_debugctl:
            self.vcpu.state.debugctl = self._debugctl | self._host_debugctl
        return enter()

    # --- DEBUGCTL -------------------------------------------------------------------------------------------------------------------

    @property
    def debugctl(self) -> int:
        """IA32_DEBUGCTL as the guest has it."""
        return self._debugctl if self._host_debugctl else self.vcpu.state.debugctl

    @debugctl.setter
    def debugctl(self, value: int) -> None:
        self._debugctl = self.vcpu.state.debugctl = value

    def choose_debugctl(self) -> None:
        """Let the guest write DEBUGCTL as long as it uses records and counters by itself; bits that it lacks are KVM's to judge."""
        alone = self.passed_through and not self._host_debugctl and bool(self.vcpu.control.perf_controls & VIRTUAL_PMI)
        if alone != self._writes_debugctl:
            self._writes_debugctl = alone
            self.vcpu.control.guest_debugctl_mask = n.DEBUGCTL_LBR | n.DEBUGCTL_FREEZE_LBRS_ON_PMI
            change = msr_bitmap.pass_through if alone else msr_bitmap.intercept
            change(self.vcpu, n.IA32_DEBUGCTL, write=True)

    def set_host_debugctl(self, bits: int) -> None:
        """The bits that the host's perf wants set while the guest runs: its own records of the guest. The guest does not see them."""
        if bits == self._host_debugctl:
            return
        if not bits:
            self.vcpu.state.debugctl = self._debugctl
        elif not self._host_debugctl:
            self._debugctl = self.vcpu.state.debugctl
        self._host_debugctl = bits
        self._guard_entry()

    def sched_in(self) -> None:
        """A time slice begins: intercept, to learn whether the guest uses the records in it."""
        if self.passed_through:
            self.intercept()

    def cleanup(self) -> None:
        """`kvm_pmu_cleanup()`: a slice has passed. Unused and switched off, the records go back to the host."""
        used, self.used = self.used, False
        if self.event is not None and not used and not self.debugctl & n.DEBUGCTL_LBR:
            self.release()

    # --- Registers ------------------------------------------------------------------------------------------------------------------

    def read(self, index: int, host: bool) -> int:
        """RDMSR of a record's register, or KVM_GET_MSRS; 0 while the host has the records."""
        require(self.layout is not None and index in self.layout, index)
        if (host and self.event is None) or not self._claim_for_access(host) or self.vcpu.cpu is None:
            return 0
        return self.vcpu.cpu.core.pmu_read(index)

    def write(self, index: int, value: int, host: bool) -> None:
        """WRMSR, or KVM_SET_MSRS; #GP for what silicon refuses, and nothing happens while the host has the records."""
        require(self.layout is not None and index in self.layout, index)
        if self._claim_for_access(host) and self.vcpu.cpu is not None:
            try:
                self.vcpu.cpu.core.pmu_write(index, value)
            except ValueError:
                raise MsrError(index) from None

    def _claim_for_access(self, host: bool) -> bool:
        """`intel_pmu_handle_lbr_msrs_access()`: the first touch claims the records, and the guest has them from then on."""
        if host and self.vcpu.cpu is None:
            self.vcpu.load()
        if not self.claim():
            return False
        if not host:
            self.used = True
            self.pass_through()
        return True

    def freeze_on_pmi(self) -> None:
        """`intel_pmu_legacy_freezing_lbrs_on_pmi()`: a PMI of version 2 switches recording off, if the guest wants that."""
        if self.vcpu.pmu.version in (2, 3) and self.debugctl & n.DEBUGCTL_FREEZE_LBRS_ON_PMI:
            self.debugctl &= ~n.DEBUGCTL_LBR


def get_debugctl(vcpu: types.Vcpu, _index: int, _host: bool) -> int:
    """IA32_DEBUGCTL as the guest has set it."""
    return vcpu.lbr.debugctl


def set_debugctl(vcpu: types.Vcpu, index: int, value: int, host: bool) -> None:
    """`vmx_set_msr()`: recording and freezing exist with the records; LBR and BTF without them are dropped, all else is #GP."""
    allowed = n.DEBUGCTL_LBR | n.DEBUGCTL_FREEZE_LBRS_ON_PMI if vcpu.lbr.layout is not None else 0
    require(not value & ~(allowed | n.DEBUGCTL_LBR | n.DEBUGCTL_BTF), index)
    value &= allowed
    vcpu.lbr.debugctl = value
    if value & n.DEBUGCTL_LBR and not host:
        vcpu.lbr.used = True
        vcpu.lbr.claim()


def stack_for(layout: Layout | None, vcpus: Sequence[Vcpu], enable: bool) -> series.LbrStack:
    """What KVM_ENABLE_CAP of KVM_CAP_X86_GUEST_LBR tells user space; OSError(EINVAL) if a vCPU could not use the host's records."""
    if enable and (layout is None or not vcpus or not all(vcpu.lbr.same_model for vcpu in vcpus)):
        raise OSError(errno.EINVAL, "the guest's CPU model has other last branch records than the host's, or there is no vCPU yet")
    return series.LbrStack(**layout._asdict()) if layout is not None else series.LbrStack()


def enable_capability(vcpu: Vcpu, enable: bool) -> None:
    """The capability gives, or takes, the format of the records in PERF_CAPABILITIES, which later kernels leave to user space."""
    values = vcpu.msrs.values
    values[PERF_CAPABILITIES] &= ~LBR_FORMAT
    if enable:
        values[PERF_CAPABILITIES] |= supported_capabilities(vcpu.model) & LBR_FORMAT
    vcpu.lbr.refresh()


_RECORD = Handler(lambda vcpu, index, host: vcpu.lbr.read(index, host), lambda vcpu, index, value, host: vcpu.lbr.write(index, value, host))
_SKYLAKE = Layout(nr=32, tos=0x1C9, from_=0x680, to=0x6C0, info=0xDC0)
HANDLERS: dict[int, Handler] = dict.fromkeys(_SKYLAKE.msrs(), _RECORD)
