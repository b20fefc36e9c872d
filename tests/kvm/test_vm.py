"""Errors and order of the VM's calls: those measured on Linux."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from softkvm.host import task
from softkvm.host.clock import HrTimer, VirtualClock
from softkvm.kvm import System, Vm
from softkvm.uapi import kvm as uapi


def failure(call: Callable[..., object], *arguments: object) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the result
        call(*arguments)
    return caught.value.errno


def test_before_the_irqchip(vm: Vm) -> None:
    assert failure(vm.create_pit2, uapi.PitConfig()) == errno.ENOENT
    assert failure(vm.irq_line, 0, 1) == errno.ENXIO
    assert failure(vm.irq_line_status, 0, 1) == errno.ENXIO
    assert failure(vm.signal_msi, uapi.Msi()) == errno.EINVAL
    assert failure(vm.set_gsi_routing, []) == errno.EINVAL
    assert failure(vm.irqfd, uapi.Irqfd()) == errno.EINVAL
    assert failure(vm.get_irqchip, uapi.Irqchip()) == errno.ENXIO
    assert failure(vm.get_pit2) == errno.ENXIO


def test_chips_are_made_once_and_before_vcpus(vm: Vm, system: System) -> None:
    vm.create_irqchip()
    assert failure(vm.create_irqchip) == errno.EEXIST
    vm.create_pit2(uapi.PitConfig(flags=uapi.KVM_PIT_SPEAKER_DUMMY))
    assert failure(vm.create_pit2, uapi.PitConfig()) == errno.EEXIST
    assert failure(vm.get_irqchip, uapi.Irqchip(chip_id=3)) == errno.EINVAL
    other = system.create_vm(clock=VirtualClock())
    other.create_vcpu(0)
    assert failure(other.create_irqchip) == errno.EINVAL


def test_vcpus(vm: Vm) -> None:
    vm.set_boot_cpu_id(1)
    vm.create_irqchip()
    boot, other = vm.create_vcpu(1), vm.create_vcpu(0)
    assert failure(vm.create_vcpu, 0) == errno.EEXIST
    assert failure(vm.create_vcpu, 4096) == errno.EINVAL
    assert failure(vm.set_boot_cpu_id, 0) == errno.EBUSY
    assert failure(vm.set_identity_map_addr, 0) == errno.EINVAL
    assert boot.get_mp_state().mp_state == uapi.KVM_MP_STATE_RUNNABLE
    assert other.get_mp_state().mp_state == uapi.KVM_MP_STATE_UNINITIALIZED
    assert (boot.get_sregs().apic_base, other.get_sregs().apic_base) == (0xFEE0_0900, 0xFEE0_0800)


def test_vcpus_without_a_local_apic_run_at_once(vm: Vm) -> None:
    vm.create_vcpu(0)
    other = vm.create_vcpu(1)
    assert other.get_mp_state().mp_state == uapi.KVM_MP_STATE_RUNNABLE
    assert failure(other.set_mp_state, uapi.MpState(mp_state=uapi.KVM_MP_STATE_HALTED)) == errno.EINVAL
    assert failure(other.get_lapic) == errno.EINVAL


def test_messages_and_lines(vm: Vm) -> None:
    vm.create_irqchip()
    vm.create_vcpu(0)
    assert failure(vm.signal_msi, uapi.Msi(address_lo=0xFEE5_0000, data=0x41)) == errno.EPERM
    assert failure(vm.signal_msi, uapi.Msi(flags=1)) == errno.EINVAL
    vm.irq_line(0, 1)
    vm.irq_line(200, 1)
    assert failure(vm.set_gsi_routing, [uapi.IrqRoutingEntry(type=9)]) == errno.EINVAL


def test_capabilities(vm: Vm, system: System) -> None:
    required = (0, 1, 3, 4, 7, 14, 15, 21, 25, 26, 30, 32, 33, 35, 36, 39, 41, 50, 55, 56, 76, 77, 136)
    assert [cap for cap in required if not vm.check_extension(cap)] == []
    assert system.check_extension(uapi.KVM_CAP_COALESCED_MMIO) == 2
    assert system.check_extension(uapi.KVM_CAP_ADJUST_CLOCK) == 0xE
    assert system.check_extension(uapi.KVM_CAP_NR_MEMSLOTS) == 32764
    assert (system.check_extension(9999), system.check_extension(uapi.KVM_CAP_NESTED_STATE)) == (0, 0)
    assert failure(vm.enable_cap, uapi.EnableCap(cap=9999)) == errno.EINVAL
    assert failure(vm.enable_cap, uapi.EnableCap(cap=uapi.KVM_CAP_EXCEPTION_PAYLOAD, flags=1)) == errno.EINVAL
    vm.enable_cap(uapi.EnableCap(cap=uapi.KVM_CAP_EXCEPTION_PAYLOAD, args=(1, 0, 0, 0)))
    assert vm.exception_payload


def test_closing_twice_is_harmless(vm: Vm) -> None:
    vm.close()
    vm.close()
    assert failure(vm.create_irqchip) == errno.EBADF


def test_an_earlier_timer_of_another_thread_disturbs_the_vcpus(vm: Vm, clock: VirtualClock) -> None:
    vcpu = vm.create_vcpu(0)
    vcpu.wakeup.clear()
    HrTimer(clock, lambda now: None).start(clock.monotonic_ns() + 100)
    assert vcpu.wakeup.is_set()
    vcpu.wakeup.clear()
    vcpu.attach(task.current())
    HrTimer(clock, lambda now: None).start(clock.monotonic_ns() + 50)
    vcpu.detach()
    assert not vcpu.wakeup.is_set()
