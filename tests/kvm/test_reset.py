"""RESET, INIT and SIPI: SDM vol. 3, table 10-1 and 9.4."""

from __future__ import annotations

import errno

from softkvm import kvm
from softkvm.kvm import Vcpu, Vm, reset
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import Script, ready
from tests.kvm.guest import out_of_guest, run_errno


def test_application_processor_waits_for_init_and_sipi(vm: Vm, system: kvm.System, play: Script) -> None:
    vm.create_irqchip()
    ready(vm.create_vcpu(0), system)
    ap = ready(vm.create_vcpu(1), system)
    assert ap.lapic is not None
    assert ap.get_mp_state().mp_state == uapi.KVM_MP_STATE_UNINITIALIZED
    ap.kvm_run.exit_reason = 99
    ap.kvm_run.immediate_exit = 1
    assert run_errno(ap) == errno.EINTR
    assert ap.kvm_run.exit_reason == 99
    ap.kvm_run.immediate_exit = 0
    ap.lapic.pending_init = True
    assert run_errno(ap) == errno.EAGAIN
    assert ap.kvm_run.exit_reason == 99
    assert ap.mp_state == uapi.KVM_MP_STATE_INIT_RECEIVED
    ap.lapic.sipi_vector = 0x9A
    out_of_guest(ap, play)
    code = ap.get_sregs().cs
    assert (code.selector, code.base, ap.get_regs().rip) == (0x9A00, 0x9A000, 0)


def test_init_keeps_what_reset_clears(vcpu: Vcpu) -> None:
    vcpu.state.cr0 = 0x8000_0011  # caches on
    vcpu.state.lstar, vcpu.state.fpu.mxcsr, vcpu.state.xcr0, vcpu.state.cr4 = 7, 0x1FBF, 3, 0x20
    reset.reset(vcpu, init=True)
    assert (vcpu.state.cr0, vcpu.state.cr4, vcpu.state.rip) == (0x10, 0, 0xFFF0)
    assert (vcpu.state.lstar, vcpu.state.fpu.mxcsr, vcpu.state.xcr0) == (7, 0x1FBF, 3)
    reset.reset(vcpu, init=False)
    assert (vcpu.state.cr0, vcpu.state.lstar, vcpu.state.fpu.mxcsr, vcpu.state.xcr0) == (0x6000_0010, 0, 0x1F80, 1)


def test_init_of_the_boot_processor_starts_it_at_the_reset_vector(vcpu: Vcpu) -> None:
    assert vcpu.lapic is not None
    vcpu.state.rip = 0x1234
    vcpu.lapic.pending_init = True
    assert vcpu.get_mp_state().mp_state == uapi.KVM_MP_STATE_RUNNABLE
    assert vcpu.state.rip == 0xFFF0
