"""A KVMI client for one thread: commands and their answers, events one after the other.

`with Client(channel) as vm: vm.registers(0)`. An event that arrives while an answer is awaited is kept for `events()`. Source of truth:
`Documentation/virt/kvm/kvmi.rst` of the series "VM introspection" v9.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType

from softkvm.uapi import kvmi
from softkvm.uapi.kvm import Regs
from softkvm.uapi.kvmi import Access, Action, Command, Dialect, Event, FilterField
from softkvm.vmi import channel as channels
from softkvm.vmi import remote, requests
from softkvm.vmi.channel import Channel, Guest, SocketChannel
from softkvm.vmi.errors import ChannelClosed, CommandFailed, NoAnswer
from softkvm.vmi.events import PauseEvent, Unhook, VcpuEvent
from softkvm.vmi.memory import Memory
from softkvm.vmi.requests import Registers, Request, T
from softkvm.vmi.session import Reply, Session

PAGES_AT_ONCE = 256
_MOST_KEPT = 1 << 16
_MOST_VCPUS = 4096
_ANSWER_TIMEOUT = 15.0
_RESUME_PATIENCE = 2.0
"""Seconds for a vCPU to report that it stood still; one that its VMM does not run does so when it runs."""


class Client:
    """One session with a VM; a context manager, to be closed. A command raises CommandFailed if the server refuses it."""

    def __init__(self, channel: Channel | socket.socket, dialect: Dialect = kvmi.V9, *, timeout: float = _ANSWER_TIMEOUT) -> None:
        """`channel` is connected, and the session's from now on; a command has `timeout` seconds for its answer."""
        self._channel: Channel = SocketChannel(channel) if isinstance(channel, socket.socket) else channel
        self._session = Session(dialect, self._answer)
        self._timeout = timeout
        self._events: deque[VcpuEvent | Unhook] = deque()
        self._supported: dict[Command, bool] = {}
        self._postponed: list[Request[None]] = []
        self._owed = 0  # PAUSE_VCPU events that are still to come, of vCPUs that their VMM does not run
        self.guest: Guest | None = None
        """What the VMM said of its VM, if it introduced itself."""

    @classmethod
    def listen(cls, address: str | Path, *, key: bytes | None = None, timeout: float | None = None, dialect: Dialect = kvmi.V9) -> Client:
        """Wait on a UNIX socket, or on `vsock:PORT`, for a VMM to connect; see `channel.listen()`."""
        channel, guest = channels.listen(address, key=key, timeout=timeout)
        client = cls(channel, dialect)
        client.guest = guest
        return client

    def close(self) -> None:
        """End the session; the server lets every vCPU go."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    # Commands

    def ask(self, request: Request[T], timeout: float | None = None) -> T:
        """Send a command and wait for its answer; NoAnswer after `timeout` seconds, by default the client's."""
        sequence, message = self._session.encode(request)
        self._channel.send(message)
        patience = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        while True:
            received = self._channel.receive(max(0.0, deadline - time.monotonic()))
            if received is None:
                raise NoAnswer(f"the VM has not answered {request.command.name} in {patience:g} seconds")
            incoming = self._session.receive(*received)
            if not isinstance(incoming, Reply):
                self._keep(incoming)
            elif incoming.sequence == sequence:
                return self._session.result(request, incoming)

    def post(self, request: Request[None]) -> None:
        """Send a command and do not wait: whether it was done does not matter, or the vCPU does not run now."""
        self._channel.send(self._session.encode(request)[1])

    def supports(self, command: Command) -> bool:
        """Whether the server knows a command and allows it."""
        if command not in self._supported:
            self._supported[command] = self._session.knows(command) and self._succeeds(requests.check_command(command))
        return self._supported[command]

    def _succeeds(self, request: Request[None]) -> bool:
        try:
            self.ask(request)
        except CommandFailed:
            return False
        return True

    def take_descriptors(self) -> list[int]:
        """File descriptors that came with the answers so far; the caller closes them."""
        return self._channel.take_descriptors()

    @cached_property
    def vcpus(self) -> int:
        """How many vCPUs there are."""
        count = self.ask(requests.vcpu_count())
        if not 0 < count <= _MOST_VCPUS:
            raise ChannelClosed(f"the server says that the VM has {count} vCPUs")
        return count

    @cached_property
    def memory(self) -> Memory:
        """The guest's physical memory."""
        return self._channel.memory() or remote.open_memory(self)

    def write(self, address: int, data: bytes) -> None:
        """Write guest-physical memory."""
        while data:
            size = min(len(data), kvmi.PAGE_SIZE - address % kvmi.PAGE_SIZE)
            self.ask(requests.write_physical(address, data[:size]))
            address, data = address + size, data[size:]

    def registers(self, vcpu: int, msrs: Sequence[int] = ()) -> Registers:
        """A vCPU's registers, and the MSRs asked for."""
        return self.ask(requests.registers(vcpu, msrs))

    def set_registers(self, vcpu: int, regs: Regs) -> None:
        """Set the general registers of a vCPU that waits for the answer to an event; they count when it is answered."""
        self.ask(requests.set_registers(vcpu, regs))

    # What to be told

    def enable(self, event: Event, *, on: bool = True) -> None:
        """Send, or no longer send, an event of every vCPU."""
        self._ask_all(lambda vcpu: requests.control_event(vcpu, event, enable=on))

    def _ask_all(self, make: Callable[[int], Request[None]]) -> None:
        """Ask every vCPU. One that waits for its start cannot be told yet; `catch_up()` does it later."""
        for vcpu in range(self.vcpus):
            request = make(vcpu)
            if not self._ask_started(request):
                self._postponed.append(request)

    def _ask_started(self, request: Request[None]) -> bool:
        try:
            self.ask(request)
        except CommandFailed as error:
            if error.code != kvmi.Error.EAGAIN:
                raise
            return False
        return True

    def catch_up(self) -> None:
        """Tell vCPUs that have started meanwhile what the others were told before."""
        if self._postponed:
            self._postponed = [request for request in self._postponed if not self._ask_started(request)]

    def watch_cr(self, number: int, *, on: bool = True) -> None:
        """CR events for writes of every vCPU to CR0, CR3 or CR4; `enable()` them as well."""
        self._ask_all(lambda vcpu: requests.control_cr(vcpu, number, enable=on))

    def watch_msr(self, index: int, *, on: bool = True) -> None:
        """MSR events for writes of every vCPU to an MSR; `enable()` them as well."""
        self._ask_all(lambda vcpu: requests.control_msr(vcpu, index, enable=on))

    def protect(self, pages: Iterable[int], access: Access) -> None:
        """Leave the guest only `access` to the pages at these guest-physical addresses; all three rights give them back."""
        addresses = list(pages)
        for start in range(0, len(addresses), PAGES_AT_ONCE):
            self.ask(requests.set_page_access((address, access) for address in addresses[start : start + PAGES_AT_ONCE]))

    def breakpoints(self, addresses: Iterable[int], *, on: bool = True) -> None:
        """Set or take away breakpoints at guest-physical addresses that the guest cannot see."""
        wanted = list(addresses)
        for start in range(0, len(wanted), PAGES_AT_ONCE):
            self.ask(requests.set_breakpoints(wanted[start : start + PAGES_AT_ONCE], enable=on))

    def filter(
        self, event: Event, field: FilterField, ranges: Sequence[tuple[int, int]], *, mask: int = (1 << 64) - 1, outside: bool = False
    ) -> None:
        """Have the server send an event only if a field, after `mask`, lies in one of the ranges; none of them ends the filter."""
        self.ask(requests.set_filter(event, field, ranges, mask=mask, outside=outside))

    # Events

    def events(self, timeout: float | None = None) -> Iterator[VcpuEvent | Unhook]:
        """What happens, as it happens; ends when `timeout` seconds pass without anything, or with ChannelClosed with the session."""
        while (event := self.next_event(timeout)) is not None:
            yield event

    def next_event(self, timeout: float | None = None) -> VcpuEvent | Unhook | None:
        """The next event; None after `timeout` seconds without one."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            event = self._events.popleft() if self._events else self._receive_event(deadline)
            if self._owed and isinstance(event, PauseEvent):
                self._owed -= 1
                event.continue_()
            else:
                return event

    def _receive_event(self, deadline: float | None) -> VcpuEvent | Unhook | None:
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if (received := self._channel.receive(left)) is None:
                return None
            if not isinstance(incoming := self._session.receive(*received), Reply):
                return incoming

    def _keep(self, event: VcpuEvent | Unhook) -> None:
        if len(self._events) >= _MOST_KEPT:
            self.close()
            raise ChannelClosed("the server floods us with events")
        self._events.append(event)

    def _answer(self, event: VcpuEvent, action: Action, data: bytes) -> None:
        self._channel.send(self._session.encode_answer(event, action, data))

    # Standing still

    @contextmanager
    def paused(self) -> Iterator[None]:
        """All vCPUs stand still in the block; what else happens meanwhile is kept for `events()`."""
        for vcpu in range(self.vcpus):
            self.ask(requests.pause(vcpu))
        try:
            yield
        finally:
            self._resume(self.vcpus)

    def _resume(self, owed: int) -> None:
        """Answer the PAUSE_VCPU events. That of a vCPU that its VMM does not run comes when it does: `next_event()` answers it."""
        others: list[VcpuEvent | Unhook] = []
        while owed and (event := self.next_event(_RESUME_PATIENCE)) is not None:
            if isinstance(event, PauseEvent):
                event.continue_()
                owed -= 1
            else:
                others.append(event)
        self._owed += owed
        self._events.extendleft(reversed(others))
