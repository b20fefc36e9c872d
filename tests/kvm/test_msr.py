"""`softkvm.kvm.msr`: existence, rights, checks and effects, MSR by MSR."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import silicon
from softkvm.host.clock import VirtualClock
from softkvm.kvm import System, cpuid, msr, request
from softkvm.kvm import msr_index as n
from softkvm.kvm.msr import MsrError
from softkvm.kvm.msr_table import HANDLERS
from softkvm.uapi import kvm as uapi
from tests.kvm.conftest import ready
from tests.kvm.fakes import FakeModel, FakeVcpu, FakeVm

ONES = (1 << 64) - 1
NON_CANONICAL = 1 << 63
ALL_INDICES = sorted(HANDLERS)


@pytest.fixture
def vcpu() -> FakeVcpu:
    return FakeVcpu(FakeVm())


def refused(vcpu: FakeVcpu, index: int, value: int, host: bool = False) -> bool:
    try:
        msr.set(vcpu, index, value, host)
    except MsrError:
        return True
    return False


@pytest.mark.parametrize("index", [0x2, 0x1FFF, 0x4B56_4DFF, 0xC000_1234, 0xFFFF_FFFF])
def test_unknown_msrs(vcpu: FakeVcpu, index: int) -> None:
    assert refused(vcpu, index, 0, host=True)
    with pytest.raises(MsrError):
        msr.get(vcpu, index, True)


MODELS = ["cascadelake", "epyc"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("value", [0, 1, 1 << 63, ONES])
def test_each_msr_takes_or_refuses_the_edges_of_its_range(value: int, host: bool, model: str) -> None:
    for index in ALL_INDICES:
        stored_or_refused(model, index, value, host)


@given(index=st.sampled_from(ALL_INDICES), value=st.integers(0, ONES), host=st.booleans(), model=st.sampled_from(MODELS))
def test_any_write_is_stored_or_refused(index: int, value: int, host: bool, model: str) -> None:
    stored_or_refused(model, index, value, host)


def stored_or_refused(model: str, index: int, value: int, host: bool) -> None:
    """Writes an MSR of a new vCPU, with a local APIC if `value` is odd, and reads it."""
    system = System(silicon.Model(model))
    with system.create_vm(clock=VirtualClock()) as vm:
        if value & 1:
            vm.create_irqchip()
        vcpu = ready(vm.create_vcpu(0), system)
        with suppress(MsrError):
            msr.set(vcpu, index, value, host)
        with suppress(MsrError):
            assert 0 <= msr.get(vcpu, index, host) <= ONES


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_every_listed_msr_can_be_saved_and_restored(vendor: str) -> None:
    vcpu = FakeVcpu(FakeVm(vendor))
    vcpu.apic.mmio_write(0xF0, 4, 0x1FF)
    for index in msr.index_list(vcpu.model):
        value = msr.get(vcpu, index, True)
        msr.set(vcpu, index, value, True)
        assert msr.get(vcpu, index, True) == value


@pytest.mark.parametrize(
    ("index", "field"),
    [
        (n.STAR, "star"),
        (n.LSTAR, "lstar"),
        (n.CSTAR, "cstar"),
        (n.SYSCALL_MASK, "fmask"),
        (n.KERNEL_GS_BASE, "kernel_gs_base"),
        (n.IA32_SYSENTER_CS, "sysenter_cs"),
        (n.IA32_SYSENTER_ESP, "sysenter_esp"),
        (n.IA32_SYSENTER_EIP, "sysenter_eip"),
        (n.TSC_AUX, "tsc_aux"),
        (n.IA32_PAT, "pat"),
    ],
)
def test_resident_msrs_are_the_silicons_state(vcpu: FakeVcpu, index: int, field: str) -> None:
    msr.set(vcpu, index, 0x0606, False)
    assert getattr(vcpu.state, field) == msr.get(vcpu, index, False) == 0x0606


@pytest.mark.parametrize("index", [n.LSTAR, n.CSTAR, n.KERNEL_GS_BASE, n.FS_BASE, n.GS_BASE])
def test_canonical_addresses(vcpu: FakeVcpu, index: int) -> None:
    assert refused(vcpu, index, NON_CANONICAL)
    assert refused(vcpu, index, 1 << 47)
    assert not refused(vcpu, index, 0xFFFF_8000_0000_0000)
    vcpu.state.cr4 = 1 << 12
    assert not refused(vcpu, index, 1 << 47)


def test_sysenter_pointers_are_made_canonical(vcpu: FakeVcpu) -> None:
    msr.set(vcpu, n.IA32_SYSENTER_EIP, 1 << 47, False)
    assert vcpu.state.sysenter_eip == 0xFFFF_8000_0000_0000
    msr.set(vcpu, n.IA32_SYSENTER_EIP, NON_CANONICAL | 5, False)
    assert vcpu.state.sysenter_eip == 5


class TestEfer:
    def test_bits(self, vcpu: FakeVcpu) -> None:
        assert not refused(vcpu, n.EFER, n.EFER_SCE | n.EFER_NX | n.EFER_LME)
        assert vcpu.take_requests() & request.REQ_TLB_FLUSH
        for bit in (1, 12, 13, 63):
            assert refused(vcpu, n.EFER, 1 << bit)

    def test_lma_is_not_written(self, vcpu: FakeVcpu) -> None:
        msr.set(vcpu, n.EFER, n.EFER_LME | n.EFER_LMA, False)
        assert vcpu.state.efer == n.EFER_LME
        vcpu.state.efer |= n.EFER_LMA
        msr.set(vcpu, n.EFER, n.EFER_LME, False)
        assert vcpu.state.efer == n.EFER_LME | n.EFER_LMA

    def test_lme_does_not_change_under_paging(self, vcpu: FakeVcpu) -> None:
        vcpu.state.cr0 = 1 << 31
        assert refused(vcpu, n.EFER, n.EFER_LME)
        assert not refused(vcpu, n.EFER, n.EFER_LME, host=True)

    def test_bits_need_their_feature(self, vcpu: FakeVcpu) -> None:
        vcpu.cpuid = cpuid.CpuidTable([])
        for bit in (n.EFER_NX, n.EFER_LME, n.EFER_FFXSR):
            assert refused(vcpu, n.EFER, bit)
            assert not refused(vcpu, n.EFER, bit, host=True)


@pytest.mark.parametrize("index", [n.IA32_ARCH_CAPABILITIES, n.PLATFORM_INFO, n.SMI_COUNT])
def test_what_only_the_host_writes(vcpu: FakeVcpu, index: int) -> None:
    assert refused(vcpu, index, 0)
    msr.set(vcpu, index, 3, True)
    assert msr.get(vcpu, index, False) == 3


def test_model_values(vcpu: FakeVcpu) -> None:
    assert msr.get(vcpu, n.IA32_ARCH_CAPABILITIES, False) == 0xEB
    assert msr.get(vcpu, n.IA32_MISC_ENABLE, False) & 1
    assert msr.get(vcpu, n.PLATFORM_INFO, False) == 0  # no CPUID faulting


def test_microcode_revision_survives_the_guests_dance(vcpu: FakeVcpu) -> None:
    before = msr.get(vcpu, n.IA32_UCODE_REV, False)
    msr.set(vcpu, n.IA32_UCODE_REV, 0, False)
    assert msr.get(vcpu, n.IA32_UCODE_REV, False) == before


def test_misc_enable_keeps_read_only_bits(vcpu: FakeVcpu) -> None:
    value = msr.get(vcpu, n.IA32_MISC_ENABLE, False)
    assert refused(vcpu, n.IA32_MISC_ENABLE, value ^ 1 << 11)
    msr.set(vcpu, n.IA32_MISC_ENABLE, value | 1 << 7, False)
    assert msr.get(vcpu, n.IA32_MISC_ENABLE, False) == value


def test_feature_control_locks(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, n.IA32_FEATURE_CONTROL, 4)  # VMX is not offered
    msr.set(vcpu, n.IA32_FEATURE_CONTROL, 1, False)
    assert refused(vcpu, n.IA32_FEATURE_CONTROL, 0)
    assert not refused(vcpu, n.IA32_FEATURE_CONTROL, 0, host=True)
    assert refused(FakeVcpu(FakeVm("amd")), n.IA32_FEATURE_CONTROL, 1)


def test_speculation_control(vcpu: FakeVcpu) -> None:
    msr.set(vcpu, n.IA32_SPEC_CTRL, 7, False)
    assert vcpu.state.spec_ctrl == 7
    assert refused(vcpu, n.IA32_SPEC_CTRL, 8)
    assert refused(vcpu, n.IA32_SPEC_CTRL, n.SPEC_CTRL_BHI_DIS_S)
    assert not refused(vcpu, n.IA32_PRED_CMD, 1)
    assert refused(vcpu, n.IA32_PRED_CMD, 2)
    with pytest.raises(MsrError):
        msr.get(vcpu, n.IA32_PRED_CMD, True)
    vcpu.cpuid = cpuid.CpuidTable([*vcpu.cpuid.entries, uapi.CpuidEntry2(function=7, index=2, flags=1, edx=1 << 4)])
    assert not refused(vcpu, n.IA32_SPEC_CTRL, n.SPEC_CTRL_BHI_DIS_S)
    vcpu.cpuid = cpuid.CpuidTable([])
    assert refused(vcpu, n.IA32_SPEC_CTRL, 0)
    assert refused(vcpu, n.IA32_PRED_CMD, 1)


def test_tsc_aux_upper_half(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, n.TSC_AUX, 1 << 32)
    amd = FakeVcpu(FakeVm("amd"))
    msr.set(amd, n.TSC_AUX, 1 << 32 | 5, False)
    assert msr.get(amd, n.TSC_AUX, False) == 5


def test_amd_configuration_registers() -> None:
    vcpu = FakeVcpu(FakeVm("amd"))
    assert msr.get(vcpu, n.DE_CFG, False) == 2
    assert not refused(vcpu, n.DE_CFG, 2)
    assert refused(vcpu, n.DE_CFG, 0)
    assert refused(vcpu, n.HWCR, 1)
    assert not refused(vcpu, n.HWCR, 1 << 3)
    assert msr.get(vcpu, n.SYSCFG, False) == 0
    assert not refused(vcpu, n.K7_EVNTSEL0, 1 << 22)
    assert msr.get(vcpu, n.K7_EVNTSEL0, False) == 0


def test_poll_control(vcpu: FakeVcpu) -> None:
    assert msr.get(vcpu, uapi.MSR_KVM_POLL_CONTROL, False) == 1
    assert refused(vcpu, uapi.MSR_KVM_POLL_CONTROL, 2)


def test_features_that_are_not_implemented_have_no_msr(vcpu: FakeVcpu) -> None:
    assert refused(vcpu, uapi.MSR_KVM_PV_EOI_EN, 0)
    assert refused(vcpu, uapi.MSR_KVM_ASYNC_PF_EN, 0)


def test_paravirtual_msrs_need_their_feature_only_if_that_is_enforced(vcpu: FakeVcpu) -> None:
    vcpu.cpuid = cpuid.CpuidTable([])
    assert not refused(vcpu, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0)
    vcpu.msrs.enforce_pv_features = True
    assert refused(vcpu, uapi.MSR_KVM_SYSTEM_TIME_NEW, 0)
    with pytest.raises(MsrError):
        msr.get(vcpu, uapi.MSR_KVM_STEAL_TIME, True)


def test_feature_msrs() -> None:
    intel, amd = FakeModel(), FakeModel("amd")
    assert msr.get_feature(intel, n.IA32_ARCH_CAPABILITIES) == 0xEB
    assert n.DE_CFG not in msr.feature_index_list(intel)
    assert msr.get_feature(amd, n.DE_CFG) == 2
    with pytest.raises(MsrError):
        msr.get_feature(intel, n.EFER)


def test_apic_base_without_local_apic() -> None:
    vcpu = FakeVcpu(FakeVm(irqchip=False), lapic=False)
    msr.set(vcpu, n.IA32_APIC_BASE, 0xFEE0_0000, False)
    assert not vcpu.cpuid.has(cpuid.APIC)
    assert refused(vcpu, 0x808, 0)
    assert not refused(vcpu, n.IA32_TSC_DEADLINE, 5)
    assert msr.get(vcpu, n.IA32_TSC_DEADLINE, False) == 0
