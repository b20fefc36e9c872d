"""KVM_CHECK_EXTENSION: what is there has a value, what is not there is 0."""

from __future__ import annotations

import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm import Vm, capabilities
from softkvm.uapi import kvm as uapi


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (uapi.KVM_CAP_MAX_VCPUS, capabilities.MAX_VCPUS),
        (uapi.KVM_CAP_MCE, 32),
        (uapi.KVM_CAP_X2APIC_API, 3),
        (uapi.KVM_CAP_SYNC_REGS, 7),
        (uapi.KVM_CAP_REINJECT_CONTROL, 1),
        (uapi.KVM_CAP_X86_SMM, 1),
        (1 << 31, 0),
    ],
)
def test_values(cap: int, expected: int) -> None:
    assert capabilities.check(cap, True) == expected


@pytest.mark.parametrize("scaling", [True, False])
def test_control_of_the_tsc_is_the_silicons(scaling: bool) -> None:
    system = kvm.System(silicon.Model("epyc", {"tsc-scale": scaling}))
    with system.create_vm(clock=VirtualClock()) as vm:
        for cap in (uapi.KVM_CAP_TSC_CONTROL, uapi.KVM_CAP_VM_TSC_CONTROL):
            assert system.check_extension(cap) == vm.check_extension(cap) == scaling


def test_x2apic_api_is_two_switches(vm: Vm) -> None:
    def enable(flags: int) -> None:
        vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_X2APIC_API, args=(flags, 0, 0, 0)))

    enable(capabilities.X2APIC_API_DISABLE_BROADCAST_QUIRK)
    assert (vm.routing.x2apic_format, vm.routing.x2apic_broadcast_quirk) == (False, False)
    enable(capabilities.X2APIC_API_USE_32BIT_IDS)
    assert (vm.routing.x2apic_format, vm.routing.x2apic_broadcast_quirk) == (True, False)
    with pytest.raises(OSError, match="no such flags"):
        enable(4)
