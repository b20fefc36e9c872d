"""VMX exits: the control register qualification (SDM vol. 3, table 28-3) and instructions that a guest does not have."""

from __future__ import annotations

import pytest

from softkvm import silicon
from softkvm.kvm import Vcpu, events
from softkvm.uapi.vmx import ExitReason
from tests import fake_engine
from tests.fake_engine import exits_with
from tests.kvm.conftest import Script
from tests.kvm.guest import out_of_guest

RIP = 0x1000


@pytest.fixture(params=["cascadelake"])
def model(request: pytest.FixtureRequest) -> silicon.Model:
    return silicon.Model(request.param)


def cr_access(number: int, access: int, register: int) -> fake_engine.Step:
    return exits_with(ExitReason.CR_ACCESS, qualification=number | access << 4 | register << 8, instruction_length=4)


def test_cr8_both_ways(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip = RIP
    vcpu.gpr[9] = 7
    out_of_guest(vcpu, play, cr_access(8, 0, 9), cr_access(8, 1, 10))
    assert (vcpu.gpr[10], vcpu.state.rip) == (7, RIP + 8)


def test_cr4_with_a_bit_of_the_host(vcpu: Vcpu, play: Script) -> None:
    vcpu.gpr[3] = vcpu.control.cr4_mask & 1 << 18
    out_of_guest(vcpu, play, cr_access(4, 0, 3))
    assert vcpu.state.cr4 == 1 << 18


def test_a_loop_of_pauses_goes_on_behind_the_pause(vcpu: Vcpu, play: Script) -> None:
    vcpu.state.rip = RIP
    assert vcpu.control.pause_window > vcpu.control.pause_gap > 0
    out_of_guest(vcpu, play, exits_with(ExitReason.PAUSE_INSTRUCTION, instruction_length=2))
    assert vcpu.state.rip == RIP + 2


@pytest.mark.parametrize("reason", [ExitReason.VMCLEAR, ExitReason.VMLAUNCH, ExitReason.VMON, ExitReason.INVEPT, ExitReason.VMFUNC])
def test_vmx_instructions_are_undefined(vcpu: Vcpu, play: Script, reason: int) -> None:
    vcpu.state.rip = RIP
    out_of_guest(vcpu, play, exits_with(reason, instruction_length=3))
    assert fake_engine.Core.cores[-1].injected == [1 << 31 | 3 << 8 | events.UD]
    assert vcpu.state.rip == RIP


def test_nmi_of_the_host_goes_to_the_hosts_handlers(vcpu: Vcpu, play: Script, host_nmis: list[int]) -> None:
    out_of_guest(vcpu, play, exits_with(ExitReason.EXCEPTION_NMI, interruption=1 << 31 | 2 << 8 | 2))
    assert host_nmis == [1]
    assert fake_engine.Core.cores[-1].injected == []
