"""The vCPU's ioctls that are its own: state of execution, machine checks, closing."""

from __future__ import annotations

import errno

import pytest

from softkvm.host.clock import VirtualClock
from softkvm.kvm import Vcpu, Vm, dispatch
from softkvm.kvm.request import REQ_STEAL_UPDATE
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import Script
from tests.kvm.guest import leave, out_of_guest

MCG_CAP = 0x179


def test_machine_check_banks(vcpu: Vcpu) -> None:
    argument = memoryview(bytearray((1 << 8 | 4).to_bytes(8, "little")))
    assert dispatch(vcpu, uapi.KVM_X86_SETUP_MCE, argument) == 0
    assert vcpu.get_msrs([MCG_CAP]) == [1 << 8 | 4]


@pytest.mark.parametrize("capabilities", [0, 33, 1 << 10 | 4, 1 << 32 | 4])
def test_machine_check_banks_that_cannot_be(vcpu: Vcpu, capabilities: int) -> None:
    with pytest.raises(OSError, match="machine check") as caught:
        vcpu.x86_setup_mce(capabilities)
    assert caught.value.errno == errno.EINVAL


def test_pit_reinjection_needs_a_pit(vm: Vm) -> None:
    with pytest.raises(OSError, match="no PIT") as caught:
        vm.reinject_control(uapi.ReinjectControl(pit_reinject=1))
    assert caught.value.errno == errno.ENXIO
    vm.create_irqchip()
    vm.create_pit2(uapi.PitConfig())
    assert dispatch(vm, uapi.KVM_REINJECT_CONTROL, memoryview(bytearray(32))) == 0


def test_timers_end_with_the_vm(vm: Vm, vcpu: Vcpu, clock: VirtualClock) -> None:
    assert vcpu.lapic is not None
    vm.create_pit2(uapi.PitConfig())
    vm.pio_bus.write(0x43, 1, 0x34)
    vm.pio_bus.write(0x40, 1, 0)
    vm.pio_bus.write(0x40, 1, 0x10)
    vcpu.lapic.timer.start(clock.monotonic_ns() + 10_000_000_000)
    assert clock.first_expiry is not None
    vm.close()
    assert clock.first_expiry is None


def test_steal_time_is_accounted_when_the_vcpu_comes_onto_a_core(vcpu: Vcpu, play: Script) -> None:
    vcpu.load()
    assert not vcpu.requests & REQ_STEAL_UPDATE
    vcpu.pvclock.steal_msr = 0x1000 | 1
    assert vcpu.yield_core()
    vcpu.load()
    assert vcpu.requests & REQ_STEAL_UPDATE


def test_exits_are_counted_by_name(vcpu: Vcpu, play: Script) -> None:
    out_of_guest(vcpu, play, leave(vcpu, "cpuid", 2), leave(vcpu, "cpuid", 2))
    shutdown = {"intel": "TRIPLE_FAULT", "amd": "SHUTDOWN"}[vcpu.model.vendor]
    assert vcpu.exits_by_reason() == {"CPUID": 2, shutdown: 1}
