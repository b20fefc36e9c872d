"""The last branch records of a guest: claimed, passed through, taken away, given back, and never another's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from softkvm import silicon
from softkvm.host.clock import VirtualClock
from softkvm.host.perf.event import Attr, Event, State
from softkvm.host.sched import Cpu
from softkvm.host.task import current
from softkvm.kvm import msr
from softkvm.kvm.system import System
from softkvm.kvm.vcpu import Vcpu
from softkvm.silicon.pmu import VIRTUAL_PMI
from softkvm.uapi import kvm as uapi
from softkvm.uapi import series
from softkvm.uapi.perf import BranchSample, SampleFormat
from tests import fake_engine
from tests.host.perf.silicon import Core as PmuCore

SELECT, TOS, FROM, TO, INFO = 0x1C8, 0x1C9, 0x680, 0x6C0, 0xDC0
DEBUGCTL, CAPABILITIES = 0x1D9, 0x345
EVENTSEL, COUNT_BRANCHES = 0x186, 0x43_00C4
SPIV = 0xF0
HOST_BRANCHES = Attr(config=0xC0, pinned=True, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY)
BAD_SELECT = 1 << 10


class Model(fake_engine.Model):
    """With a PMU and branch records."""

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return (0x0730_0404, 0, 0, 0x603) if leaf == 0xA else super().cpuid(leaf, subleaf)

    def leaves(self) -> list[tuple[int, int, bool, int, int, int, int]]:
        return [*super().leaves(), (0xA, 0, False, *self.cpuid(0xA, 0))]

    def msrs(self) -> dict[int, int]:
        return {**super().msrs(), CAPABILITIES: 0x3005}


class Core(fake_engine.Core):
    """With registers that refuse what silicon refuses."""

    def __init__(self, model: Any, index: int) -> None:
        super().__init__(model, index)
        self.registers = PmuCore(model.vendor == "amd")

    def pmu_read(self, index: int) -> int:
        return self.registers.pmu_read(index)

    def pmu_write(self, index: int, value: int) -> None:
        if index == SELECT and value >= BAD_SELECT:
            raise ValueError("reserved bits")
        self.registers.pmu_write(index, value)


class Host:
    """Two cores, and as many vCPUs as a test wants, all driven by the test's own thread."""

    def __init__(self, cores: int = 2, model: str = "cascadelake") -> None:
        self.system = System(cast(Any, Model(model)), cores=cores)
        self.vm = self.system.create_vm(clock=VirtualClock())
        self.vm.create_irqchip()

    def vcpu(self, number: int = 0) -> Vcpu:
        vcpu = self.vm.create_vcpu(number)
        vcpu.set_cpuid2(self.system.get_supported_cpuid())
        return vcpu

    def host_event(self, cpu: Cpu, attr: Attr = HOST_BRANCHES) -> Event:
        perf = self.system.scheduler.perf
        return self.system.scheduler.call_on(cpu, lambda: perf.create(attr, cpu.perf.context, current(), cpu=cpu.index))

    def release(self, cpu: Cpu, event: Event) -> None:
        self.system.scheduler.call_on(cpu, lambda: self.system.scheduler.perf.release(event))


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silicon, "Core", Core)


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.vm.close()


def intercepted(vcpu: Vcpu, index: int) -> bool:
    bit = 1 << (index & 7)
    read, write = (vcpu.block.msr_bitmap[0][direction][index >> 3] & bit for direction in (0, 1))
    assert bool(read) == bool(write) or index == DEBUGCTL
    return bool(write)


def enter(vcpu: Vcpu) -> None:
    """A VM entry, and nothing happens in the guest."""
    fake_engine.Core.script = iter([lambda _view: 1])
    vcpu.enter()


def read(vcpu: Vcpu, index: int) -> int:
    """RDMSR of the guest, by the way that the bitmap says."""
    enter(vcpu)
    if intercepted(vcpu, index):
        return msr.get(vcpu, index, False)
    assert vcpu.cpu is not None
    return vcpu.cpu.core.pmu_read(index)


def write(vcpu: Vcpu, index: int, value: int) -> None:
    """WRMSR of the guest."""
    enter(vcpu)
    if intercepted(vcpu, index):
        msr.set(vcpu, index, value, False)
    else:
        assert vcpu.cpu is not None
        vcpu.cpu.core.pmu_write(index, value)


def test_the_first_touch_claims_the_records_and_passes_them_through(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    assert intercepted(vcpu, FROM)
    assert read(vcpu, FROM) == 0
    assert vcpu.lbr.owned
    assert not any(intercepted(vcpu, index) for index in (SELECT, TOS, FROM, FROM + 31, TO, TO + 31, INFO, INFO + 31))
    bitmaps = vcpu.block.msr_bitmap[0]
    assert [bool(bitmaps[write][DEBUGCTL >> 3] & 1 << (DEBUGCTL & 7)) for write in (0, 1)] == [False, True]


def test_a_pinned_host_event_takes_them_and_gives_them_back(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    write(vcpu, FROM, 0x1234)
    assert vcpu.cpu is not None
    event = host.host_event(vcpu.cpu)
    assert (vcpu.lbr.event and vcpu.lbr.event.state, event.state) == (State.ERROR, State.ACTIVE)
    vcpu.cpu.core.pmu_write(FROM, 0x5678)
    assert read(vcpu, FROM) == 0
    assert intercepted(vcpu, FROM)
    write(vcpu, FROM, 0x9ABC)
    assert vcpu.cpu.core.pmu_read(FROM) == 0x5678
    host.release(vcpu.cpu, event)
    assert read(vcpu, FROM) == 0
    write(vcpu, FROM, 0xDEF0)
    assert read(vcpu, FROM) == 0xDEF0


def test_debugctl_is_the_guests_while_it_has_counters_as_well(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    assert vcpu.lapic is not None
    assert vcpu.cpu is not None
    vcpu.lapic.mmio_write(SPIV, 4, 0x1FF)
    write(vcpu, FROM, 0x1234)
    assert intercepted(vcpu, DEBUGCTL)
    write(vcpu, EVENTSEL, COUNT_BRANCHES)
    assert (intercepted(vcpu, DEBUGCTL), vcpu.control.guest_debugctl_mask) == (False, 0x801)
    event = host.host_event(vcpu.cpu)
    enter(vcpu)
    assert intercepted(vcpu, DEBUGCTL)
    host.release(vcpu.cpu, event)
    enter(vcpu)
    assert intercepted(vcpu, DEBUGCTL), "the records have not been touched since"
    assert read(vcpu, FROM) == 0
    assert not intercepted(vcpu, DEBUGCTL)


def test_a_slice_without_use_gives_the_event_up_unless_recording_is_on(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    write(vcpu, FROM, 0x1234)
    for expected in (True, False):
        host.system.scheduler.put(vcpu)
        vcpu.load()
        assert intercepted(vcpu, FROM)
        vcpu.pmu.handle_event()
        assert (vcpu.lbr.event is not None) == expected
    write(vcpu, DEBUGCTL, 1)
    for _ in range(3):
        host.system.scheduler.put(vcpu)
        vcpu.load()
        vcpu.pmu.handle_event()
    assert vcpu.lbr.event is not None


def test_an_access_in_the_slice_passes_through_again(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    write(vcpu, FROM, 0x1234)
    host.system.scheduler.put(vcpu)
    vcpu.load()
    assert intercepted(vcpu, FROM)
    assert read(vcpu, FROM) == 0x1234
    assert not intercepted(vcpu, FROM)


@pytest.mark.parametrize(("index", "value"), [(SELECT, BAD_SELECT), (DEBUGCTL, 1 << 6), (DEBUGCTL, 1 << 12), (CAPABILITIES, 0)])
def test_what_silicon_refuses_is_gp(host: Host, index: int, value: int) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    with pytest.raises(msr.MsrError):
        write(vcpu, index, value)


def test_without_the_format_the_registers_do_not_exist(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    assert vcpu.set_msrs({CAPABILITIES: 0x2000}) == 1
    for index in (SELECT, TOS, FROM, TO, INFO):
        with pytest.raises(msr.MsrError):
            msr.get(vcpu, index, False)
    msr.set(vcpu, DEBUGCTL, 3, False)
    assert msr.get(vcpu, DEBUGCTL, False) == 0


@pytest.mark.parametrize("value", [0x3005, 0x2004, 0x2003F, 0x10, 0x4005])
def test_capabilities_that_the_host_lacks_are_refused(host: Host, value: int) -> None:
    vcpu = host.vcpu()
    assert vcpu.set_msrs({CAPABILITIES: value}) == 0
    assert vcpu.get_msrs([CAPABILITIES]) == [0x2005]


def test_a_pmi_of_version_2_switches_recording_off(host: Host) -> None:
    vcpu = host.vcpu()
    vcpu.load()
    write(vcpu, DEBUGCTL, 0x801)
    vcpu.pmu.deliver_pmi()
    assert read(vcpu, DEBUGCTL) == 0x800


# --- The capability ----------------------------------------------------------------------------------------------------------------


def cap(enable: int, address: int, flags: int = 0) -> uapi.EnableCap:
    request = uapi.EnableCap(cap=series.KVM_CAP_X86_GUEST_LBR, flags=flags)
    request.args[0], request.args[1] = enable, address
    return request


def test_the_capability_tells_the_layout(host: Host) -> None:
    vcpu, buffer = host.vcpu(), silicon.allocate(4096)
    assert host.vm.check_extension(series.KVM_CAP_X86_GUEST_LBR) == 20
    vcpu.set_msrs({CAPABILITIES: 0x2000})
    host.vm.enable_cap(cap(1, buffer.address))
    stack = series.LbrStack.from_buffer_copy(memoryview(buffer)[:20])
    assert (stack.nr, stack.tos, stack.from_, stack.to, stack.info) == (32, 0x1C9, 0x680, 0x6C0, 0xDC0)
    assert vcpu.lbr.layout is not None
    host.vm.enable_cap(cap(0, buffer.address))
    assert vcpu.lbr.layout is None


def test_bad_arguments_of_the_capability(host: Host) -> None:
    buffer = silicon.allocate(4096)
    with pytest.raises(OSError, match="no vCPU") as without:
        host.vm.enable_cap(cap(1, buffer.address))
    vcpu = host.vcpu()
    with pytest.raises(OSError, match=r".*") as fault:
        host.vm.enable_cap(cap(1, 8))
    with pytest.raises(OSError, match="flags") as flags:
        host.vm.enable_cap(cap(1, buffer.address, flags=1))
    assert [caught.value.errno for caught in (without, fault, flags)] == [errno.EINVAL, errno.EFAULT, errno.EINVAL]
    entries = vcpu.get_cpuid2()
    next(entry for entry in entries if entry.function == 1).eax ^= 0x10
    vcpu.set_cpuid2(entries)
    with pytest.raises(OSError, match="other last branch records") as model:
        host.vm.enable_cap(cap(1, buffer.address))
    assert model.value.errno == errno.EINVAL


# --- Interleavings -----------------------------------------------------------------------------------------------------------------

VCPUS, CORES = 3, 2
numbers = st.integers(0, VCPUS - 1)
places = st.integers(0, 31)


class Exclusion(RuleBasedStateMachine):
    """Three vCPUs and host events on two cores: who owns the records, what is intercepted, and what each guest may read.

    The model of a guest's stack is what it wrote last, or zeros from the moment that the host had the core's records in between.
    """

    @initialize()
    def boot(self) -> None:
        self.host = Host(CORES)
        self.vcpus = [self.host.vcpu(number) for number in range(VCPUS)]
        for vcpu in self.vcpus:
            assert vcpu.lapic is not None
            vcpu.lapic.mmio_write(SPIV, 4, 0x1FF)
        self.written: list[dict[int, int]] = [{} for _ in range(VCPUS)]
        self.host_events: dict[int, Event] = {}
        self.serial = 1

    @rule(number=numbers)
    def load(self, number: int) -> None:
        """The vCPU gets a core, if need be another one's."""
        self.vcpus[number].load()

    @rule(number=numbers)
    def put(self, number: int) -> None:
        self.host.system.scheduler.put(self.vcpus[number])

    @rule(number=numbers, place=places)
    def guest_writes(self, number: int, place: int) -> None:
        vcpu = self.vcpus[number]
        vcpu.load()
        self.serial += 1
        enter(vcpu)
        evicted = vcpu.cpu is not None and vcpu.cpu.index in self.host_events
        # A guest that records fills its stack from TOS downwards; who stops reading at an empty entry sees no gaps.
        for index in range(place + 1):
            write(vcpu, FROM + index, self.serial << 8 | index)
        write(vcpu, TOS, place)
        if not evicted:
            self.written[number] |= {index: self.serial << 8 | index for index in range(place + 1)}
            self.written[number] = {index: value for index, value in self.written[number].items() if index <= place}

    @rule(number=numbers)
    def guest_reads(self, number: int) -> None:
        vcpu = self.vcpus[number]
        vcpu.load()
        mine = self.written[number]
        for index in range(32):
            value = read(vcpu, FROM + index)
            assert value == 0 or value == mine.get(index) or self._stale(number, value), "an entry of somebody else"

    def _stale(self, number: int, value: int) -> bool:
        """An older entry of the same guest, from before it moved TOS."""
        return value >> 8 <= self.serial and value & 0xFF < 32 and self._writer.get(value >> 8, number) == number

    @property
    def _writer(self) -> dict[int, int]:
        return {value >> 8: number for number, entries in enumerate(self.written) for value in entries.values()}

    @rule(core=st.integers(0, CORES - 1))
    def host_takes(self, core: int) -> None:
        cpus = self.host.system.scheduler.cpus
        if core < len(cpus) and core not in self.host_events:
            self.host_events[core] = event = self.host.host_event(cpus[core])
            assert event.state is State.ACTIVE
            for index in range(32):
                assert cpus[core].core.pmu_read(FROM + index) == 0
                cpus[core].core.pmu_write(FROM + index, 1 << 40 | index)

    @rule(core=st.integers(0, CORES - 1))
    def host_gives_back(self, core: int) -> None:
        event = self.host_events.pop(core, None)
        if event is not None:
            self.host.release(self.host.system.scheduler.cpus[core], event)

    @rule(number=numbers, on=st.booleans())
    def guest_counts(self, number: int, on: bool) -> None:
        """With a counter of its own a guest takes its interrupts and writes DEBUGCTL by itself."""
        self.vcpus[number].load()
        write(self.vcpus[number], EVENTSEL, COUNT_BRANCHES if on else 0)

    @rule(number=numbers)
    def slice_ends(self, number: int) -> None:
        vcpu = self.vcpus[number]
        self.host.system.scheduler.put(vcpu)
        vcpu.load()
        vcpu.pmu.handle_event()

    @invariant()
    def one_owner_per_core(self) -> None:
        if not hasattr(self, "vcpus"):
            return
        owners = [vcpu.cpu.index for vcpu in self.vcpus if vcpu.lbr.owned and vcpu.cpu is not None]
        assert len(owners) == len(set(owners))
        assert not set(owners) & self.host_events.keys()
        for vcpu in self.vcpus:
            assert vcpu.lbr.event is None or (vcpu.lbr.event.oncpu >= 0) == vcpu.lbr.owned
            if vcpu.cpu is not None:
                enter(vcpu)
                assert intercepted(vcpu, FROM) or vcpu.lbr.owned, "the host's records are passed through"
                virtual = vcpu.control.perf_controls & VIRTUAL_PMI
                assert intercepted(vcpu, DEBUGCTL) or (vcpu.lbr.owned and virtual), "nobody limits what the guest writes"
                assert not virtual or vcpu.cpu.index not in self.host_events

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.vm.close()


def test_no_guest_reads_records_of_another_or_of_the_host() -> None:
    run_state_machine_as_test(Exclusion, settings=settings(max_examples=60, stateful_step_count=40))
