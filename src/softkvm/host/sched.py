"""Physical CPUs and who is on them: cores, the fair queue for them, and the preempt notifiers.

Answers to Linux 6.1 `include/linux/preempt.h`, to `vcpu_load()`/`vcpu_put()` of `virt/kvm/kvm_main.c`, and to `kernel/sched/fair.c` for
who is next: the one that has run least. Without a limit the host has as many cores as threads want to run guests at a time, and the
operating system below us shares the real processors among them. A guest stays on its core when its thread leaves the kernel, as its VMCS
does in Linux, so coming back costs nothing; it goes when another one needs a core.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

from softkvm import silicon
from softkvm.host import rseq, trace
from softkvm.host.perf.context import EventContext
from softkvm.host.perf.core import CpuPerf, Perf
from softkvm.host.schedstat import run_delay_ns, was_preempted
from softkvm.host.smp import Call
from softkvm.host.task import Task, current

SLICE_NS = 3_000_000
"""How long a guest may run while others wait (`sysctl_sched_min_granularity` of a large machine)."""
_DEFAULT_PRIO = 120
_CALL_RETRY = 0.01
"""Seconds after which a call looks again where to run: the thread that it was given to may have left the kernel."""
_Result = TypeVar("_Result")


class Cpu:
    """A core, the perf events on it, and whose state is loaded on it."""

    __slots__ = ("core", "index", "occupant", "perf")

    def __init__(self, model: silicon.Model, index: int, perf: Perf) -> None:
        self.index = index
        self.core = silicon.Core(model, index)
        self.perf = CpuPerf(perf, self.core, index)
        self.occupant: Guest | None = None


class Guest(Protocol):
    """Whoever occupies a core: the preempt notifiers. All are called with the scheduler's lock held."""

    def sched_in(self, cpu: Cpu) -> None:
        """It is on `cpu` from now on; called in its own thread."""

    def sched_out(self) -> None:
        """It is on no core any more; called in its own thread."""

    def yield_core(self) -> bool:
        """Leave the core (as `sched_out()`) for another guest, whose thread calls; False if it is in use."""

    def set_need_resched(self) -> None:
        """Make its thread call `Scheduler.schedule()` soon; called by any thread."""

    def call(self, function: Callable[[], object]) -> bool:
        """Run `function` in this thread if no other one runs the guest; False if one does."""

    def interrupt_guest(self, function: Callable[[], None]) -> None:
        """Let the thread that runs the guest, if any, call `function` outside guest mode soon."""


class Wakeup(Protocol):
    """What a thread waits on until another one wakes it: `silicon.Wakeup`, or who keeps a place in its stead."""

    def is_set(self) -> bool:
        """Whether it was woken since `clear()`."""

    def clear(self) -> None:
        """Forget wake-ups so far."""

    def set(self) -> None:
        """Wake the thread."""

    def poll(self, ns: int) -> bool:
        """Wait awake until it is woken, `ns` are over or others want the processor; whether it was woken."""

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until it is woken or `timeout` seconds are over; whether it was woken."""


class Entity:
    """What the scheduler knows of a guest (`struct sched_entity`)."""

    __slots__ = ("arrived", "began", "cpu", "events", "guest", "ready", "since", "task", "vruntime")

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.vruntime = 0
        """Nanoseconds on a core, with what it was given when it came late."""
        self.since = 0
        """When `vruntime` was right, while on a core."""
        self.began = 0
        """When its slice began."""
        self.cpu: Cpu | None = None
        self.arrived = False
        """Its thread knows of the core; until then nobody may take it away."""
        self.task: Task = current()
        self.events: EventContext | None = None
        """Its perf events (`perf_event_ctxp`), once it has had one."""
        self.ready = threading.Event()


class Scheduler:
    """The cores of one kind of silicon, as many as are needed or at most `limit`."""

    def __init__(self, model: silicon.Model, limit: int | None = None, now: Callable[[], int] = time.monotonic_ns) -> None:
        """No core yet; ValueError for a limit below 1. `now` is the host's time in ns."""
        if limit is not None and limit < 1:
            raise ValueError(f"a host has at least one core, not {limit}")
        self._model = model
        self._limit = limit
        self._now = now
        self._lock = threading.Lock()
        self._cpus: list[Cpu] = []
        self._waiting: list[Entity] = []
        self._entities: WeakKeyDictionary[Guest, Entity] = WeakKeyDictionary()
        self._min_vruntime = 0
        self.perf = Perf(model)

    def wakeup(self, guest: Guest) -> Wakeup:
        """What the thread of a new guest sleeps on."""
        return silicon.Wakeup()

    # --- For the guests' threads ----------------------------------------------------------------------------------------------------

    def load(self, guest: Guest) -> None:
        """Put a guest that is on no core on one: a free one, else one whose occupant does not use it, else a new one, else in turn."""
        with self._lock:
            entity = self._entity(guest)
            self._enqueue(entity)
            self._dispatch()
        self._wait(entity)

    def put(self, guest: Guest) -> None:
        """Take a guest off its core for good; nothing happens if it is on none, or in use."""
        with self._lock:
            for cpu in self._cpus:
                if cpu.occupant is guest and guest.yield_core():
                    self._release(cpu)
            self._dispatch()

    def sleep(self, guest: Guest) -> None:
        """The guest waits for an event: others may have its core. Without a limit it keeps it. `load()` ends the sleep."""
        if self._limit is None:
            return
        with self._lock:
            self._leave(self._entity(guest), "S")

    def schedule(self, guest: Guest) -> None:
        """`schedule()`: let those who have run less go first; returns when the guest is on a core again."""
        with self._lock:
            entity = self._entity(guest)
            if entity.cpu is None or not self._waiting:
                return
            self._charge(entity)
            if min(waiter.vruntime for waiter in self._waiting) >= entity.vruntime:
                return
            entity.ready.clear()
            self._waiting.append(entity)
            self._leave(entity, "R")
        self._wait(entity)

    def spin(self, guest: Guest) -> bool:
        """The guest waits for another one in a loop, which may want our processor (`kvm_vcpu_on_spin()`); whether anybody has wanted it
        since the thread's last call."""
        os.sched_yield()
        return was_preempted()

    def run_delay(self) -> int:
        """How long the calling thread has been runnable and not run, in ns since it started."""
        return run_delay_ns()

    def runtime(self, guest: Guest) -> int:
        """Nanoseconds that count for a guest when the next one is chosen."""
        with self._lock:
            return self._entity(guest).vruntime

    def _wait(self, entity: Entity) -> None:
        """Until the entity has a core. Whoever waits is the tick: it takes cores that nobody uses, and ends slices."""
        started = self._now()
        try:
            while not entity.ready.wait(SLICE_NS / 1e9):
                self.tick()
        except BaseException:  # Ctrl-C
            with self._lock:
                self._forget(entity)
            raise
        waited = self._now() - started
        with self._lock:
            if entity.cpu is not None:
                entity.arrived = True
                entity.cpu.perf.task_sched_in(entity.events)
                entity.guest.sched_in(entity.cpu)
                entity.task.run_delay += waited
                rseq.note_event(entity.task, entity.cpu.index)

    def tick(self) -> None:
        """`scheduler_tick()`: while guests wait, take cores that are not in use, and end the slices of those who had theirs."""
        with self._lock:
            self._dispatch()
            now, owing = self._now(), len(self._waiting)
            running = [entity for entity in self._entities.values() if entity.cpu is not None and now - entity.began >= SLICE_NS]
            for entity in sorted(running, key=lambda entity: entity.vruntime + now - entity.since)[-owing:] if owing else ():
                entity.guest.set_need_resched()

    # --- Perf -----------------------------------------------------------------------------------------------------------------------

    @property
    def cpus(self) -> tuple[Cpu, ...]:
        """The cores that there are by now."""
        return tuple(self._cpus)

    def events(self, guest: Guest) -> EventContext:
        """The guest's own perf events, which are on the core that it is on."""
        with self._lock:
            entity = self._entity(guest)
            if entity.events is None:
                entity.events = EventContext()
                if entity.cpu is not None and entity.arrived:
                    entity.cpu.perf.task_sched_in(entity.events)
            return entity.events

    def call_on(self, cpu: Cpu, function: Callable[[], _Result]) -> _Result:
        """`smp_call_function_single()`: run `function` once while `cpu` is outside guest mode, and wait for it; what it returns or raises.

        It runs in this thread, or in the one that runs the guest there, and must not call the scheduler.
        """
        return self._call(lambda: cpu, function)

    def call_for(self, guest: Guest, function: Callable[[], _Result]) -> _Result:
        """`task_function_call()`: as `call_on()`, on the core that the guest is on; while it is on none it stays so."""
        return self._call(lambda: self._entity(guest).cpu, function)

    def _call(self, find: Callable[[], Cpu | None], function: Callable[[], _Result]) -> _Result:
        call = Call(function)
        while True:
            with self._lock:
                cpu = find()
                guest = None if cpu is None else cpu.occupant
                if guest is None:
                    call()
                elif not guest.call(call):
                    guest.interrupt_guest(call)
            if call.done.wait(_CALL_RETRY):
                return call.result()

    # --- With the lock held ---------------------------------------------------------------------------------------------------------

    def _entity(self, guest: Guest) -> Entity:
        entity = self._entities.get(guest)
        if entity is None:
            entity = self._entities[guest] = Entity(guest)
            entity.vruntime = self._min_vruntime
        return entity

    def _enqueue(self, entity: Entity) -> None:
        """Into the queue after a sleep: without credit for it, and with a debt of a slice at most."""
        for other in self._entities.values():
            self._charge(other)
        others = [other.vruntime for other in self._entities.values() if other.cpu is not None or other in self._waiting]
        self._min_vruntime = max(self._min_vruntime, min(others, default=entity.vruntime))
        entity.vruntime = min(max(entity.vruntime, self._min_vruntime), self._min_vruntime + SLICE_NS)
        entity.task = current()
        entity.ready.clear()
        self._waiting.append(entity)

    def _charge(self, entity: Entity) -> None:
        """`update_curr()`: count the time on the core since the last look."""
        if entity.cpu is not None:
            now = self._now()
            entity.vruntime += now - entity.since
            entity.since = now

    def _dispatch(self) -> None:
        """Hand cores to those who wait, the one that has run least first."""
        while self._waiting and (cpu := self._find()) is not None:
            entity = min(self._waiting, key=lambda waiter: waiter.vruntime)
            self._waiting.remove(entity)
            cpu.occupant, entity.cpu, entity.arrived = entity.guest, cpu, False
            entity.since = entity.began = self._now()
            entity.ready.set()

    def _find(self) -> Cpu | None:
        for cpu in self._cpus:
            if cpu.occupant is None:
                return cpu
        for cpu in self._cpus:
            if cpu.occupant is not None and self._entity(cpu.occupant).arrived and cpu.occupant.yield_core():
                self._release(cpu)
                return cpu
        if self._limit is not None and len(self._cpus) >= self._limit:
            return None
        self._cpus.append(Cpu(self._model, len(self._cpus), self.perf))
        return self._cpus[-1]

    def _release(self, cpu: Cpu) -> None:
        """The core is free."""
        if cpu.occupant is not None:
            entity = self._entity(cpu.occupant)
            cpu.perf.task_sched_out()
            self._charge(entity)
            entity.cpu = cpu.occupant = None

    def _leave(self, entity: Entity, state: str) -> None:
        """Off the core, which goes to whoever is next."""
        cpu = entity.cpu
        if cpu is None:
            return
        entity.guest.sched_out()
        self._release(cpu)
        self._dispatch()
        if trace.sched_switch.enabled:
            task, following = entity.task, self._entities.get(cpu.occupant) if cpu.occupant is not None else None
            after = (following.task.comm, following.task.tid) if following is not None else (f"swapper/{cpu.index}", 0)
            trace.sched_switch(task.comm, task.tid, _DEFAULT_PRIO, state, *after, _DEFAULT_PRIO)

    def _forget(self, entity: Entity) -> None:
        """The entity waits no longer."""
        if entity in self._waiting:
            self._waiting.remove(entity)
        elif entity.cpu is not None:
            self._release(entity.cpu)
            self._dispatch()
