"""Events on counters: rights, errors, sharing, periods and overflows."""

from __future__ import annotations

import errno
from typing import Any, cast

import pytest

from softkvm.host.perf.context import EventContext
from softkvm.host.perf.core import CpuPerf, Perf
from softkvm.host.perf.event import Attr, Event, State
from softkvm.host.perf.intel import FIXED, FULL_WIDTH_PMC0, GLOBAL_STATUS
from softkvm.host.task import current
from softkvm.uapi.perf import PERF_TYPE_HARDWARE, BranchSample, Hardware, SampleFormat
from tests.host.perf.silicon import MASK, Core, Model, Registers

INSTRUCTIONS, CYCLES, BRANCHES = 0xC0, 0x3C, 0xC4
BRANCH_STACK = Attr(config=INSTRUCTIONS, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY)
GUEST_LBR = Attr(
    config=0x1B00,
    pinned=True,
    exclude_host=True,
    sample_type=SampleFormat.BRANCH_STACK,
    branch_sample_type=BranchSample.CALL_STACK | BranchSample.USER,
)


class Host:
    """One CPU and one task."""

    def __init__(self) -> None:
        self.clock = 0
        self.perf = Perf(cast(Any, Model()), lambda: self.clock)
        self.core = Core()
        self.cpu = CpuPerf(self.perf, cast(Any, self.core), 0)
        self.task = EventContext()

    def on_task(self, attr: Attr) -> Event:
        return self.perf.create_kernel_counter(attr, self.task)

    def on_cpu(self, attr: Attr) -> Event:
        return self.perf.create(attr, self.cpu.context, current(), cpu=0)


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_tasks_event_counts_while_the_task_is_on_the_cpu(host: Host) -> None:
    event = host.on_task(Attr(config=BRANCHES))
    assert (event.state, event.oncpu) == (State.INACTIVE, -1)
    host.cpu.task_sched_in(host.task)
    assert (event.state, event.oncpu) == (State.ACTIVE, 0)
    host.core.count(event.hw.idx, 5)
    assert host.perf.read(event) == 5
    host.cpu.task_sched_out()
    assert (event.state, event.oncpu, event.count) == (State.INACTIVE, -1, 5)


def test_an_event_of_a_task_that_is_there_starts_at_once(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    event = host.on_task(Attr(config=INSTRUCTIONS))
    assert (event.state, event.hw.idx) == (State.ACTIVE, FIXED)
    assert host.cpu.counters.guest_global_ctrl == 1 << FIXED


def test_events_that_only_a_fixed_counter_can_have_get_it(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    events = [host.on_task(Attr(config=config)) for config in (INSTRUCTIONS, CYCLES, 0x0300, INSTRUCTIONS)]
    assert [event.hw.idx for event in events] == [FIXED, FIXED + 1, FIXED + 2, 0]


def test_what_the_cpu_does_not_count_is_enoent(host: Host) -> None:
    with pytest.raises(OSError, match="does not count") as absent:
        host.on_task(Attr(type=PERF_TYPE_HARDWARE, config=7))
    assert absent.value.errno == errno.ENOENT
    assert host.on_task(Attr(type=PERF_TYPE_HARDWARE, config=Hardware.BRANCH_MISSES)).hw.config & 0xFFFF == 0xC5


def test_a_pinned_event_of_the_cpu_takes_the_counter_of_a_tasks_pinned_one(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    mine = [host.on_task(Attr(config=BRANCHES, pinned=True)) for _ in range(4)]
    assert all(event.state is State.ACTIVE for event in mine)
    theirs = host.on_cpu(Attr(config=BRANCHES, pinned=True))
    assert theirs.state is State.ACTIVE
    assert [event.state for event in mine].count(State.ERROR) == 1
    lost = next(event for event in mine if event.state is State.ERROR)
    host.perf.release(theirs)
    assert lost.state is State.ERROR  # nobody tries again by himself
    host.perf.enable(lost)
    assert lost.oncpu == 0


def test_a_flexible_event_waits_and_comes_back(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    flexible = [host.on_cpu(Attr(config=BRANCHES)) for _ in range(4)]
    pinned = host.on_task(Attr(config=BRANCHES, pinned=True))
    assert pinned.state is State.ACTIVE
    assert [event.state for event in flexible].count(State.INACTIVE) == 1
    host.perf.release(pinned)
    assert all(event.state is State.ACTIVE for event in flexible)


def test_flexible_events_without_room_take_turns(host: Host) -> None:
    events = [host.on_cpu(Attr(config=BRANCHES)) for _ in range(6)]
    times_on = [0] * 6
    for _ in range(6):
        assert host.cpu.rotate_necessary
        for n, event in enumerate(events):
            times_on[n] += event.state is State.ACTIVE
        host.cpu.rotate()
    assert times_on == [4] * 6
    for event in events[:2]:
        host.perf.release(event)
    assert not host.cpu.rotate_necessary


def test_a_count_of_part_of_the_time_is_scaled(host: Host) -> None:
    host.clock = 1000
    events = [host.on_cpu(Attr(config=BRANCHES)) for _ in range(5)]
    host.core.count(events[0].hw.idx, 10)
    host.clock = 2000
    host.cpu.rotate()
    assert (events[0].state, events[4].state) == (State.INACTIVE, State.ACTIVE)
    host.clock = 5000
    assert [host.perf.read_scaled(event) for event in events[:2]] == [40, 0]


def test_a_group_is_on_as_a_whole_or_not_at_all(host: Host) -> None:
    def group(size: int) -> list[Event]:
        leader = host.on_cpu(Attr(config=BRANCHES))
        members = [host.perf.create(Attr(config=BRANCHES), host.cpu.context, current(), cpu=0, leader=leader) for _ in range(size - 1)]
        return [leader, *members]

    first, second = group(3), group(3)
    states = [[event.state is State.ACTIVE for event in events] for events in (first, second)]
    assert states == [[True] * 3, [False] * 3]
    host.cpu.rotate()
    states = [[event.state is State.ACTIVE for event in events] for events in (first, second)]
    assert states == [[False] * 3, [True] * 3]
    host.perf.disable(second[0])
    assert [event.state for event in second] == [State.OFF, State.INACTIVE, State.INACTIVE]
    assert all(event.state is State.ACTIVE for event in first)
    host.perf.release(first[0])
    assert [event.leader for event in first[1:]] == first[1:]
    assert all(event.state is State.ACTIVE for event in first[1:])


def test_what_cannot_be_a_group_is_einval(host: Host) -> None:
    leader = host.on_cpu(Attr(config=BRANCHES))
    member = host.perf.create(Attr(config=BRANCHES), host.cpu.context, current(), cpu=0, leader=leader)
    for attr, context, chosen in (
        (Attr(config=BRANCHES, pinned=True), host.cpu.context, leader),
        (Attr(config=BRANCHES), host.task, leader),
        (Attr(config=BRANCHES), host.cpu.context, member),
    ):
        with pytest.raises(OSError, match="no group") as refused:
            host.perf.create(attr, context, current(), cpu=0, leader=chosen)
        assert refused.value.errno == errno.EINVAL
    for _ in range(2):
        host.perf.create(Attr(config=BRANCHES), host.cpu.context, current(), cpu=0, leader=leader)
    with pytest.raises(OSError, match="room"):
        host.perf.create(Attr(config=BRANCHES), host.cpu.context, current(), cpu=0, leader=leader)


def test_exclude_guest_never_counts(host: Host) -> None:
    host.on_cpu(Attr(config=INSTRUCTIONS, exclude_guest=True))
    assert host.cpu.counters.guest_global_ctrl == 0


def test_an_overflow_tells_the_handler_once_per_period(host: Host) -> None:
    seen: list[int] = []
    event = host.perf.create(
        Attr(config=BRANCHES, sample_period=100), host.cpu.context, current(), lambda event, _registers: seen.append(event.count)
    )
    host.core.count(event.hw.idx, 99)
    assert not host.cpu.handle_nmi(Registers())
    host.core.count(event.hw.idx, 1)
    assert host.cpu.handle_nmi(Registers())
    host.core.count(event.hw.idx, 103)
    assert host.cpu.handle_nmi(Registers())
    host.core.count(event.hw.idx, 97)
    assert host.cpu.handle_nmi(Registers())
    assert seen == [100, 203, 300]


def test_a_new_period_counts_from_now(host: Host) -> None:
    seen: list[int] = []
    event = host.perf.create(
        Attr(config=BRANCHES, sample_period=100), host.cpu.context, current(), lambda event, _registers: seen.append(event.count)
    )
    host.core.count(event.hw.idx, 60)
    host.perf.set_period(event, 10)
    host.core.count(event.hw.idx, 10)
    host.cpu.handle_nmi(Registers())
    assert seen == [70]


def test_pause_takes_the_count(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    event = host.on_task(Attr(config=BRANCHES))
    host.core.count(event.hw.idx, 7)
    assert host.perf.pause(event) == 7
    host.perf.enable(event)
    host.core.count(event.hw.idx, 2)
    assert host.perf.read(event) == 9


def test_a_lent_counter_is_the_one_asked_for_and_has_the_guests_value(host: Host) -> None:
    overflows: list[Event] = []
    host.cpu.task_sched_in(host.task)
    attr = Attr(config=INSTRUCTIONS, counter=2, pinned=True, disabled=True, exclude_host=True)
    event = host.perf.create_kernel_counter(attr, host.task, lambda event, _registers: overflows.append(event))
    host.perf.write(event, MASK - 2)
    host.perf.enable(event)
    assert (event.hw.idx, host.core.pmu_read(FULL_WIDTH_PMC0 + 2)) == (2, MASK - 2)
    assert host.cpu.counters.guest_global_ctrl == 0
    host.core.count(2, 5)
    assert host.cpu.handle_nmi(Registers())
    assert (overflows, host.perf.read(event), host.core.pmu_read(GLOBAL_STATUS)) == ([event], 2, 0)
    host.cpu.task_sched_out()
    host.core.pmu_write(FULL_WIDTH_PMC0 + 2, 77)
    host.cpu.task_sched_in(host.task)
    assert host.core.pmu_read(FULL_WIDTH_PMC0 + 2) == 2
    host.cpu.counters.guest_status = 1 << 2
    host.core.count(2, MASK)
    assert host.cpu.handle_nmi(Registers())
    assert (len(overflows), host.core.pmu_read(GLOBAL_STATUS)) == (2, 1 << 2)


# --- The branch records ------------------------------------------------------------------------------------------------------------


def test_a_guests_lbr_event_needs_no_counter(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    event = host.on_task(GUEST_LBR)
    assert (event.state, event.no_counter, event.hw.idx) == (State.ACTIVE, True, -1)
    assert (host.cpu.counters.guest_global_ctrl, host.cpu.counters.guest_debugctl) == (0, 0)
    assert host.perf.read(event) == 0


def test_only_the_kernels_own_event_is_a_guests(host: Host) -> None:
    event = host.perf.create(
        Attr(config=INSTRUCTIONS, exclude_host=True, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY),
        host.cpu.context,
        current(),
    )
    assert not event.no_counter


def test_a_guests_lbr_event_shares_with_nobody(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    guest, other = host.on_task(GUEST_LBR), host.on_task(GUEST_LBR)
    flexible = host.on_cpu(BRANCH_STACK)
    assert (guest.state, other.state, flexible.state) == (State.ACTIVE, State.ERROR, State.INACTIVE)


def test_host_events_of_one_selection_share(host: Host) -> None:
    first, second = host.on_cpu(BRANCH_STACK), host.on_cpu(BRANCH_STACK)
    calls = Attr(config=INSTRUCTIONS, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY_CALL)
    third = host.on_cpu(calls)
    assert (first.state, second.state, third.state) == (State.ACTIVE, State.ACTIVE, State.INACTIVE)
    assert host.cpu.counters.guest_debugctl == 0x801


def test_a_pinned_event_of_the_cpu_evicts_the_guest_and_finds_its_entries_gone(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    guest = host.on_task(GUEST_LBR)
    host.core.msrs |= {0x680: 0x1111, 0x6C0: 0x2222, 0x1C8: 0x1F9}
    theirs = host.on_cpu(Attr(config=INSTRUCTIONS, pinned=True, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY))
    assert (guest.state, guest.oncpu, theirs.state) == (State.ERROR, -1, State.ACTIVE)
    assert (host.core.msrs[0x680], host.core.msrs[0x6C0], host.core.msrs[0x1C8]) == (0, 0, 0)
    host.core.msrs |= {0x680: 0x3333, 0x6C0: 0x4444}
    host.perf.release(theirs)
    host.perf.enable(guest)
    assert guest.state is State.ACTIVE
    assert (host.core.msrs[0x680], host.core.msrs[0x6C0]) == (0, 0)


def fill(core: Core, tos: int, entries: int) -> None:
    core.msrs[0x1C9] = tos
    for step in range(entries):
        index = tos - step & 31
        core.msrs |= {0x680 + index: 0x100 + step, 0x6C0 + index: 0x200 + step, 0xDC0 + index: step}


def test_stack_and_select_survive_a_switch(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    host.on_task(GUEST_LBR)
    fill(host.core, 3, 10)
    host.core.msrs[0x1C8] = 0x1F9
    before = dict(host.core.msrs)
    host.cpu.task_sched_out()
    other = EventContext()
    host.perf.create_kernel_counter(GUEST_LBR, other)
    host.cpu.task_sched_in(other)
    assert host.core.msrs[0x680] == 0
    fill(host.core, 20, 32)
    host.cpu.task_sched_out()
    host.cpu.task_sched_in(host.task)
    for msr in (0x1C8, 0x1C9, *range(0x680, 0x6A0), *range(0x6C0, 0x6E0), *range(0xDC0, 0xDE0)):
        assert host.core.msrs.get(msr, 0) == before.get(msr, 0), hex(msr)


def test_an_undisturbed_stack_is_left_alone(host: Host) -> None:
    host.cpu.task_sched_in(host.task)
    host.on_task(GUEST_LBR)
    fill(host.core, 3, 2)
    host.core.msrs[0x680 + 9] = 0x99  # behind the first empty entry: not saved
    host.cpu.task_sched_out()
    host.cpu.task_sched_in(host.task)
    assert host.core.msrs[0x680 + 9] == 0x99


def test_a_sample_of_user_code_has_no_branch_from_the_kernel(host: Host) -> None:
    attr = Attr(config=INSTRUCTIONS, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=BranchSample.ANY | BranchSample.USER)
    event = host.on_cpu(attr)
    assert host.core.msrs[0x1C8] == 0x001
    host.core.msrs |= {0x1C9: 1, 0x681: 0x1000, 0x6C1: 0x2000, 0xDC1: 1 << 63 | 9, 0x680: 0xFFFF_FFFF_8000_0000, 0x6C0: 0x1000}
    branches = host.cpu.counters.branches
    assert branches is not None
    assert branches.read(event) == [(0x1000, 0x2000, True, 9)]


@pytest.mark.parametrize(
    ("kinds", "select"),
    [
        (BranchSample.ANY, 0x000),
        (BranchSample.ANY | BranchSample.USER, 0x001),
        (BranchSample.ANY | BranchSample.KERNEL, 0x002),
        (BranchSample.ANY_CALL | BranchSample.USER, 0x0E5),
        (BranchSample.ANY_RETURN | BranchSample.USER, 0x0DD),
        (BranchSample.IND_CALL | BranchSample.USER, 0x1ED),
        (BranchSample.COND | BranchSample.USER, 0x1F9),
        (BranchSample.CALL | BranchSample.USER, 0x1F5),
        (BranchSample.CALL_STACK | BranchSample.USER, 0x3C5),
    ],
)
def test_select_is_what_linux_writes(host: Host, kinds: BranchSample, select: int) -> None:
    host.on_cpu(Attr(config=INSTRUCTIONS, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=kinds))
    assert host.core.msrs[0x1C8] == select
