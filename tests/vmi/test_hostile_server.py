"""A server that wants to hurt the tool: answers and events that are wrong in one way each, in any order, cut anywhere.

Whatever it sends becomes a result or one of `softkvm.vmi.errors`, after work in proportion to what it sent, and nothing stays behind. There
are few messages here; `make fuzz` has a million (SOFTKVM_KVMI_MESSAGES). A seed that did harm becomes a line of `tests/hostile/kvmi.txt`.
The other direction is `tests/kvm_guests/introspection/test_hostile.py`.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Access, Command, Dialect, Event, FilterField
from softkvm.vmi import remote, requests
from softkvm.vmi.channel import SocketChannel
from softkvm.vmi.client import Client
from softkvm.vmi.errors import ChannelClosed, VmiError
from softkvm.vmi.events import PauseEvent, RetryableEvent, VcpuEvent
from softkvm.vmi.target import Target

CORPUS = Path(__file__).parents[1] / "hostile/kvmi.txt"
INTERESTING = (0, 1, 2, 7, 8, 0xFF, 0x220, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
DIALECTS = list(kvmi.DIALECTS.values())
OPERATIONS_OF_A_SESSION = 200


class HostileServer:
    """Answers each command at once, from the client's own thread, so that nobody ever waits: what is not answered ends the session."""

    def __init__(self, seed: int, dialect: Dialect, connection: socket.socket) -> None:
        self.random = random.Random(seed)
        self.dialect = dialect
        self.sent = 0
        self._connection = connection

    def take(self, message: bytes) -> None:
        """The client has sent a command, or answered an event."""
        header = kvmi.Header.from_buffer_copy(message)
        command = self.dialect.by_id.get(header.id)
        if header.id == self.dialect.event_reply or command is None:
            return
        parts = [self.event() for _ in range(self.random.choice((0, 0, 0, 1, 3)))]
        if command is Command.VCPU_PAUSE:
            parts.append(self.event(Event.PAUSE_VCPU))
        answered = self.random.random() < 0.995
        if answered:
            parts.append(self.frame(header.id, header.seq, self.answer(command, message[8:])))
        self.sent += len(parts)
        data = b"".join(parts)
        if not answered or self.random.random() < 0.002:
            data = data[: self.random.randrange(len(data) + 1)]
        descriptors = [self.file()] if command is Command.VM_GET_MEMORY_MAP and data else []
        socket.send_fds(self._connection, [data], descriptors) if descriptors else self._connection.sendall(data)
        for descriptor in descriptors:
            os.close(descriptor)
        if len(data) < sum(map(len, parts)) or not answered:
            self._connection.shutdown(socket.SHUT_WR)

    def file(self) -> int:
        """A descriptor to map memory by, which may be anything."""
        if self.random.random() < 0.5:
            return os.open("/dev/null", os.O_RDONLY)
        descriptor = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(descriptor, self.random.choice((0, 1, 4096, 1 << 20)))
        if self.random.random() < 0.8:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return descriptor

    def number(self, size: int) -> bytes:
        value = self.random.choice(INTERESTING) if self.random.random() < 0.7 else self.random.getrandbits(8 * size)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def bent(self, structure: ctypes.Structure, chance: float = 0.1) -> bytes:
        """The bytes of a structure with some fields changed."""
        data = bytearray(structure)
        for name in structure.__annotations__:
            place = getattr(type(structure), name)
            if place.size <= 8 and self.random.random() < chance:
                data[place.offset : place.offset + place.size] = self.number(place.size)
        return bytes(data)

    def cut(self, data: bytes) -> bytes:
        """Now and then less or more than belongs there."""
        chance = self.random.random()
        if chance < 0.002:
            return data[: self.random.randrange(len(data) + 1)]
        return data + self.random.randbytes(self.random.randrange(32)) if chance < 0.01 else data

    def answer(self, command: Command, request: bytes) -> bytes:
        if self.random.random() < 0.1:
            return struct.pack("<iI", -self.random.choice([*map(int, kvmi.Error), 1 << 30]), 0)
        message = self.dialect.messages[command]
        data = self.bent(message.reply()) if message.reply is not None else b""
        if command is Command.VM_GET_INFO and self.random.random() < 0.97:
            data = bytes(kvmi.GetInfoReply(vcpu_count=self.random.choice((1, 2, 8))))
        if message.trailing_reply is not None:
            length = self.random.choice((0, 16, 160, 4096, 7000))
            if command is Command.VM_READ_PHYSICAL and self.random.random() < 0.98:
                length = kvmi.Physical.from_buffer_copy(request.ljust(16, b"\0")).size
            data += self.random.randbytes(length)
        return bytes(8) + self.cut(data)

    def event(self, kind: Event | None = None) -> bytes:
        kind = kind or self.random.choice(list(self.dialect.events))
        layout = kvmi.EVENTS[kind].data
        data = self.bent(layout()) if layout is not None else b""
        arch = kvmi.EventArch(mode=self.random.choice((0, 2, 4, 8)))
        number = self.dialect.events[kind] if self.random.random() < 0.998 else self.random.getrandbits(8)
        if self.dialect.split_ids:
            common = kvmi.EventCommonV12(size=ctypes.sizeof(kvmi.EventCommonV12), vcpu=self.random.choice((0, 1, 0xFFFF)), arch=arch)
            body = bytes(kvmi.EventHeaderV12(event=number)) + self.bent(common, 0.005) + data
        else:
            common9 = kvmi.EventCommon(
                size=ctypes.sizeof(kvmi.EventCommon), vcpu=self.random.choice((0, 1, 0xFFFF)), event=number, arch=arch
            )
            body = self.bent(common9, 0.005) + data
        return self.frame(self.dialect.vcpu_event, self.random.getrandbits(32), self.cut(body))

    def frame(self, number: int, sequence: int, body: bytes) -> bytes:
        if self.random.random() < 0.001:
            number, sequence = self.random.getrandbits(16), self.random.getrandbits(32)
        return bytes(kvmi.Header(id=number, size=len(body) & 0xFFFF, seq=sequence)) + body


class Channel(SocketChannel):
    """The client's end; the server works whenever something is sent to it."""

    def __init__(self, connection: socket.socket, server: HostileServer) -> None:
        super().__init__(connection)
        self._server = server

    def send(self, message: bytes) -> None:
        self._server.take(message)


def take_events(client: Client, choice: random.Random) -> None:
    """Look at all events that are there, as tools do, and answer them."""
    while (event := client.next_event(0)) is not None:
        if isinstance(event, VcpuEvent):
            Target(client).task(event) if choice.random() < 0.1 else repr(event)
            if isinstance(event, RetryableEvent) and choice.random() < 0.5:
                event.retry()
            else:
                event.continue_()


def pause(client: Client, choice: random.Random) -> None:
    with client.paused():
        assert not any(isinstance(event, PauseEvent) and event.answered for event in client._events)


OPERATIONS: list[Callable[[Client, random.Random], object]] = [
    take_events,
    pause,
    lambda client, choice: client.registers(0, [0x174] * choice.randrange(4)),
    lambda client, choice: client.ask(requests.vcpu_count()),
    lambda client, choice: client.supports(choice.choice(list(Command))),
    lambda client, choice: remote.open_memory(client).read(choice.getrandbits(14), choice.randrange(1, 20000)),
    lambda client, choice: client.write(choice.getrandbits(14), bytes(choice.randrange(1, 9000))),
    lambda client, choice: client.enable(choice.choice(list(Event))) if client.vcpus else None,
    lambda client, choice: client.protect([0x1000, 0x2000], Access.R),
    lambda client, choice: client.breakpoints([0x1234]),
    lambda client, choice: client.filter(Event.PF, FilterField.RIP, [(0, 1)]),
    lambda client, choice: client.catch_up(),
    lambda client, choice: client.ask(requests.cpuid(0, 1)),
    lambda client, choice: client.ask(requests.translate(0, 0x1000)),
    lambda client, choice: client.ask(requests.xsave(0)),
    lambda client, choice: client.ask(requests.mtrr_type(0, 0)),
]


def session(seed: int, dialect: Dialect) -> int:
    """One session with a hostile server; how many messages it could send."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    choice, server = random.Random(seed), HostileServer(seed, dialect, theirs)
    where = f"keep it by this line in {CORPUS.name}: server {dialect.name} {seed}"
    with theirs, Client(Channel(ours, server), dialect, timeout=0) as client:
        for _ in range(OPERATIONS_OF_A_SESSION):
            try:
                choice.choice(OPERATIONS)(client, choice)
            except ChannelClosed:
                break
            except VmiError:
                continue
            except Exception as error:
                raise AssertionError(where) from error
    return server.sent


def test_what_once_did_harm() -> None:
    for line in CORPUS.read_text().splitlines():
        if line.startswith("server "):
            _, dialect, seed = line.split()
            session(int(seed), kvmi.DIALECTS[dialect])


@pytest.mark.timeout(0)
def test_a_million_bent_messages_do_no_harm() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    left, seed = int(os.environ.get("SOFTKVM_KVMI_MESSAGES", "10000")), 1000
    while left > 0:
        left -= max(1, session(seed, DIALECTS[seed % 3]))
        seed += 1
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors
