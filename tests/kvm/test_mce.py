"""`softkvm.kvm.mce`: banks, and who may write what."""

from __future__ import annotations

import errno

import pytest

from softkvm.kvm import mce, msr
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr import MsrError
from softkvm.uapi.kvm import X86Mce
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


VALID, OVERFLOW, UNCORRECTED, ACTION = 1 << 63, 1 << 62, 1 << 61, 1 << 55
CORRECTED, FATAL = VALID | 0x17, VALID | UNCORRECTED | ACTION | 0x134


def event(status: int, bank: int = 2, mcg_status: int = 0) -> X86Mce:
    return X86Mce(status=status, addr=0x1234000, misc=0x8C, mcg_status=mcg_status, bank=bank)


def bank(vcpu: FakeVcpu, number: int = 2) -> list[int]:
    return [msr.get(vcpu, 0x400 + 4 * number + register, True) for register in range(1, 4)]


def test_a_corrected_error_is_in_its_bank_and_nowhere_else(vcpu: FakeVcpu) -> None:
    assert vcpu.msrs.machine_check.report(event(CORRECTED), enabled=False) is mce.Effect.NOTHING
    assert bank(vcpu) == [CORRECTED, 0x1234000, 0x8C]
    assert vcpu.msrs.machine_check.report(event(CORRECTED | 1 << 8), enabled=True) is mce.Effect.NOTHING
    assert bank(vcpu)[0] == CORRECTED | 1 << 8 | OVERFLOW


def test_an_uncorrected_error_is_an_exception_and_is_not_overwritten_by_a_corrected_one(vcpu: FakeVcpu) -> None:
    check = vcpu.msrs.machine_check
    assert check.report(event(FATAL, mcg_status=5), enabled=True) is mce.Effect.EXCEPTION
    assert (bank(vcpu)[0], msr.get(vcpu, n.IA32_MCG_STATUS, True)) == (FATAL, 5)
    assert check.report(event(CORRECTED), enabled=True) is mce.Effect.NOTHING
    assert bank(vcpu)[0] == FATAL | OVERFLOW


@pytest.mark.parametrize(("in_progress", "enabled"), [(4, True), (0, False)])
def test_an_error_that_nobody_can_take_is_a_shutdown(vcpu: FakeVcpu, in_progress: int, enabled: bool) -> None:
    msr.set(vcpu, n.IA32_MCG_STATUS, in_progress, True)
    assert vcpu.msrs.machine_check.report(event(FATAL, mcg_status=5), enabled) is mce.Effect.SHUTDOWN
    assert bank(vcpu)[0] == 0


def test_an_error_whose_report_is_off_is_not_reported(vcpu: FakeVcpu) -> None:
    check = vcpu.msrs.machine_check
    msr.set(vcpu, 0x400 + 4 * 2, 0, False)
    assert check.report(event(FATAL, mcg_status=5), enabled=True) is mce.Effect.NOTHING
    check.setup(10 | 1 << 8)
    msr.set(vcpu, n.IA32_MCG_CTL, 0, True)
    assert check.report(event(FATAL, mcg_status=5), enabled=True) is mce.Effect.NOTHING
    assert bank(vcpu) == [0, 0, 0]


def test_an_uncorrected_error_without_action_is_logged_only(vcpu: FakeVcpu) -> None:
    assert vcpu.msrs.machine_check.report(event(VALID | UNCORRECTED), enabled=False) is mce.Effect.NOTHING
    assert bank(vcpu)[0] == VALID | UNCORRECTED


@pytest.mark.parametrize("wrong", [event(CORRECTED, bank=10), event(CORRECTED, bank=255), event(CORRECTED & ~VALID)])
def test_what_is_no_error_of_a_bank_is_refused(vcpu: FakeVcpu, wrong: X86Mce) -> None:
    with pytest.raises(OSError, match="bank") as error:
        vcpu.msrs.machine_check.report(wrong, enabled=True)
    assert error.value.errno == errno.EINVAL
