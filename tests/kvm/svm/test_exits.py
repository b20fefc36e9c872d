"""SVM exits: control registers with decode assists (APM vol. 2, 15.8.1), next RIP, and instructions that a guest does not have."""

from __future__ import annotations

import pytest

from softkvm import silicon
from softkvm.kvm import Vcpu, events
from softkvm.uapi import kvm as uapi
from softkvm.uapi.svm import ExitCode
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script
from tests.kvm.guest import out_of_guest

RIP = 0x1000


@pytest.fixture(params=["epyc"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    return silicon.Model(request.param)


def test_cr8_both_ways(vcpu: Vcpu, play: Script) -> None:
    vcpu.gpr[9] = 7
    write = exits_with(ExitCode.WRITE_CR0 + 8, qualification=1 << 63 | 9, next_rip=RIP + 4)
    out_of_guest(vcpu, play, write, exits_with(ExitCode.READ_CR0 + 8, qualification=1 << 63 | 10, next_rip=RIP + 8))
    assert (vcpu.gpr[10], vcpu.state.rip) == (7, RIP + 8)


def test_cr4_with_a_bit_of_the_host(vcpu: Vcpu, play: Script) -> None:
    vcpu.gpr[3] = 1 << 18
    out_of_guest(vcpu, play, exits_with(ExitCode.WRITE_CR0 + 4, qualification=1 << 63 | 3, next_rip=RIP))
    assert vcpu.state.cr4 == 1 << 18


def test_a_loop_of_pauses_goes_on_behind_the_pause(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip = RIP
    out_of_guest(vcpu, play, exits_with(ExitCode.PAUSE, next_rip=RIP + 2))
    assert vcpu.state.rip == RIP + 2


@pytest.mark.parametrize("code", [ExitCode.VMRUN, ExitCode.VMLOAD, ExitCode.SKINIT, ExitCode.INVLPGA])
def test_svm_instructions_are_undefined(vcpu: Vcpu, play: Script, code: int) -> None:
    vcpu.state.rip = RIP
    out_of_guest(vcpu, play, exits_with(code, next_rip=RIP + 3))
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 3 << 8 | events.UD]
    assert vcpu.state.rip == RIP


def test_silicon_that_does_not_save_the_next_rip(vcpu: Vcpu, play: Script) -> None:
    play(exits_with(ExitCode.CPUID, next_rip=0))
    vcpu.run()
    assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR


def test_nmi_of_the_host_goes_to_the_hosts_handlers(vcpu: Vcpu, play: Script, host_nmis: list[int]) -> None:
    out_of_guest(vcpu, play, exits_with(ExitCode.NMI))
    assert host_nmis == [1]
