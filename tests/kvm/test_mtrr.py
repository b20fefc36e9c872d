"""`softkvm.kvm.mtrr`: values that the registers take and refuse."""

from __future__ import annotations

import pytest

from softkvm.kvm import msr
from softkvm.kvm import msr_index as n
from tests.kvm.fakes import FakeVcpu, FakeVm
from tests.kvm.test_msr import refused


@pytest.fixture
def vcpu() -> FakeVcpu:
    return FakeVcpu(FakeVm())


def test_pat(vcpu: FakeVcpu) -> None:
    assert not refused(vcpu, n.IA32_PAT, 0x0407_0506_0007_0106)
    assert refused(vcpu, n.IA32_PAT, 0x0407_0506_0007_0102)


def test_capabilities(vcpu: FakeVcpu) -> None:
    assert msr.get(vcpu, n.IA32_MTRRCAP, False) == 0x508
    assert refused(vcpu, n.IA32_MTRRCAP, 0)


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (n.MTRR_DEF_TYPE, 0xC06, 0x1000),
        (n.MTRR_DEF_TYPE, 0x800, 2),
        (0x250, 0x0606_0606_0606_0606, 0x0706_0606_0606_0606),
        (0x26F, 0x0505_0000_0101_0404, 2),
        (0x200, 0x8000_0006, 0x8000_0106),
        (0x201, 0x3FFF_8000_0800, 0x4000_8000_0800),
        (0x20F, 0x800, 0x400),
    ],
)
def test_ranges(vcpu: FakeVcpu, index: int, good: int, bad: int) -> None:
    msr.set(vcpu, index, good, False)
    assert refused(vcpu, index, bad)
    assert msr.get(vcpu, index, False) == good


def test_there_are_eight_variable_ranges(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, 0x210, 0)
