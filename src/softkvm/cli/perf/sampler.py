"""Samples of a guest: an event of the host's perf on each vCPU, and what the guest did whenever one of them overflowed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from softkvm.cli.perf.guest import GuestView, Process
from softkvm.cli.perf.orc import Frame, Unwinder
from softkvm.host.perf.branches import Branch
from softkvm.host.perf.event import Attr, Event, Registers
from softkvm.host.task import current
from softkvm.kvm import Vcpu
from softkvm.uapi.perf import PERF_TYPE_HARDWARE, BranchSample, Hardware, SampleFormat

EVENTS = {
    "instructions": Hardware.INSTRUCTIONS,
    "cycles": Hardware.CPU_CYCLES,
    "branches": Hardware.BRANCH_INSTRUCTIONS,
    "branch-misses": Hardware.BRANCH_MISSES,
}
"""What can be sampled and counted, by perf's names."""
MOST_SAMPLES = 1_000_000
_MODIFIERS = {"u": "exclude_kernel", "k": "exclude_user"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the guest did at one overflow."""

    ip: int
    user: bool
    cpu: int
    time: int
    process: Process | None
    branches: tuple[Branch, ...] = ()
    """The newest first: the last ones, or those of calls that have not returned."""
    kernel_chain: tuple[int, ...] = ()
    """In kernel mode, addresses in the functions on the stack, the innermost first."""


def parse_event(text: str) -> Attr | None:
    """The event of `instructions` or `cycles:u`; None for what is none."""
    name, colon, modifier = text.partition(":")
    if name not in EVENTS or (colon and modifier not in _MODIFIERS):
        return None
    only_user, only_kernel = modifier == "u", modifier == "k"
    code = EVENTS[name]  # pinned, for it must count all the time, and have the branch records even if the guest wants them
    return Attr(type=PERF_TYPE_HARDWARE, config=code, exclude_kernel=only_user, exclude_user=only_kernel, disabled=True, pinned=True)


def open_events(vcpus: Sequence[Vcpu], attr: Attr, handler: Callable[[int, Event, Registers], None] | None = None) -> list[Event]:
    """The event on each vCPU, not yet counting; `handler` is told the number of the vCPU."""
    events = []
    for number, vcpu in enumerate(vcpus):
        scheduler = vcpu.vm.scheduler
        context = scheduler.events(vcpu)

        def overflow(event: Event, registers: Registers, number: int = number) -> None:
            if handler is not None:
                handler(number, event, registers)

        events.append(scheduler.perf.create(attr, context, current(), overflow if handler is not None else None))
    return events


def switch(vcpus: Sequence[Vcpu], events: Sequence[Event], on: bool) -> None:
    """Let events count from now on, or no longer; callable from any thread.

    On the vCPU whose thread calls, and on those that stand still, it is done at once. Nobody waits for the others, who may wait for the
    caller's locks.
    """
    running: list[tuple[Vcpu, Callable[[], None]]] = []
    for vcpu, event in zip(vcpus, events, strict=True):
        perf = vcpu.vm.scheduler.perf
        change = partial(perf.enable if on else perf.disable, event)
        if not vcpu.call(change):
            running.append((vcpu, change))
    if running:
        threading.Thread(target=_call_all, args=(running,), name="softkvm-perf", daemon=True).start()


def _call_all(running: list[tuple[Vcpu, Callable[[], None]]]) -> None:
    for vcpu, change in running:
        vcpu.vm.scheduler.call_for(vcpu, change)


class Sampler:
    """Collects samples, up to a limit."""

    def __init__(self, vcpus: Sequence[Vcpu], attr: Attr, kinds: BranchSample, view: GuestView, chains: bool) -> None:
        """Not sampling yet. `attr` has the period, `kinds` says which branches a sample has as well; `chains`: the kernel's stack, too."""
        self._vcpus = vcpus
        self._view = view
        self.samples: list[Sample] = []
        self.lost = 0
        self._chains = chains
        self._unwinder: Unwinder | None = None
        if kinds:
            attr = replace(attr, sample_type=SampleFormat.BRANCH_STACK, branch_sample_type=kinds)
        self.attr = attr
        self._events = open_events(vcpus, attr, self._take)

    def start(self) -> None:
        """Sample from now on."""
        switch(self._vcpus, self._events, on=True)

    def stop(self) -> None:
        """Sample no more."""
        switch(self._vcpus, self._events, on=False)

    def _take(self, number: int, event: Event, registers: Registers) -> None:
        """An overflow, on the vCPU's own thread."""
        if len(self.samples) >= MOST_SAMPLES:
            self.lost += 1
            return
        vcpu, user = self._vcpus[number], registers.user_mode
        process = self._view.process(number, registers.cr3, registers.ip if user else None)
        branches: tuple[Branch, ...] = ()
        if event.attr.has_branch_stack and vcpu.cpu is not None and vcpu.cpu.perf.counters.branches is not None:
            branches = tuple(vcpu.cpu.perf.counters.branches.read(event))
        chain = () if user or not self._chains else self._unwind(registers)
        self.samples.append(Sample(registers.ip, user, number, vcpu.clock.monotonic_ns(), process, branches, chain))

    def _unwind(self, registers: Registers) -> tuple[int, ...]:
        if self._unwinder is None and self._view.kernel is not None:
            self._unwinder = Unwinder(self._view.kernel)
        if self._unwinder is None:
            return (registers.ip,)
        return tuple(self._unwinder.chain(Frame(registers.ip, registers.stack_pointer, registers.frame_pointer)))
