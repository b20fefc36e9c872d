"""`softkvm.kvm.mce`: banks, and who may write what."""

from __future__ import annotations

import pytest

from softkvm.kvm import msr
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr import MsrError
from tests.kvm.fakes import FakeVcpu, FakeVm
from tests.kvm.test_msr import refused

ALL_ONES = (1 << 64) - 1


@pytest.fixture
def vcpu() -> FakeVcpu:
    return FakeVcpu(FakeVm())


def test_banks(vcpu: FakeVcpu) -> None:
    assert msr.get(vcpu, n.IA32_MCG_CAP, False) == 10
    assert msr.get(vcpu, 0x400, False) == ALL_ONES
    assert not refused(vcpu, 0x400 + 4 * 9, 0)
    assert refused(vcpu, 0x400 + 4 * 10, 0)
    assert refused(vcpu, 0x404, 5)
    assert not refused(vcpu, 0x404, ALL_ONES & ~(1 << 10))


def test_status_can_only_be_cleared_by_the_guest(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, 0x401, 1)
    msr.set(vcpu, 0x401, 1 << 63, True)
    assert msr.get(vcpu, 0x401, False) == 1 << 63
    msr.set(vcpu, 0x401, 0, False)


def test_amd_can_unlock_status() -> None:
    vcpu = FakeVcpu(FakeVm("amd"))
    assert refused(vcpu, 0x401, 1)
    msr.set(vcpu, n.HWCR, n.HWCR_MC_STATUS_WRITE, False)
    assert not refused(vcpu, 0x401, 1)


def test_control_needs_the_capability(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, n.IA32_MCG_CTL, ALL_ONES)
    with pytest.raises(MsrError):
        msr.get(vcpu, n.IA32_MCG_CTL, False)
    vcpu.msrs.machine_check.setup(10 | 1 << 8)
    assert msr.get(vcpu, n.IA32_MCG_CTL, False) == ALL_ONES
    assert not refused(vcpu, n.IA32_MCG_CTL, 0)
    assert refused(vcpu, n.IA32_MCG_CTL, 5)
