"""The virtual PMU: what a guest may know of it, its registers with good and bad values, the event filter, RDPMC, and migration."""

from __future__ import annotations

import errno

import pytest

from softkvm import silicon
from softkvm.host.perf.event import Attr
from softkvm.kvm import msr
from softkvm.kvm.pmu.filter import EventFilter
from softkvm.kvm.request import REQ_PMI
from softkvm.kvm.vcpu import Vcpu
from softkvm.silicon.control import Intercept
from softkvm.silicon.pmu import LVTPC_MASKED, LVTPC_NMI, LVTPC_PENDING, MSR_LVTPC, VIRTUAL_PMI
from softkvm.uapi import kvm as uapi
from tests.kvm.test_lbr import Core, Host

PMC0, EVENTSEL0, FULL0, FIXED0 = 0xC1, 0x186, 0x4C1, 0x309
FIXED_CTRL, STATUS, CTRL, OVF_CTRL = 0x38D, 0x38E, 0x38F, 0x390
MASK = (1 << 48) - 1
BRANCHES = 0xC4 | 3 << 16 | 1 << 22
INTERRUPT = 1 << 20
CTRL_BITS = 0xF | 7 << 32
APIC_BASE = 0x1B
SPIV, LVTPC = 0xF0, 0x340


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silicon, "Core", Core)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def vcpu(host: Host) -> Vcpu:
    vcpu = host.vcpu()
    vcpu.load()
    return vcpu


def count(vcpu: Vcpu, idx: int, by: int) -> None:
    """The silicon counts on the counter that the guest's counter `idx` has got."""
    event = vcpu.pmu.counters[idx].event
    assert event is not None
    assert vcpu.cpu is not None
    core = vcpu.cpu.core
    assert isinstance(core, Core)
    core.registers.count(event.hw.idx, by)


def test_cpuid_is_version_2(host: Host) -> None:
    leaf = next(entry for entry in host.system.get_supported_cpuid() if entry.function == 0xA)
    assert (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) == (0x0730_0402, 0, 0, 0x8603)


def test_without_the_leaf_there_is_no_pmu(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.set_cpuid2([entry for entry in vcpu.get_cpuid2() if entry.function != 0xA])
    for index in (FULL0, FIXED0, FIXED_CTRL, STATUS, CTRL, OVF_CTRL, PMC0 + 2, EVENTSEL0 + 2):
        with pytest.raises(msr.MsrError):
            msr.get(vcpu, index, False)
        with pytest.raises(msr.MsrError):
            msr.set(vcpu, index, 0, False)
    assert msr.get(vcpu, PMC0, False) == 0


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (EVENTSEL0, 1 << 21),
        (EVENTSEL0, 1 << 32),
        (EVENTSEL0 + 4, 0),
        (PMC0 + 4, 0),
        (FULL0, 1 << 48),
        (FIXED0 + 3, 0),
        (FIXED_CTRL, 0x4),
        (FIXED_CTRL, 0x1000),
        (STATUS, 0),
        (CTRL, 1 << 4),
        (CTRL, 1 << 35),
        (OVF_CTRL, 1 << 61),
    ],
)
def test_reserved_bits_are_gp_and_change_nothing(vcpu: Vcpu, index: int, value: int) -> None:
    with pytest.raises(msr.MsrError):
        msr.set(vcpu, index, value, False)
    assert vcpu.get_msrs([EVENTSEL0, FIXED_CTRL, CTRL, STATUS]) == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("index", "taken"),
    [
        (EVENTSEL0, 0xFFDF_FFFF),
        (EVENTSEL0 + 3, 0xFFDF_FFFF),
        (PMC0, (1 << 64) - 1),
        (FULL0, MASK),
        (FIXED0, MASK),
        (FIXED0 + 2, MASK),
        (FIXED_CTRL, 0xBBB),
        (STATUS, 0),
        (CTRL, 0x7_0000_000F),
        (OVF_CTRL, 0xC000_0007_0000_000F),
        (0x1D9, 0x803),
        (0x345, 0),
    ],
)
def test_every_bit_of_a_register_is_taken_or_gp(vcpu: Vcpu, index: int, taken: int) -> None:
    for passing in (False, True):
        for bit in range(64):
            if taken >> bit & 1:
                msr.set(vcpu, index, 1 << bit, False)
            else:
                with pytest.raises(msr.MsrError):
                    msr.set(vcpu, index, 1 << bit, False)
        msr.set(vcpu, EVENTSEL0 + 1, BRANCHES, False)  # from here on the guest has counters without exits
        assert passing or vcpu.pmu.access.on


def test_both_names_of_a_counter(vcpu: Vcpu) -> None:
    msr.set(vcpu, PMC0, 0xFF_8123_4567, False)
    assert (msr.get(vcpu, PMC0, False), msr.get(vcpu, FULL0, False)) == (0xFFFF_8123_4567,) * 2
    msr.set(vcpu, FULL0, 0x1234_5678_9ABC, False)
    assert msr.get(vcpu, PMC0, False) == 0x1234_5678_9ABC


def test_a_counter_counts_what_the_silicon_does_while_it_is_on(vcpu: Vcpu) -> None:
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    assert vcpu.control.guest_perf_global_ctrl == 0
    msr.set(vcpu, CTRL, 1, False)
    count(vcpu, 0, 5)
    assert msr.get(vcpu, PMC0, False) == 5
    assert vcpu.control.guest_perf_global_ctrl == 1
    msr.set(vcpu, CTRL, 0, False)
    assert vcpu.control.guest_perf_global_ctrl == 0
    msr.set(vcpu, CTRL, 1, False)
    count(vcpu, 0, 2)
    msr.set(vcpu, EVENTSEL0, 0, False)
    assert msr.get(vcpu, PMC0, False) == 7


def test_an_overflow_is_status_and_interrupt(vcpu: Vcpu) -> None:
    from softkvm.kvm.pmu.registers import GuestRegisters

    msr.set(vcpu, EVENTSEL0, BRANCHES | INTERRUPT, False)
    msr.set(vcpu, FULL0, MASK - 2, False)
    msr.set(vcpu, CTRL, 1, False)
    count(vcpu, 0, 4)
    assert vcpu.cpu is not None
    assert vcpu.cpu.perf.handle_nmi(GuestRegisters(vcpu))
    assert (msr.get(vcpu, STATUS, False), vcpu.requests & REQ_PMI) == (1, REQ_PMI)
    assert msr.get(vcpu, PMC0, False) == 1
    msr.set(vcpu, OVF_CTRL, 1, False)
    assert msr.get(vcpu, STATUS, False) == 0


def test_instructions_that_kvm_does_are_counted_by_ring(vcpu: Vcpu) -> None:
    msr.set(vcpu, EVENTSEL0, 0xC0 | 1 << 17 | 1 << 22, False)  # at CPL 0
    msr.set(vcpu, EVENTSEL0 + 1, 0xC0 | 1 << 16 | 1 << 22, False)  # elsewhere
    assert vcpu.retired is not None
    vcpu.retired()
    assert msr.get(vcpu, PMC0, False) == 0
    msr.set(vcpu, CTRL, 3, False)
    vcpu.retired()
    assert (msr.get(vcpu, PMC0, False), msr.get(vcpu, PMC0 + 1, False)) == (1, 0)
    msr.set(vcpu, FULL0, MASK, False)
    vcpu.retired()
    assert (msr.get(vcpu, PMC0, False), msr.get(vcpu, STATUS, False)) == (0, 1)


@pytest.mark.parametrize(("index", "value"), [(0, 0x1234_5678_9ABC), (1 << 31, 0x5678_9ABC), (1 << 30, 77), (1 << 30 | 1 << 31, 77)])
def test_rdpmc(vcpu: Vcpu, index: int, value: int) -> None:
    msr.set(vcpu, FULL0, 0x1234_5678_9ABC, False)
    msr.set(vcpu, FIXED0, 77, False)
    assert vcpu.pmu.rdpmc(index) == value


@pytest.mark.parametrize("index", [4, 64, 32, 1 << 30 | 3, 1 << 30 | 32, 1 << 29, 0x7FFF_FFFF])
def test_rdpmc_of_no_counter(vcpu: Vcpu, index: int) -> None:
    assert vcpu.pmu.rdpmc(index) is None


def passes(vcpu: Vcpu, index: int, write: bool) -> bool:
    return not vcpu.block.msr_bitmap[0][int(write)][index >> 3] & 1 << (index & 7)


def test_a_guest_has_the_counters_that_it_uses_by_itself(host: Host, vcpu: Vcpu) -> None:
    registers = (PMC0, FULL0, FIXED0, CTRL)
    assert not any(passes(vcpu, index, write) for index in (*registers, STATUS) for write in (False, True))
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    msr.set(vcpu, FIXED0, 77, False)
    msr.set(vcpu, FIXED_CTRL, 0xB, False)
    assert all(passes(vcpu, index, write) for index in registers for write in (False, True))
    assert (passes(vcpu, STATUS, False), passes(vcpu, STATUS, True)) == (True, False)
    assert not any(passes(vcpu, index, True) for index in (EVENTSEL0, FIXED_CTRL, PMC0 + 1, FIXED0 + 1))
    assert not vcpu.control.intercepts >> Intercept.RDPMC & 1
    vcpu.control.guest_perf_global_ctrl = 1 << 32 | 1  # as an exit saves it
    count(vcpu, 32, 5)
    assert vcpu.cpu is not None
    assert vcpu.cpu.core.pmu_read(FULL0 + 1) == 0
    msr.set(vcpu, FULL0 + 1, 99, False)
    assert vcpu.cpu.core.pmu_read(FULL0 + 1) == 99  # where RDPMC finds it

    theirs = host.host_event(vcpu.cpu, Attr(config=0xC5, pinned=True))
    assert not any(passes(vcpu, index, write) for index in (*registers, STATUS) for write in (False, True))
    assert vcpu.control.intercepts >> Intercept.RDPMC & 1
    assert (msr.get(vcpu, CTRL, False), msr.get(vcpu, FIXED0, False)) == (1 << 32 | 1, 82)
    assert vcpu.control.guest_perf_global_ctrl == 1 << 32 | 1 | 1 << theirs.hw.idx
    host.release(vcpu.cpu, theirs)
    assert passes(vcpu, CTRL, True)
    assert vcpu.control.guest_perf_global_ctrl == 1 << 32 | 1


def test_the_guest_takes_its_interrupts_by_itself_where_its_apic_is_on(host: Host, vcpu: Vcpu) -> None:
    assert vcpu.lapic is not None
    assert vcpu.cpu is not None
    vcpu.lapic.mmio_write(SPIV, 4, 0x1FF)
    vcpu.lapic.mmio_write(LVTPC, 4, LVTPC_NMI)
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    assert vcpu.control.perf_controls & VIRTUAL_PMI
    assert vcpu.control.virtual_lvtpc == LVTPC_NMI
    assert (passes(vcpu, OVF_CTRL, True), passes(vcpu, MSR_LVTPC, True)) == (True, False), "xAPIC mode has no MSRs"
    msr.set(vcpu, APIC_BASE, vcpu.apic_base | 1 << 10, False)
    assert [passes(vcpu, MSR_LVTPC, write) for write in (False, True)] == [True, True]
    assert vcpu.control.guest_status_mask == CTRL_BITS | 3 << 62
    vcpu.lapic.msr_write(0x80F, 0xFF)  # the APIC is off
    assert not vcpu.control.perf_controls & VIRTUAL_PMI
    assert not any(passes(vcpu, index, True) for index in (OVF_CTRL, MSR_LVTPC))
    assert vcpu.lapic.msr_read(MSR_LVTPC) == LVTPC_NMI | LVTPC_MASKED


def test_an_interrupt_that_the_silicon_has_not_brought_is_delivered_by_kvm(host: Host, vcpu: Vcpu) -> None:
    assert vcpu.lapic is not None
    assert vcpu.cpu is not None
    vcpu.lapic.mmio_write(SPIV, 4, 0x1FF)
    vcpu.lapic.mmio_write(LVTPC, 4, LVTPC_NMI | LVTPC_PENDING)
    assert vcpu.control.virtual_lvtpc == LVTPC_NMI, "software cannot make one pending"
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    vcpu.control.virtual_lvtpc |= LVTPC_PENDING
    host.host_event(vcpu.cpu, Attr(config=0xC5, pinned=True))
    assert vcpu.requests & REQ_PMI
    assert vcpu.control.virtual_lvtpc == LVTPC_NMI
    vcpu.pmu.deliver_pmi()
    assert vcpu.take_nmis() == 1
    assert vcpu.control.virtual_lvtpc == LVTPC_NMI | LVTPC_MASKED


def test_the_status_goes_with_the_vcpu(host: Host, vcpu: Vcpu) -> None:
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    msr.set(vcpu, FULL0, MASK, False)
    msr.set(vcpu, CTRL, 1, False)
    count(vcpu, 0, 3)
    assert vcpu.cpu is not None
    core = vcpu.cpu.core
    assert core.pmu_read(STATUS) == 1
    host.system.scheduler.put(vcpu)
    assert core.pmu_read(STATUS) == 0
    assert vcpu.pmu.global_status == 1
    vcpu.load()
    assert core.pmu_read(STATUS) == 1
    msr.set(vcpu, OVF_CTRL, 1, False)
    assert (core.pmu_read(STATUS), msr.get(vcpu, FULL0, False)) == (0, 2)


def test_a_guest_with_fewer_counters_than_the_silicon_has_exits(host: Host) -> None:
    vcpu = host.vcpu()
    entries = vcpu.get_cpuid2()
    next(entry for entry in entries if entry.function == 0xA).eax = 0x0730_0202
    vcpu.set_cpuid2(entries)
    vcpu.load()
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    msr.set(vcpu, CTRL, 1, False)
    assert not passes(vcpu, CTRL, True)
    assert vcpu.control.intercepts >> Intercept.RDPMC & 1
    count(vcpu, 0, 3)
    assert vcpu.pmu.rdpmc(0) == 3


def test_amds_counters_have_no_global_control() -> None:
    host = Host(model="epyc")
    vcpu = host.vcpu()
    vcpu.load()
    msr.set(vcpu, 0xC001_0200, 0xC2 | 3 << 16 | 1 << 22, False)
    assert vcpu.control.perf_controls == 0
    count(vcpu, 0, 3)
    assert msr.get(vcpu, 0xC001_0004, False) == 3


# --- The event filter and the capability -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "events", "counts"), [(None, [], True), (0, [0xC4], True), (0, [0xC5], False), (1, [0xC4], False), (1, [0xC5], True)]
)
def test_the_filter_decides(host: Host, vcpu: Vcpu, action: int | None, events: list[int], counts: bool) -> None:
    if action is not None:
        host.vm.set_pmu_event_filter(uapi.PmuEventFilter(action=action, nevents=len(events)), events)
    msr.set(vcpu, EVENTSEL0, BRANCHES, False)
    msr.set(vcpu, CTRL, 1, False)
    assert (vcpu.pmu.counters[0].event is not None) == counts


@pytest.mark.parametrize(
    ("header", "number", "error"), [({"action": 2}, 0, errno.EINVAL), ({"flags": 1}, 0, errno.EINVAL), ({}, 301, errno.E2BIG)]
)
def test_bad_filters(header: dict[str, int], number: int, error: int) -> None:
    with pytest.raises(OSError, match=r".") as refused:
        EventFilter.make(uapi.PmuEventFilter(**header), [0] * number)
    assert refused.value.errno == error


def test_user_space_can_take_the_pmu_away_before_there_are_vcpus(host: Host) -> None:
    request = uapi.EnableCap(cap=uapi.KVM_CAP_PMU_CAPABILITY)
    request.args[0] = uapi.KVM_PMU_CAP_DISABLE
    host.vm.enable_cap(request)
    vcpu = host.vcpu()
    with pytest.raises(msr.MsrError):
        msr.get(vcpu, CTRL, False)
    with pytest.raises(OSError, match="vCPUs"):
        host.vm.enable_cap(request)


# --- Migration ---------------------------------------------------------------------------------------------------------------------


def test_counters_move_to_another_vm(host: Host, vcpu: Vcpu) -> None:
    msr.set(vcpu, EVENTSEL0, BRANCHES | INTERRUPT, False)
    msr.set(vcpu, FIXED_CTRL, 0xB, False)
    msr.set(vcpu, CTRL, 1 << 32 | 1, False)
    count(vcpu, 0, 1234)
    count(vcpu, 32, 99)
    indices = [index for index in host.system.get_msr_index_list() if index in {PMC0, EVENTSEL0, FIXED0, FIXED_CTRL, CTRL, STATUS}]
    assert len(indices) == 6
    saved = dict(zip(indices, vcpu.get_msrs(indices), strict=True))
    other = Host().vcpu()
    assert other.set_msrs(saved) == len(saved)
    other.load()
    assert dict(zip(indices, other.get_msrs(indices), strict=True)) == saved
    count(other, 0, 1)
    assert other.get_msrs([PMC0]) == [1235]
