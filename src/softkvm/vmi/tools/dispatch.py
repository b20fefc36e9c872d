"""From events to the functions that want them.

A tool hangs its functions on addresses, pages or registers, which does nothing to the guest yet; `records()` has the guest report, and
gives what the functions note. An event that no function answers is CONTINUEd, so a tool that only watches never changes what the guest
does.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from softkvm.uapi.kvmi import Access, Command, Event, FilterField
from softkvm.vmi import requests
from softkvm.vmi.errors import ChannelClosed, CommandFailed, Corrupt, UnknownName, Unreadable, VmiError
from softkvm.vmi.events import CrEvent, DescriptorEvent, HiddenBreakpointEvent, MsrEvent, PageEvent, Unhook, VcpuEvent
from softkvm.vmi.memory import PAGE_MASK
from softkvm.vmi.target import Target

R = TypeVar("R")
OnBreakpoint = Callable[[HiddenBreakpointEvent], None]
OnPage = Callable[[PageEvent], None]
OnMsr = Callable[[MsrEvent], None]
OnCr = Callable[[CrEvent], None]
OnDescriptor = Callable[[DescriptorEvent], None]

_TURN = 0.25
"""Seconds between two looks at the clock and at `stop()`."""
_ALL = Access.R | Access.W | Access.X


class Dispatcher(Generic[R]):
    """Functions by what they wait for; `note()` is how they speak. To be used once."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.lost = False
        """Whether the VM ended the session."""
        self._breakpoints: defaultdict[int, list[OnBreakpoint]] = defaultdict(list)
        self._pages: dict[int, tuple[Access, OnPage]] = {}
        self._msrs: dict[int, OnMsr] = {}
        self._crs: dict[int, OnCr] = {}
        self._descriptor: OnDescriptor | None = None
        self._events: set[Event] = set()
        self._filters: dict[tuple[Event, FilterField], Sequence[tuple[int, int]]] = {}
        self._records: deque[R] = deque()
        self._stopped = False
        self._armed = threading.Event()

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
        self._want(Event.HIDDEN_BREAKPOINT)
        if self._armed.is_set() and not self._breakpoints[physical]:
            self.target.client.breakpoints([physical])
        self._breakpoints[physical].append(function)

    def protect(self, pages: Iterable[int], access: Access, function: OnPage) -> None:
        """Leave the guest only `access` to pages (guest-physical addresses); `function` judges what it tries beyond that."""
        wanted = list(pages)
        self._want(Event.PF)
        self._pages.update((page, (access, function)) for page in wanted)
        if self._armed.is_set():
            self.target.client.protect(wanted, access)

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back."""
        wanted = [page for page in pages if self._pages.pop(page, None) is not None]
        if self._armed.is_set():
            self.target.client.protect(wanted, _ALL)

    def on_msr(self, index: int, function: OnMsr) -> None:
        """Call `function` when a vCPU is about to change an MSR."""
        self._want(Event.MSR)
        self._msrs[index] = function
        if self._armed.is_set():
            self.target.client.watch_msr(index)

    def on_cr(self, number: int, function: OnCr) -> None:
        """Call `function` when a vCPU is about to change a control register."""
        self._want(Event.CR)
        self._crs[number] = function
        if self._armed.is_set():
            self.target.client.watch_cr(number)

    def on_descriptor(self, function: OnDescriptor) -> None:
        """Call `function` when a vCPU is about to load or store GDTR, IDTR, LDTR or TR."""
        self._descriptor = function
        self._want(Event.DESCRIPTOR)

    def only(self, event: Event, field: FilterField, ranges: Sequence[tuple[int, int]]) -> None:
        """Have no event that has a field outside of `ranges` (`Client.filter()`), if the server has filters."""
        if self.target.client.supports(Command.VM_SET_EVENT_FILTER):
            self._filters[event, field] = ranges
            if self._armed.is_set():
                self.target.client.filter(event, field, ranges)

    def _want(self, event: Event) -> None:
        if event not in self._events:
            self._events.add(event)
            if self._armed.is_set():
                self.target.client.enable(event)

    # The guest reports from here

    def arm(self) -> None:
        """Have the guest report, unless it does; `records()` does this by itself. Who comes to a breakpoint waits for `records()`."""
        if self._armed.is_set():
            return
        client = self.target.client
        for request in (requests.control_cleanup(), requests.control_vm_event(Event.UNHOOK)):
            with suppress(CommandFailed):  # a server that keeps these for itself
                client.ask(request)
        for (event, field), ranges in self._filters.items():
            client.filter(event, field, ranges)
        for event in self._events:
            client.enable(event)
        client.breakpoints(self._breakpoints)
        for access in {access for access, _ in self._pages.values()}:
            client.protect([page for page, (left, _) in self._pages.items() if left == access], access)
        for index in self._msrs:
            client.watch_msr(index)
        for number in self._crs:
            client.watch_cr(number)
        self._armed.set()

    def wait_until_armed(self, timeout: float) -> bool:
        """For another thread than that of `records()`: whether the guest reports within `timeout` seconds."""
        return self._armed.wait(timeout)

    def records(self, timeout: float | None = None) -> Iterator[R]:
        """What the functions note, as it happens, until `timeout` seconds are over, `stop()`, or the end of the session.

        All is let go then, and also when the caller takes no more.
        """
        try:
            self.arm()
            deadline = None if timeout is None else time.monotonic() + timeout
            while not (self._stopped or self.lost) and (deadline is None or time.monotonic() < deadline):
                self._take_one()
                while self._records:
                    yield self._records.popleft()
        finally:
            with suppress(VmiError):
                self._let_go()

    def _let_go(self) -> None:
        """Take away whatever makes events, and answer those that are under way: they come before the vCPU's word that there are no more."""
        client = self.target.client
        client.breakpoints(self._breakpoints, on=False)
        client.protect(self._pages, _ALL)
        for msr in self._msrs:
            client.watch_msr(msr, on=False)
        for register in self._crs:
            client.watch_cr(register, on=False)
        for kind in self._events:
            client.enable(kind, on=False)
        for event, field in self._filters:
            client.filter(event, field, [])
        while (rest := client.next_event(0)) is not None:
            if isinstance(rest, VcpuEvent):
                rest.continue_()

    # What comes

    def _take_one(self) -> None:
        """Wait a moment for one event and dispatch it."""
        try:
            event = self.target.client.next_event(_TURN)
            if isinstance(event, Unhook):
                self.lost = True
            elif event is not None:
                self.dispatch(event)
            self.target.client.catch_up()
        except ChannelClosed:
            self.lost = True

    def dispatch(self, event: VcpuEvent) -> None:
        """Have an event looked at and answered. The guest's memory may hold anything: what cannot be made out there is nobody's failure."""
        self.target.forget()
        try:
            self._call(event)
        except (Unreadable, Corrupt, UnknownName):
            pass
        finally:
            if not event.answered:
                event.continue_()

    def _call(self, event: VcpuEvent) -> None:
        if isinstance(event, HiddenBreakpointEvent):
            for function in tuple(self._breakpoints.get(event.gpa, ())):
                function(event)
        elif isinstance(event, PageEvent) and (tracked := self._pages.get(event.gpa & ~PAGE_MASK)) is not None:
            tracked[1](event)
        elif isinstance(event, MsrEvent) and (on_msr := self._msrs.get(event.index)) is not None:
            on_msr(event)
        elif isinstance(event, CrEvent) and (on_cr := self._crs.get(event.number)) is not None:
            on_cr(event)
        elif isinstance(event, DescriptorEvent) and self._descriptor is not None:
            self._descriptor(event)
