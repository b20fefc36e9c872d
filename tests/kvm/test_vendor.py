"""What both vendor modules must have, and the controls that every vCPU starts with."""

from __future__ import annotations

from softkvm.kvm import Vcpu, vendor
from softkvm.silicon.control import Intercept

MSR_TSC, MSR_LSTAR, MSR_EFER = 0x10, 0xC000_0082, 0xC000_0080


def exits(vcpu: Vcpu, index: int, write: bool) -> bool:
    bitmap = vcpu.block.msr_bitmap[index >> 31][int(write)]
    return bool(bitmap[(index & 0x1FFF) >> 3] >> (index & 7) & 1)


def test_every_handler_has_a_name(vcpu: Vcpu) -> None:
    assert [reason for reason in vcpu.vendor.handlers if reason not in vcpu.vendor.exit_names] == []


def test_controls_of_a_new_vcpu(vcpu: Vcpu) -> None:
    assert vcpu.control.intercepts == vendor.INTERCEPTS
    assert vendor.INTERCEPTS >> Intercept.HLT & 1
    assert not vendor.INTERCEPTS >> Intercept.RDTSC & 1
    assert (vcpu.control.tsc_multiplier, vcpu.control.vpid) == (1 << 48, vcpu.vcpu_id + 1)


def test_msrs_that_the_silicon_checks_by_itself_do_not_exit(vcpu: Vcpu) -> None:
    assert [exits(vcpu, index, write) for index in (MSR_TSC, MSR_LSTAR, MSR_EFER) for write in (False, True)] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]
