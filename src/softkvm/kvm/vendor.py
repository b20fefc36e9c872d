"""What the run loop asks of a vendor module (`vmx`, `svm`): the counterpart of `struct kvm_x86_ops`, and what both set up alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import memset, sizeof
from typing import TYPE_CHECKING, Protocol

from softkvm.kvm import msr_bitmap
from softkvm.silicon.control import Intercept
from softkvm.uapi.kvm import KVM_X86_DISABLE_EXITS_HLT, KVM_X86_DISABLE_EXITS_MWAIT, KVM_X86_DISABLE_EXITS_PAUSE

if TYPE_CHECKING:
    from softkvm.kvm.pmu.vpmu import VirtualPmu
    from softkvm.kvm.vcpu import Vcpu

Handler = Callable[["Vcpu"], int]

INTERCEPTS = sum(
    1 << intercept
    for intercept in (
        Intercept.NMI,
        Intercept.SMI,
        Intercept.INIT,
        Intercept.HLT,
        Intercept.MONITOR,
        Intercept.MWAIT,
        Intercept.RDPMC,
        Intercept.CPUID,
        Intercept.INVD,
        Intercept.WBINVD,
        Intercept.XSETBV,
        Intercept.SHUTDOWN,
        Intercept.HYPERCALL,
        Intercept.VM_INSTRUCTION,
        Intercept.IO,
        Intercept.MSR_BITMAP,
    )
)
"""What a guest may not do by itself."""

PLE_GAP, PLE_WINDOW, PLE_WINDOW_MAX = 1 << 14, 1 << 17, 1 << 22
"""TSC cycles between two PAUSEs of one loop: some turns. Of a loop before it exits: some tens of microseconds, to some milliseconds."""

_MSR_TSC = 0x10
_PASSED_THROUGH = (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102)
"""SYSENTER_{CS,ESP,EIP}, STAR, LSTAR, CSTAR, SYSCALL_MASK, FS, GS and kernel GS base: the silicon has and checks them all by itself."""
_CR8_BIT = 1 << 8


class Vendor(Protocol):
    """A vendor module."""

    @property
    def exit_memory_fault(self) -> int:
        """The exit reason of a nested page fault."""

    @property
    def exit_names(self) -> Mapping[int, str]:
        """The vendor's names of all exit reasons, and the silicon's of its private ones."""

    @property
    def handlers(self) -> Mapping[int, Handler]:
        """Exit reason -> handler: 1 = run on, 0 = to user space, negative = -errno."""

    @property
    def pmu_instructions(self) -> int:
        """Code of the PMU event that counts retired instructions."""

    def refresh_pmu(self, vcpu: Vcpu, pmu: VirtualPmu) -> None:
        """Give the guest the counters that its CPUID says."""

    def handle_unknown(self, vcpu: Vcpu, reason: int) -> int:
        """Handle an exit that is in no table."""

    def next_rip(self, vcpu: Vcpu) -> int | None:
        """Address behind the instruction that exited; None if the silicon does not tell."""

    @property
    def soft_exception_type(self) -> int:
        """Type of INT3 and INTO in the event injection field."""

    def prepare_soft_event(self, vcpu: Vcpu, vector: int) -> bool:
        """Let INT n, INT3 or INTO, which is about to be injected, return behind its instruction; False if it cannot be injected."""

    def soft_event_cut_short(self, vcpu: Vcpu, entered: bool) -> None:
        """Such an event has not arrived and will be injected again; `entered`: the silicon had begun to deliver it."""


def setup_controls(vcpu: Vcpu) -> None:
    """The controls that a new vCPU starts with."""
    control = vcpu.control
    vcpu.update_exception_bitmap()
    control.cr_read = control.cr_write = _CR8_BIT
    control.tsc_multiplier = 1 << 48
    control.pause_gap, control.pause_window = PLE_GAP, PLE_WINDOW
    _leave_to_the_guest(vcpu, vcpu.vm.disabled_exits)
    control.vpid = vcpu.vcpu_id + 1
    memset(vcpu.block.msr_bitmap, 0xFF, sizeof(vcpu.block.msr_bitmap))
    msr_bitmap.pass_through(vcpu, _MSR_TSC, write=False)
    for index in _PASSED_THROUGH:
        msr_bitmap.pass_through(vcpu, index, write=False)
        msr_bitmap.pass_through(vcpu, index, write=True)


def _leave_to_the_guest(vcpu: Vcpu, disabled: int) -> None:
    """KVM_CAP_X86_DISABLE_EXITS: a guest that has its processor to itself may wait on it."""
    if disabled & KVM_X86_DISABLE_EXITS_HLT:
        vcpu.intercepts &= ~(1 << Intercept.HLT)
    if disabled & KVM_X86_DISABLE_EXITS_MWAIT:
        vcpu.intercepts &= ~(1 << Intercept.MWAIT | 1 << Intercept.MONITOR)
    if disabled & KVM_X86_DISABLE_EXITS_PAUSE:
        vcpu.control.pause_window = 0
    vcpu.control.intercepts = vcpu.intercepts
