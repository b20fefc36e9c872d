"""A Debian guest with 4 vCPUs whose time is saved, and restored after a wait, as Documentation/virt/kvm/devices/vcpu.rst tells a VMM."""

from __future__ import annotations

import time

import pytest

from softkvm import silicon
from softkvm.host.clock import KHZ_NSEC
from softkvm.testing import VmFactory
from softkvm.uapi import kvm as uapi
from softkvm.vmm import StopReason

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

U64 = (1 << 64) - 1
CPUS = 4
PAUSE_SECONDS = 2
PERCEPTIBLE_NS = 1_000_000
"""Far more than reading two clocks one after the other costs, far less than the pause."""
QUESTIONS = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; nproc; dmesg | grep -ci unstable; echo en''d\n"


# Without an invariant TSC, Linux holds the TSCs of several AMD CPUs to be unsynchronized; with one it prefers the TSC to kvm-clock.
@pytest.mark.parametrize(("cpu", "clocksource"), [("cascadelake", "kvm-clock"), ("epyc,+invtsc", "tsc")])
def test_time_of_four_vcpus_survives_save_and_restore(vm_factory: VmFactory, cpu: str, clocksource: str) -> None:
    machine = vm_factory(cpu=cpu, cpus=CPUS)
    assert machine.run(until="# ", timeout=200).reason is StopReason.UNTIL
    vcpus = machine._vcpus
    vm = vcpus[0].vm
    saved, offsets = vm.get_clock(), [vcpu.get_tsc_offset() for vcpu in vcpus]
    assert saved.flags & uapi.KVM_CLOCK_TSC_STABLE
    time.sleep(PAUSE_SECONDS)

    vm.set_clock(uapi.ClockData(clock=saved.clock, realtime=saved.realtime, flags=uapi.KVM_CLOCK_REALTIME))
    now = vm.get_clock()
    passed = (now.clock - saved.clock) * silicon.tsc_khz() // KHZ_NSEC
    for vcpu, offset in zip(vcpus, offsets, strict=True):
        vcpu.set_tsc_offset(offset + passed - (now.host_tsc - saved.host_tsc) & U64)
    vm.set_clock(vm.get_clock())

    restored = vm.get_clock()
    assert len({vcpu.get_tsc_offset() for vcpu in vcpus}) == 1
    assert restored.flags & uapi.KVM_CLOCK_TSC_STABLE
    assert abs((restored.realtime - restored.clock) - (saved.realtime - saved.clock)) < PERCEPTIBLE_NS
    machine.send(QUESTIONS)
    assert machine.run(until="end", timeout=100).reason is StopReason.UNTIL
    answer, cpus, complaints, _ = machine.text.replace("\r", "").splitlines()[-4:]
    assert (answer.split()[-1], cpus, complaints) == (clocksource, str(CPUS), "0")
