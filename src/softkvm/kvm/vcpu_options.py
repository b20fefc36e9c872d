"""What user space may ask of a vCPU beside its registers and clocks: capabilities, machine checks, statistics.

Answers to Linux 6.1 `kvm_vcpu_ioctl_enable_cap()`, `kvm_vcpu_ioctl_x86_{setup,set}_mce()` in `arch/x86/kvm/x86.c` and
`kvm_vcpu_ioctl_get_stats_fd()` in `virt/kvm/kvm_main.c`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from softkvm.kvm import events, mce, regs, stats
from softkvm.kvm.ioctl import ioctl, pointed_u64, takes
from softkvm.kvm.request import REQ_TRIPLE_FAULT
from softkvm.kvm.vcpu_time import VcpuTime
from softkvm.uapi import kvm as uapi

if TYPE_CHECKING:
    from softkvm.kvm.msr import MsrState
    from softkvm.kvm.vcpu import Vcpu


class VcpuOptions(VcpuTime):
    """The part of a vCPU with such ioctls."""

    msrs: MsrState

    def _as_vcpu(self) -> Vcpu:
        """The whole vCPU, of which this is a part."""
        raise NotImplementedError

    @ioctl(uapi.KVM_X86_SETUP_MCE, pointed_u64)
    def x86_setup_mce(self, capabilities: int) -> None:
        """KVM_X86_SETUP_MCE: MCG_CAP, with the number of banks in its low byte; OSError(EINVAL) for what KVM does not support."""
        if not 0 < capabilities & 0xFF <= mce.MAX_BANKS or capabilities & ~(mce.SUPPORTED_CAPABILITIES | mce.FREE_BITS):
            raise OSError(errno.EINVAL, "bad machine check capabilities")
        self.msrs.machine_check.setup(capabilities)

    @ioctl(uapi.KVM_X86_SET_MCE, takes(uapi.X86Mce))
    def x86_set_mce(self, event: uapi.X86Mce) -> None:
        """KVM_X86_SET_MCE: the hardware has an error to report; OSError(EINVAL) for a bank that there is not, or no valid status."""
        effect = self.msrs.machine_check.report(event, bool(self.state.cr4 & regs.CR4_MCE))
        if effect is mce.Effect.EXCEPTION:
            events.queue_exception(self._as_vcpu(), events.MC)
        elif effect is mce.Effect.SHUTDOWN:
            self.make_request(REQ_TRIPLE_FAULT)

    @ioctl(uapi.KVM_ENABLE_CAP, takes(uapi.EnableCap))
    def enable_cap(self, cap: uapi.EnableCap) -> None:
        """KVM_ENABLE_CAP: paravirtual features can be limited to those that CPUID tells; all else is OSError(EINVAL)."""
        if cap.flags or cap.cap != uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
            raise OSError(errno.EINVAL, f"capability {cap.cap} cannot be enabled on a vCPU")
        self.msrs.enforce_pv_features = bool(cap.args[0])

    def statistics(self) -> dict[str, int]:
        """What the file of KVM_GET_STATS_FD has, by name. No ioctl; for any thread."""
        return stats.of_vcpu(self._as_vcpu())

    @ioctl(uapi.KVM_GET_STATS_FD)
    def get_stats_fd(self) -> stats.StatsFile:
        """KVM_GET_STATS_FD: a file with the vCPU's statistics."""
        return stats.open_vcpu(self._as_vcpu())
