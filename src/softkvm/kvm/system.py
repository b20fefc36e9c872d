"""/dev/kvm: capabilities, what the silicon supports, and new VMs.

Answers to Linux 6.1 `kvm_dev_ioctl()`, `kvm_arch_dev_ioctl()`, `kvm_vm_ioctl_check_extension()` and `Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import nullcontext

from softkvm import silicon
from softkvm.host import mm
from softkvm.host.clock import Clock
from softkvm.host.process import Process
from softkvm.host.sched import Scheduler
from softkvm.host.turns import Turns
from softkvm.kvm import capabilities, cpuid, fpu, mce, msr, tsc
from softkvm.kvm.ioctl import KvmFile, ioctl, returns_array, returns_msr_values, returns_u64, takes, takes_msr_indices, value, zero
from softkvm.kvm.params import Parameters
from softkvm.kvm.vcpu_core import MMAP_SIZE
from softkvm.kvm.vm import Vm
from softkvm.uapi import kvm as uapi

DEFAULT_MODEL = "cascadelake"


class System(KvmFile):
    """KVM on one kind of silicon."""

    unknown_ioctl = errno.EINVAL
    fd_class = "system"
    ioctl_lock = nullcontext()

    def __init__(
        self,
        model: silicon.Model | None = None,
        parameters: Parameters | None = None,
        process: Process | None = None,
        cores: int | None = None,
        turns: Turns | None = None,
    ) -> None:
        """KVM on cores of `model`, of Intel's Cascade Lake if none is given, loaded with `parameters`.

        `process` is who opened it, a new one if none is given. `cores` is how many cores the host has, for all VMs of this System; as many
        as they want if none is given. `turns` is the host's processor if its VMs have it by turns, in virtual time.
        """
        super().__init__(process if process is not None else Process())
        self.model = model if model is not None else silicon.Model(DEFAULT_MODEL)
        self.parameters = parameters if parameters is not None else Parameters()
        self.turns = turns
        self.scheduler = Scheduler(self.model, cores) if turns is None else turns

    @ioctl(uapi.KVM_GET_API_VERSION, zero)
    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12."""
        return uapi.KVM_API_VERSION

    @ioctl(uapi.KVM_CHECK_EXTENSION, value)
    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if the capability is absent."""
        return capabilities.check(cap, tsc.has_control(self.model, self.parameters))

    @ioctl(uapi.KVM_GET_VCPU_MMAP_SIZE, zero)
    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE, in bytes."""
        return MMAP_SIZE

    @ioctl(uapi.KVM_GET_SUPPORTED_CPUID, encode=returns_array(uapi.Cpuid2, 40))
    def get_supported_cpuid(self) -> list[uapi.CpuidEntry2]:
        """KVM_GET_SUPPORTED_CPUID."""
        return cpuid.supported(self.model)

    @ioctl(uapi.KVM_GET_MSR_INDEX_LIST, encode=returns_array(uapi.MsrList, 4))
    def get_msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: MSRs that belong to a vCPU's state."""
        return msr.index_list(self.model)

    @ioctl(uapi.KVM_GET_MSR_FEATURE_INDEX_LIST, encode=returns_array(uapi.MsrList, 4))
    def get_msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that tell features."""
        return msr.feature_index_list(self.model)

    @ioctl(uapi.KVM_GET_MSRS, takes_msr_indices, returns_msr_values)
    def get_msrs(self, indices: Iterable[int]) -> list[int]:
        """KVM_GET_MSRS of the system: values of feature MSRs, up to the first that is none."""
        values: list[int] = []
        for index in indices:
            try:
                values.append(msr.get_feature(self.model, index))
            except msr.MsrError:
                break
        return values

    @ioctl(uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, encode=returns_u64)
    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED: the MCG_CAP bits that KVM_X86_SETUP_MCE accepts besides the number of banks."""
        return mce.SUPPORTED_CAPABILITIES

    @ioctl(uapi.KVM_HAS_DEVICE_ATTR, takes(uapi.DeviceAttr))
    def has_device_attr(self, attr: uapi.DeviceAttr) -> None:
        """KVM_HAS_DEVICE_ATTR; OSError(ENXIO) for any attribute but the XSAVE components that guests may have."""
        if (attr.group, attr.attr) != (0, uapi.KVM_X86_XCOMP_GUEST_SUPP):
            raise OSError(errno.ENXIO, "no such attribute of the system")

    @ioctl(uapi.KVM_GET_DEVICE_ATTR, takes(uapi.DeviceAttr))
    def get_device_attr(self, attr: uapi.DeviceAttr) -> None:
        """KVM_GET_DEVICE_ATTR: store the u64 at `addr`; OSError ENXIO as above, EFAULT."""
        self.has_device_attr(attr)
        mm.copy_to_user(attr.addr, fpu.offered_features(self.model).to_bytes(8, "little"))

    @ioctl(uapi.KVM_CREATE_VM, value)
    def create_vm(self, type: int = 0, clock: Clock | None = None) -> Vm:
        """KVM_CREATE_VM; OSError(EINVAL) for a type but 0. `clock` is the VM's time, the host's if none is given."""
        if type:
            raise OSError(errno.EINVAL, "x86 has one type of VM")
        if clock is None:
            clock = Clock() if self.turns is None else self.turns.clock
        return Vm(self, clock)
