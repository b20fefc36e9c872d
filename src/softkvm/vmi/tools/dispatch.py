"""From events to the functions that want them.

A tool hangs its functions on addresses, pages or MSRs; `records()` lets the guest run and gives what the functions have noted. An event
that no function answers is CONTINUEd, so a tool that only watches never changes what the guest does.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Generic, TypeVar

from softkvm.uapi.kvmi import Access, Command, Event
from softkvm.vmi import requests
from softkvm.vmi.errors import ChannelClosed, Unreadable, VmiError
from softkvm.vmi.events import CrEvent, HiddenBreakpointEvent, MsrEvent, PageEvent, Unhook, VcpuEvent
from softkvm.vmi.memory import PAGE_MASK
from softkvm.vmi.target import Target

R = TypeVar("R")
OnBreakpoint = Callable[[HiddenBreakpointEvent], None]
OnPage = Callable[[PageEvent], None]
OnMsr = Callable[[MsrEvent], None]
OnCr = Callable[[CrEvent], None]

_TURN = 0.25
"""Seconds between two looks at the clock and at `stop()`."""


class Dispatcher(Generic[R]):
    """Functions by what they wait for; `note()` is how they speak."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._breakpoints: defaultdict[int, list[OnBreakpoint]] = defaultdict(list)
        self._pages: dict[int, OnPage] = {}
        self._msrs: dict[int, OnMsr] = {}
        self._crs: dict[int, OnCr] = {}
        self._enabled: set[Event] = set()
        self._records: deque[R] = deque()
        self._stopped = False

    def note(self, record: R) -> None:
        """Have `records()` give this."""
        self._records.append(record)

    def stop(self) -> None:
        """End `records()` soon; callable from any thread."""
        self._stopped = True

    # What to wait for

    def at(self, address: int, function: OnBreakpoint) -> None:
        """Call `function` when a vCPU is about to execute the instruction at a kernel-virtual address; VmiError if the server cannot."""
        if not self.target.client.supports(Command.VM_SET_BREAKPOINTS):
            raise VmiError("this KVMI server has no hidden breakpoints")
        physical = self.target.kernel.physical(address)
        self._enable(Event.HIDDEN_BREAKPOINT)
        if not self._breakpoints[physical]:
            self.target.client.breakpoints([physical])
        self._breakpoints[physical].append(function)

    def protect(self, pages: Iterable[int], access: Access, function: OnPage) -> None:
        """Leave the guest only `access` to pages (guest-physical addresses); `function` judges what it tries beyond that."""
        wanted = list(pages)
        self._enable(Event.PF)
        self._pages.update((page, function) for page in wanted)
        self.target.client.protect(wanted, access)

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        wanted = [page for page in pages if self._pages.pop(page, None) is not None]
        self.target.client.protect(wanted, Access.R | Access.W | Access.X)

    def on_msr(self, index: int, function: OnMsr) -> None:
        """Call `function` when a vCPU is about to change an MSR."""
        self._enable(Event.MSR)
        self._msrs[index] = function
        self.target.client.watch_msr(index)

    def on_cr(self, number: int, function: OnCr) -> None:
        """Call `function` when a vCPU is about to change a control register."""
        self._enable(Event.CR)
        self._crs[number] = function
        self.target.client.watch_cr(number)

    def _enable(self, event: Event) -> None:
        if event not in self._enabled:
            self._enabled.add(event)
            self.target.client.enable(event)

    # What comes

    def records(self, timeout: float | None = None) -> Iterator[R]:
        """What the functions note, as it happens, until `timeout` seconds are over, `stop()`, or the end of the VM; then all is let go."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._stopped and (deadline is None or time.monotonic() < deadline):
            ended = self._take_one()
            while self._records:
                yield self._records.popleft()
            if ended:
                return
        with suppress(ChannelClosed):
            self._let_go()

    def _let_go(self) -> None:
        """Take away whatever makes events, and answer those that are under way."""
        client = self.target.client
        client.breakpoints(self._breakpoints, on=False)
        client.protect(self._pages, Access.R | Access.W | Access.X)
        for vcpu in range(client.vcpus):
            for msr in self._msrs:
                client.post(requests.control_msr(vcpu, msr, enable=False))
            for register in self._crs:
                client.post(requests.control_cr(vcpu, register, enable=False))
        while (event := client.next_event(_TURN)) is not None:
            if isinstance(event, VcpuEvent):
                event.continue_()

    def _take_one(self) -> bool:
        """Wait a moment for one event and dispatch it; whether the session has ended."""
        try:
            event = self.target.client.next_event(_TURN)
            if isinstance(event, Unhook):
                return True
            if event is not None:
                self.dispatch(event)
            self.target.client.catch_up()
            self.turn()
        except ChannelClosed:
            return True
        return False

    def turn(self) -> None:
        """Called after each event and each moment without one; for what cannot be an event."""

    def dispatch(self, event: VcpuEvent) -> None:
        """Have an event looked at and answered. The guest's memory may hold anything: what cannot be read of it is nobody's failure."""
        self.target.forget()
        try:
            self._call(event)
        except Unreadable:
            pass
        finally:
            if not event.answered:
                event.continue_()

    def _call(self, event: VcpuEvent) -> None:
        if isinstance(event, HiddenBreakpointEvent):
            for function in tuple(self._breakpoints.get(event.gpa, ())):
                function(event)
        elif isinstance(event, PageEvent) and (on_page := self._pages.get(event.gpa & ~PAGE_MASK)) is not None:
            on_page(event)
        elif isinstance(event, MsrEvent) and (on_msr := self._msrs.get(event.index)) is not None:
            on_msr(event)
        elif isinstance(event, CrEvent) and (on_cr := self._crs.get(event.number)) is not None:
            on_cr(event)
