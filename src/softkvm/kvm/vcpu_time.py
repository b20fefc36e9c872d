"""The ioctls of a vCPU that are about its clocks: the TSC's rate and offset, and kvmclock.

Answers to Linux 6.1 `kvm_arch_vcpu_ioctl()` and `kvm_arch_tsc_{get,set}_attr()` in `arch/x86/kvm/x86.c`, and to the ioctls of the series
"KVM_{GET,SET}_TSC_OFFSET".
"""

from __future__ import annotations

import errno

from softkvm.host import mm
from softkvm.kvm.ioctl import ioctl, pointed_u64, returns_u64, takes, value
from softkvm.kvm.kvmclock import PvClock
from softkvm.kvm.tsc import VcpuTsc
from softkvm.kvm.vcpu_core import VcpuCore
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series

_ATTRIBUTE_SIZE = 8


class VcpuTime(VcpuCore):
    """A vCPU with its clocks."""

    tsc: VcpuTsc
    pvclock: PvClock

    @ioctl(uapi.KVM_SET_TSC_KHZ, value)
    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: 0 is the host's rate; OSError(EINVAL) if the silicon cannot scale to it."""
        self.tsc.set_khz(khz)

    @ioctl(uapi.KVM_GET_TSC_KHZ)
    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ."""
        return self.tsc.khz

    @ioctl(series.KVM_GET_TSC_OFFSET, encode=returns_u64)
    def get_tsc_offset(self) -> int:
        """KVM_GET_TSC_OFFSET: what is added to the host's (scaled) TSC for L1, modulo 2^64."""
        return self.tsc.offset

    @ioctl(series.KVM_SET_TSC_OFFSET, pointed_u64)
    def set_tsc_offset(self, offset: int) -> None:
        """KVM_SET_TSC_OFFSET: vCPUs that are given the same offset one after the other are in phase."""
        self.tsc.set_offset(offset)

    @ioctl(uapi.KVM_HAS_DEVICE_ATTR, takes(uapi.DeviceAttr))
    def has_device_attr(self, attr: uapi.DeviceAttr) -> None:
        """KVM_HAS_DEVICE_ATTR; OSError(ENXIO) for any attribute but the TSC's offset."""
        if (attr.group, attr.attr) != (uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET):
            raise OSError(errno.ENXIO, "no such attribute of a vCPU")

    @ioctl(uapi.KVM_GET_DEVICE_ATTR, takes(uapi.DeviceAttr))
    def get_device_attr(self, attr: uapi.DeviceAttr) -> None:
        """KVM_GET_DEVICE_ATTR: store the value at `addr`; OSError ENXIO as above, EFAULT."""
        self.has_device_attr(attr)
        mm.copy_to_user(attr.addr, self.tsc.offset.to_bytes(_ATTRIBUTE_SIZE, "little"))

    @ioctl(uapi.KVM_SET_DEVICE_ATTR, takes(uapi.DeviceAttr))
    def set_device_attr(self, attr: uapi.DeviceAttr) -> None:
        """KVM_SET_DEVICE_ATTR: take the value from `addr`; OSError ENXIO as above, EFAULT."""
        self.has_device_attr(attr)
        self.tsc.set_offset(int.from_bytes(mm.copy_from_user(attr.addr, _ATTRIBUTE_SIZE), "little"))

    @ioctl(uapi.KVM_KVMCLOCK_CTRL)
    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL: tell the guest that it was paused; OSError(EINVAL) if it has no kvmclock."""
        self.pvclock.set_guest_paused()
