"""A tool at the other end of a socketpair, which speaks bytes and knows nothing of softkvm's client: the kernel's own selftest in Python.

Answers to `tools/testing/selftests/kvm/x86_64/kvmi_test.c` of "VM introspection" v9.
"""

from __future__ import annotations

import socket
import struct
import threading
from dataclasses import dataclass

from softkvm import kvm
from softkvm.uapi import kvmi
from softkvm.uapi.kvm import Regs
from softkvm.uapi.kvmi import Action, Command, Dialect, Event
from tests.helpers.long_guest import Guest, Outcome

TIMEOUT = 60
EVENT_SIZE = 544
RIP, RFLAGS, CR0, CR3, CR4, EFER = 144, 152, 384, 400, 408, 424
"""Offsets in an event's body."""


@dataclass
class Told:
    """An event as it came."""

    seq: int
    body: bytes
    dialect: Dialect

    @property
    def common(self) -> bytes:
        """`kvmi_event`, without v12's header."""
        return self.body[8:] if self.dialect.split_ids else self.body

    @property
    def event(self) -> Event:
        number = int.from_bytes(self.body[:2], "little") if self.dialect.split_ids else self.body[4]
        return self.dialect.event_by_id[number]

    @property
    def vcpu(self) -> int:
        return int.from_bytes(self.common[2:4], "little")

    @property
    def data(self) -> bytes:
        """The event's own part."""
        (size,) = struct.unpack_from("<H", self.common)
        return self.common[size:]

    def u64(self, offset: int) -> int:
        return int(struct.unpack_from("<Q", self.common, offset)[0])

    def regs(self) -> Regs:
        """The general registers."""
        return kvmi.EventCommon.from_buffer_copy(self.common).arch.regs


class Tool:
    """The introspection tool of one guest."""

    def __init__(self, guest: Guest, dialect: Dialect = kvmi.V9, hook: bool = True) -> None:
        self.guest = guest
        self.vm = guest.vm
        self.dialect = dialect
        self.socket, self.theirs = socket.socketpair()
        self.socket.settimeout(TIMEOUT)
        self._seq = 0
        self.events: list[Told] = []
        """What came while a reply was awaited."""
        self._thread: threading.Thread | None = None
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        if hook:
            self.hook()
            self.allow()

    # --- The VMM's part -------------------------------------------------------------------------------------------------------------

    def hook(self) -> None:
        kvm.dispatch(self.vm, self.dialect.ioctls.hook, memoryview(bytearray(kvmi.Hook(fd=self.theirs.fileno()))))

    def allow(self, allow: int = 1, command: int = -1, event: int = -1) -> None:
        for number, feature in ((self.dialect.ioctls.command, command), (self.dialect.ioctls.event, event)):
            kvm.dispatch(self.vm, number, memoryview(bytearray(kvmi.Feature(allow=allow, id=feature))))

    def start(self) -> None:
        """Run the guest in a thread of its own."""

        def run() -> None:
            try:
                self.outcome = self.guest.run()
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def finish(self) -> Outcome:
        """Wait for the guest's end."""
        assert self._thread is not None
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "the guest does not end"
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()

    # --- The wire -------------------------------------------------------------------------------------------------------------------

    def send(self, number: int, body: bytes, seq: int) -> None:
        self.socket.sendall(struct.pack("<HHI", number, len(body), seq) + body)

    def receive(self) -> tuple[int, int, bytes]:
        """Id, sequence number and body of the next message; EOFError if there will be none."""
        head = self._exactly(8)
        number, size, seq = struct.unpack("<HHI", head)
        return number, seq, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self.socket.recv(size - len(data))
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError
            data += piece
        return data

    @property
    def closed(self) -> bool:
        """Whether KVM has ended the connection; what it sent before is skipped."""
        try:
            while True:
                self.receive()
        except EOFError:
            return True

    def post(self, number: int, body: bytes = b"") -> int:
        """Send a command by its number and do not wait; its sequence number."""
        self._seq += 1
        self.send(number, body, self._seq)
        return self._seq

    def answer(self, seq: int) -> tuple[int, bytes]:
        """Error and data of the answer to a command."""
        while True:
            number, got, body = self.receive()
            if number in (self.dialect.vm_event, self.dialect.vcpu_event):
                self.events.append(Told(got, body, self.dialect))
                continue
            assert got == seq
            error, padding = struct.unpack_from("<iI", body)
            assert padding == 0
            assert not error or len(body) == 8
            return -error, body[8:]

    def raw(self, number: int, body: bytes = b"") -> tuple[int, bytes]:
        """A command by its number: error and data."""
        return self.answer(self.post(number, body))

    def command(self, command: Command, body: bytes = b"", vcpu: int | None = None) -> tuple[int, bytes]:
        """A command by its name: error and data."""
        if command in self.dialect.vcpu_commands:
            body = struct.pack("<HHI", vcpu or 0, 0, 0) + body
        return self.raw(self.dialect.commands[command], body)

    def do(self, command: Command, body: bytes = b"", vcpu: int | None = None) -> bytes:
        """A command that must succeed: its data."""
        error, data = self.command(command, body, vcpu)
        assert error == 0, (command, error)
        return data

    def event(self, expected: Event) -> Told:
        """The next event."""
        if self.events:
            told = self.events.pop(0)
        else:
            number, seq, body = self.receive()
            assert number in (self.dialect.vm_event, self.dialect.vcpu_event), number
            told = Told(seq, body, self.dialect)
        assert told.event is expected, told.event
        return told

    def reply(self, told: Told, action: int = Action.CONTINUE, extra: bytes = b"", **changes: int) -> None:
        """Answer an event."""
        head = kvmi.VcpuHeader(vcpu=told.vcpu)
        body = kvmi.EventReply(action=action, event=self.dialect.events[told.event])
        for name, value in changes.items():
            setattr(body, name, value)
        self.send(self.dialect.event_reply, bytes(head) + bytes(body) + extra, told.seq)

    def enable(self, event: Event, enable: int = 1, vcpu: int = 0) -> None:
        """VCPU_CONTROL_EVENTS."""
        self.do(Command.VCPU_CONTROL_EVENTS, struct.pack("<HBBI", self.dialect.events[event], enable, 0, 0), vcpu)

    def set_regs(self, told: Told, **changes: int) -> None:
        """VCPU_SET_REGISTERS: those of the event with some changed."""
        regs = told.regs()
        for name, value in changes.items():
            setattr(regs, name, value)
        self.do(Command.VCPU_SET_REGISTERS, bytes(regs), told.vcpu)

    def set_access(self, gpa: int, access: int, visible: int = 1) -> None:
        """VM_SET_PAGE_ACCESS of one page."""
        layout = self.dialect.messages[Command.VM_SET_PAGE_ACCESS].request
        assert layout is not None
        request = layout()
        request.count = 1
        entry = struct.pack("<QBBHI", gpa, access, 0 if self.dialect.split_ids else visible, 0, 0)
        self.do(Command.VM_SET_PAGE_ACCESS, bytes(request) + entry)
