"""Hypercalls: results in RAX, and what a guest may not call."""

from __future__ import annotations

from softkvm.kvm import Vcpu, Vm
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import Script
from tests.kvm.guest import leave, out_of_guest

RIP = 0x1000


def test_hypercalls(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip = RIP
    for number, expected in ((uapi.KVM_HC_SCHED_YIELD, 0), (99, -uapi.KVM_ENOSYS & 0xFFFF_FFFF)):
        vcpu.gpr[0] = number
        out_of_guest(vcpu, play, leave(vcpu, "hypercall", 3))
        assert vcpu.gpr[0] == expected
    assert vcpu.state.rip == RIP + 6
    vcpu.state.cr0 |= 1
    vcpu.state.segments[2].access_rights |= 3 << 5
    vcpu.gpr[0] = uapi.KVM_HC_SCHED_YIELD
    out_of_guest(vcpu, play, leave(vcpu, "hypercall", 3))
    assert vcpu.gpr[0] == -1 & 0xFFFF_FFFF


def test_kick_wakes_the_vcpu_of_an_apic_id(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    other = vm.create_vcpu(1)
    assert other.lapic is not None
    vcpu.gpr[0], vcpu.gpr[1] = uapi.KVM_HC_KICK_CPU, 1
    out_of_guest(vcpu, play, leave(vcpu, "hypercall", 3))
    assert other.lapic.pv_unhalted


def test_one_call_sends_interrupts_to_many(vcpu: Vcpu, vm: Vm, play: Script) -> None:
    others = [vm.create_vcpu(index) for index in (1, 2)]
    for other in others:
        assert other.lapic is not None
        other.lapic.mmio_write(0xF0, 4, 0x1FF)
    vcpu.gpr[0], vcpu.gpr[3], vcpu.gpr[1], vcpu.gpr[2], vcpu.gpr[6] = uapi.KVM_HC_SEND_IPI, 0b11, 0, 1, 0x4041
    out_of_guest(vcpu, play, leave(vcpu, "hypercall", 3))
    assert vcpu.gpr[0] == 2
    assert all(other.lapic is not None and other.lapic.irr >> 0x41 & 1 for other in others)
