"""KVM_CHECK_EXTENSION: what is there has a value, what is not there is 0."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from softkvm import kvm, silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm import Vcpu, Vm, capabilities, events, mce, msr, msr_index, regs
from softkvm.uapi import kvm as uapi
from tests import fake_engine
from tests.kvm.conftest import Script
from tests.kvm.guest import out_of_guest


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


def test_platform_info_can_be_taken_from_guests(vm: Vm, vcpu: Vcpu) -> None:
    """As Linux's selftest platform_info_test: user space still has it."""
    for on in (False, True):
        vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_MSR_PLATFORM_INFO, args=(int(on), 0, 0, 0)))
        assert len(vcpu.get_msrs([msr_index.PLATFORM_INFO])) == 1
        with nullcontext() if on else pytest.raises(msr.MsrError):
            msr.get(vcpu, msr_index.PLATFORM_INFO, False)


def test_paravirtual_features_can_be_limited_to_what_cpuid_tells(vcpu: Vcpu) -> None:
    """As Linux's selftest kvm_pv_test."""

    def enforce(on: int, **wrong: int) -> None:
        vcpu.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args=(on, 0, 0, 0), **wrong))

    vcpu.set_cpuid2([])
    msr.get(vcpu, uapi.MSR_KVM_SYSTEM_TIME_NEW, False)
    enforce(1)
    with pytest.raises(msr.MsrError):
        msr.get(vcpu, uapi.MSR_KVM_SYSTEM_TIME_NEW, False)
    enforce(0)
    msr.get(vcpu, uapi.MSR_KVM_SYSTEM_TIME_NEW, False)
    with pytest.raises(OSError, match="cannot be enabled"):
        enforce(1, flags=1)


def test_a_machine_check_reaches_the_guest(vcpu: Vcpu, play: Script) -> None:
    fatal = uapi.X86Mce(status=mce.STATUS_VALID | mce.STATUS_UNCORRECTED | 1 << 55, mcg_status=5, bank=1)
    vcpu.state.cr4 |= regs.CR4_MCE
    vcpu.x86_set_mce(fatal)
    out_of_guest(vcpu, play)
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 3 << 8 | events.MC]
    vcpu.x86_set_mce(fatal)
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN, "another one while the first is handled"
