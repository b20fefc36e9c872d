"""Perf's scheduler of events: contexts of CPUs and tasks on the counters of the CPUs, in the order of their rights.

Answers to Linux 6.1 `kernel/events/core.c`: `ctx_resched()`, `perf_event_sched_in()`, `group_sched_in()`, `perf_rotate_context()`,
`perf_event_create_kernel_counter()`, `perf_event_{enable,disable,pause,period,read_value}()`. Order: the CPU's pinned events, the task's
pinned, the CPU's flexible, the task's flexible. A group is on the CPU as a whole or not at all. A pinned one without room is in error until
it is enabled anew; flexible ones take turns.

One lock guards all events of a `Perf`. Functions that touch the counters of a CPU run where that CPU cannot be in a guest: in the thread of
the guest on it, or by `host/sched.py` (`Scheduler.call_on()`) from anywhere else.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from softkvm.host.perf.context import EventContext
from softkvm.host.perf.counters import Counters, Pmu, event_init, make_pmu, schedule_events
from softkvm.host.perf.event import TASK_TOMBSTONE, Attr, Event, OverflowHandler, Owner, Registers, State

if TYPE_CHECKING:
    from softkvm.silicon import Core, Model

_PRIORITY = (True, False)


class CpuPerf:
    """`struct perf_cpu_context`: the contexts and the counters of one CPU."""

    def __init__(self, perf: Perf, core: Core, index: int) -> None:
        """A CPU without events."""
        self.perf = perf
        self.index = index
        self.counters = Counters(core, perf.pmu)
        self.context = EventContext()
        self.context.cpu = self
        self.task: EventContext | None = None
        """The context of the task that is on the CPU, if it has one."""
        self.rotate_necessary = False
        """A flexible event waits for room: `rotate()` at the next tick."""

    # --- Task switches, called by the scheduler -------------------------------------------------------------------------------------

    def task_sched_in(self, task: EventContext | None) -> None:
        """`perf_event_task_sched_in()`: the CPU's flexible events make room for the task's pinned ones."""
        if task is None:
            return
        with self.perf.lock:
            self.task, task.cpu = task, self
            if task.pinned:
                self._sched_out(self.context.flexible)
            self._sched_in()
            if self.counters.branches is not None:
                self.counters.branches.task_in(task)
            self.counters.commit()

    def task_sched_out(self) -> None:
        """`perf_event_task_sched_out()`."""
        task = self.task
        if task is None:
            return
        with self.perf.lock:
            if self.counters.branches is not None:
                self.counters.branches.task_out(task)
            self._sched_out(task.flexible)
            self._sched_out(task.pinned)
            self.task = task.cpu = None
            self._sched_in()
            self.counters.commit()

    def rotate(self) -> None:
        """`perf_rotate_context()`: the flexible events that have waited longest go first, and those that were on wait behind them."""
        with self.perf.lock:
            contexts = [self.context] if self.task is None else [self.context, self.task]
            for context in contexts:
                self._sched_out(context.flexible)
                if any(self._waits(event) for event in context.flexible):
                    context.flexible.append(context.flexible.pop(0))
            self._sched_in()
            self.counters.commit()

    # --- Scheduling, with the lock held ---------------------------------------------------------------------------------------------

    def resched(self, context: EventContext, pinned: bool) -> None:
        """`ctx_resched()`: an event of this kind was added to `context`; those of lower rights make room and try again."""
        task = self.task
        if task is not None:
            self._sched_out(task.flexible)
            if pinned:
                self._sched_out(task.pinned)
        if context is self.context and pinned:
            self._sched_out(self.context.pinned)
        if context is self.context or pinned:
            self._sched_out(self.context.flexible)
        self._sched_in()
        self.counters.commit()

    def release(self, event: Event) -> None:
        """Take an event off the counters, and let others have the room."""
        if event.state is State.ACTIVE:
            self._sched_out([event])
            event.enter(State.OFF, self.perf.now())
            self._sched_in()
            self.counters.commit()

    def _waits(self, event: Event) -> bool:
        return event.state is State.INACTIVE and event.cpu in (-1, self.index)

    def _sched_in(self) -> None:
        """`perf_event_sched_in()`: what is not on yet, in the order of rights. The first flexible event without room ends its list."""
        contexts = (self.context,) if self.task is None else (self.context, self.task)
        self.rotate_necessary = False
        for pinned in _PRIORITY:
            for context in contexts:
                for event in context.events(pinned):
                    if self._group_sched_in(event):
                        continue
                    if not pinned:
                        self.rotate_necessary = True
                        break
                    event.enter(State.ERROR, self.perf.now())

    def _group_sched_in(self, leader: Event) -> bool:
        """`group_sched_in()`: False if some of the group that want to be on the CPU have no room, so that none of them is."""
        if leader.state is not State.ACTIVE and not self._waits(leader):
            return True
        added: list[Event] = []
        for event in leader.group:
            if not self._waits(event):
                continue
            if not self._event_sched_in(event):
                for other in added:
                    self._event_sched_out(other)
                return False
            added.append(event)
        return True

    def _event_sched_in(self, event: Event) -> bool:
        """`event_sched_in()`."""
        if not self.counters.add(event, first_time=not event.has_run):
            return False
        event.enter(State.ACTIVE, self.perf.now())
        event.oncpu, event.has_run = self.index, True
        return True

    def _sched_out(self, events: list[Event]) -> None:
        """`group_sched_out()` of the groups that these events lead."""
        for leader in events:
            for event in leader.group:
                if event.state is State.ACTIVE:
                    self._event_sched_out(event)

    def _event_sched_out(self, event: Event) -> None:
        """`event_sched_out()`."""
        self.counters.remove(event)
        event.enter(State.INACTIVE, self.perf.now())
        event.oncpu = -1

    # --- Interrupts -----------------------------------------------------------------------------------------------------------------

    def handle_nmi(self, registers: Registers) -> bool:
        """`perf_event_nmi_handler()`: an NMI came out of a guest whose registers these are; False if it was not a counter's."""
        with self.perf.lock:
            return self.counters.handle_overflows(registers)


class Perf:
    """The perf of one host."""

    def __init__(self, model: Model, now: Callable[[], int] = time.monotonic_ns) -> None:
        """For cores of `model`; `now` is the host's time in ns."""
        self.pmu: Pmu = make_pmu(model)
        self.now = now
        self.lock = threading.RLock()
        """Guards every event, context and counter."""

    def create_kernel_counter(self, attr: Attr, context: EventContext, handler: OverflowHandler | None = None, cpu: int = -1) -> Event:
        """`perf_event_create_kernel_counter()`: an event of the kernel's own in `context`; OSError for what the silicon cannot do."""
        return self.create(attr, context, TASK_TOMBSTONE, handler, cpu)

    def create(
        self,
        attr: Attr,
        context: EventContext,
        owner: Owner,
        handler: OverflowHandler | None = None,
        cpu: int = -1,
        leader: Event | None = None,
    ) -> Event:
        """`perf_event_open(2)`: an event on one CPU's or one task's context, on at once unless it is `disabled`; OSError as above.

        With a `leader` it joins that event's group; EINVAL if the two do not count for the same, or no CPU has room for the group.
        """
        event = Event(attr, cpu, owner, handler, self.now())
        event_init(self.pmu, event)
        with self.lock:
            event.context = context
            if leader is not None:
                self._join(event, leader)
            else:
                context.events(attr.pinned).append(event)
            if event.state is State.INACTIVE:
                self._install(event, context)
        return event

    def _join(self, event: Event, leader: Event) -> None:
        """`perf_event_open(2)` for a member of a group, and `validate_group()`."""
        alike = leader.leader is leader and leader.context is event.context and leader.cpu == event.cpu and not event.attr.pinned
        if not alike or schedule_events(self.pmu, [*leader.group, event]) is None:
            raise OSError(errno.EINVAL, "such events are no group, or no CPU has room for it")
        leader.siblings.append(event)
        event.leader = leader

    def _install(self, event: Event, context: EventContext) -> None:
        if context.cpu is not None:
            context.cpu.resched(context, event.leader.attr.pinned)

    def release(self, event: Event) -> None:
        """`perf_event_release_kernel()`: the event is no more; harmless when repeated."""
        with self.lock:
            context = event.context
            if context is None:
                return
            self.disable(event)
            orphans = event.siblings
            if event.leader is event:
                place = context.events(event.attr.pinned)
                place[place.index(event) : place.index(event) + 1] = orphans
                for orphan in orphans:
                    orphan.leader = orphan
                event.siblings = []
            else:
                event.leader.siblings.remove(event)
            event.enter(State.DEAD, self.now())
            event.context = None
            if context.cpu is not None and orphans:
                context.cpu.resched(context, event.attr.pinned)

    def enable(self, event: Event) -> None:
        """`perf_event_enable()`: also out of error."""
        with self.lock:
            if event.state in (State.OFF, State.ERROR) and event.context is not None:
                event.enter(State.INACTIVE, self.now())
                self._install(event, event.context)

    def disable(self, event: Event) -> None:
        """`perf_event_disable()`."""
        with self.lock:
            if event.state is State.ACTIVE and event.context is not None and event.context.cpu is not None:
                event.context.cpu.release(event)
            elif event.state is State.INACTIVE:
                event.enter(State.OFF, self.now())

    def pause(self, event: Event) -> int:
        """`perf_event_pause()`: disable the event; its count."""
        with self.lock:
            self.disable(event)
            return event.count

    def set_period(self, event: Event, period: int) -> None:
        """`perf_event_period()`: from now on the event interrupts after `period` more, and again and again."""
        with self.lock:
            counters = self._counters(event)
            if counters is not None:
                counters.update(event)
            event.hw.sample_period = event.hw.last_period = event.hw.period_left = period
            if counters is not None:
                counters.restart(event)

    def write(self, event: Event, value: int) -> None:
        """Set the counter of an event that is lent."""
        with self.lock:
            event.count = value
            counters = self._counters(event)
            if counters is not None:
                counters.restart(event)

    def read(self, event: Event) -> int:
        """`perf_event_read_value()`: what the event has counted."""
        with self.lock:
            counters = self._counters(event)
            if counters is not None:
                counters.update(event)
            return event.count

    def read_scaled(self, event: Event) -> int:
        """What the event would have counted, had it been on a CPU for all the time that it wanted to be."""
        with self.lock:
            count = self.read(event)
            event.enter(event.state, self.now())
            return count * event.enabled_ns // event.running_ns if 0 < event.running_ns < event.enabled_ns else count

    @staticmethod
    def _counters(event: Event) -> Counters | None:
        """The counters that the event is on."""
        if event.state is not State.ACTIVE or event.context is None or event.context.cpu is None:
            return None
        return event.context.cpu.counters
