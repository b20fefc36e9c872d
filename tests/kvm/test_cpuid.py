"""`softkvm.kvm.cpuid`: what is offered, look-up, leaves that do not exist, bits that follow the vCPU."""

from __future__ import annotations

import pytest

from softkvm.kvm import cpuid
from softkvm.kvm.cpuid import CpuidTable, check, supported, update_runtime
from softkvm.uapi import kvm as uapi
from softkvm.uapi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry2
from tests.kvm.fakes import FakeModel, FakeVcpu, FakeVm


def table(vendor: str = "intel") -> CpuidTable:
    return CpuidTable(supported(FakeModel(vendor)))


def entry(leaf: int, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0, index: int | None = None) -> CpuidEntry2:
    flags = 0 if index is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return CpuidEntry2(function=leaf, index=index or 0, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_supported_fits_every_clients_buffer(vendor: str) -> None:
    assert len(supported(FakeModel(vendor))) < cpuid.MAX_ENTRIES


def test_kvm_leaves() -> None:
    signature = table().execute(0x4000_0000, 0)
    assert signature.eax == 0x4000_0001
    assert b"".join(value.to_bytes(4, "little") for value in signature[1:]) == b"KVMKVMKVM\0\0\0"
    features = table().execute(0x4000_0001, 0).eax
    for bit in (uapi.KVM_FEATURE_CLOCKSOURCE2, uapi.KVM_FEATURE_CLOCKSOURCE_STABLE_BIT, uapi.KVM_FEATURE_STEAL_TIME):
        assert features >> bit & 1
    for bit in (uapi.KVM_FEATURE_PV_EOI, uapi.KVM_FEATURE_ASYNC_PF, uapi.KVM_FEATURE_PV_TLB_FLUSH):
        assert not features >> bit & 1


@pytest.mark.parametrize(
    ("leaf", "register", "bits"),
    [
        (1, cpuid.ECX, (3, 5, 6, 18, 27)),  # MONITOR VMX SMX DCA OSXSAVE
        (1, cpuid.EDX, (18, 21, 22, 29, 31)),
        (7, cpuid.EBX, (2, 12, 15, 25)),  # SGX CQM RDT PT
        (7, cpuid.EDX, (18, 19, 20)),  # PCONFIG LBR IBT
        (0x8000_0001, cpuid.ECX, (2, 10, 12)),  # SVM IBS SKINIT
    ],
)
def test_what_kvm_does_not_virtualise_is_not_offered(leaf: int, register: int, bits: tuple[int, ...]) -> None:
    value = table().execute(leaf, 0)[register]
    assert not any(value >> bit & 1 for bit in bits)


@pytest.mark.parametrize("feature", [cpuid.X2APIC, cpuid.TSC_DEADLINE, cpuid.TSC_ADJUST, cpuid.ARCH_CAPABILITIES, cpuid.PCID, cpuid.NX])
def test_what_kvm_does_virtualise_is(feature: cpuid.Feature) -> None:
    assert table().has(feature)


def test_leaves_that_user_space_fills_in_are_absent() -> None:
    offered = {item.function for item in supported(FakeModel())}
    assert not offered & {0x5, 0xA, 0x12, 0x14, 0x15, 0x16}


def test_maximum_leaves_are_clipped() -> None:
    assert table().execute(0, 0).eax == 0x1F
    assert table().execute(0x8000_0000, 0).eax == 0x8000_0021


def test_beyond_the_last_leaf_intel_repeats_the_last_basic_one_and_amd_is_silent() -> None:
    rows = [entry(0, 4, *(0x756E_6547, 0x6C65_746E, 0x4965_6E69)), entry(4, 0xAA, index=2), entry(0x4000_0000, 0x4000_0001)]
    intel = CpuidTable([*rows, entry(0x8000_0000, 0x8000_0008)])
    assert intel.execute(0x99, 2).eax == 0xAA
    assert intel.execute(0x99, 1).eax == 0
    assert intel.execute(3, 0) == (0, 0, 0, 0)
    assert intel.execute(0x8000_0009, 2).eax == 0xAA
    assert intel.execute(0x8000_0007, 2).eax == 0
    assert intel.execute(0x4000_0005, 2).eax == 0xAA
    assert intel.execute(0x4000_0101, 2).eax == 0xAA
    assert intel.execute(0xC000_0000, 2).eax == 0xAA
    amd = CpuidTable([entry(0, 4, 0x6874_7541, 0x444D_4163, 0x6974_6E65), entry(4, 0xAA, index=2)])
    assert amd.is_amd
    assert amd.execute(0x99, 2) == (0, 0, 0, 0)


def test_undefined_topology_levels_still_tell_the_x2apic_id() -> None:
    both = CpuidTable([entry(0, 0xB), entry(0xB, 1, 1, 0x100, 7, index=0), entry(0xB, 4, 4, 0x201, 7, index=1)])
    assert both.execute(0xB, 5) == (0, 0, 5, 7)
    assert both.execute(0x77, 0x105) == (0, 0, 5, 7)  # redirected to the last basic leaf
    assert CpuidTable([entry(0, 0xB)]).execute(0xB, 5) == (0, 0, 0, 0)


def test_the_first_of_equal_entries_counts_and_plain_ones_ignore_the_subleaf() -> None:
    both = CpuidTable([entry(1, 11), entry(1, 22)])
    assert both.execute(1, 77).eax == 11
    assert [item.eax for item in both.entries] == [11, 22]


def test_bits_that_follow_the_vcpu() -> None:
    vcpu = FakeVcpu(FakeVm())
    assert not vcpu.cpuid.has(cpuid.OSXSAVE)
    assert vcpu.cpuid.has(cpuid.APIC)
    vcpu.state.cr4 = cpuid.CR4_OSXSAVE | cpuid.CR4_PKE
    vcpu.state.xcr0 = 7
    vcpu.apic_base = 0
    update_runtime(vcpu)
    assert vcpu.cpuid.has(cpuid.OSXSAVE)
    assert vcpu.cpuid.has(cpuid.OSPKE)
    assert not vcpu.cpuid.has(cpuid.APIC)
    assert vcpu.cpuid.execute(0xD, 0).ebx == 576 + 256
    assert next(item for item in vcpu.cpuid.entries if (item.function, item.index) == (0xD, 0)).ebx == 576 + 256
    vcpu.state.xcr0 = 0xE7
    update_runtime(vcpu)
    assert vcpu.cpuid.execute(0xD, 0).ebx == 1664 + 1024
    assert vcpu.cpuid.execute(0xD, 1).ebx == 576 + 256 + 64 + 512 + 1024


def test_xcr0_and_address_width() -> None:
    assert table().supported_xcr0 == 0x2E7
    assert table().physical_address_bits == 46
    assert CpuidTable([]).physical_address_bits == 36
    assert CpuidTable([]).supported_xcr0 == 0


def test_check_refuses_bad_widths_and_changes_after_run() -> None:
    vcpu = FakeVcpu(FakeVm())
    with pytest.raises(OSError, match="width"):
        check(vcpu, [entry(0x8000_0008, 0x3F2E)])
    check(vcpu, [entry(0x8000_0008, 0x392E)])
    vcpu.has_run = True
    check(vcpu, vcpu.supported_cpuid())
    with pytest.raises(OSError, match="after KVM_RUN"):
        check(vcpu, [entry(0, 1)])
