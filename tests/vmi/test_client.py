"""The client against a scripted server, in all dialects: what goes over the wire, what comes out, and what a hostile server gets."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvm import MsrEntry
from softkvm.uapi.kvmi import Access, Action, Command, Event, FilterField
from softkvm.vmi import requests
from softkvm.vmi.channel import shake_hands
from softkvm.vmi.client import Client
from softkvm.vmi.errors import ChannelClosed, CommandFailed, NoAnswer, Unreadable
from softkvm.vmi.events import CrEvent, PageEvent, PauseEvent, VcpuEvent
from tests.vmi.fake_server import FakeServer

DIALECTS = list(kvmi.DIALECTS.values())
VCPU = ctypes.sizeof(kvmi.VcpuHeader)


@pytest.fixture(params=DIALECTS, ids=lambda dialect: dialect.name)
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with FakeServer(request.param) as made:
        yield made


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.client_end, server.dialect) as made:
        yield made


def test_registers_and_msrs(server: FakeServer, client: Client) -> None:
    reply = kvmi.GetRegistersReply(mode=8, nmsrs=1)
    reply.regs.rip, reply.sregs.cr3 = 0x1234, 0x5000
    server.handlers[Command.VCPU_GET_REGISTERS] = lambda body: bytes(reply) + bytes(MsrEntry(index=0xC000_0082, data=7))
    found = client.registers(1, [0xC000_0082])
    assert (found.mode, found.regs.rip, found.sregs.cr3, found.msrs) == (8, 0x1234, 0x5000, {0xC000_0082: 7})
    body = server.wait_for(Command.VCPU_GET_REGISTERS)
    assert body == bytes(kvmi.VcpuHeader(vcpu=1)) + bytes(kvmi.GetRegisters(nmsrs=1)) + (0xC000_0082).to_bytes(4, "little")


def test_refusal_has_its_code(client: Client) -> None:
    with pytest.raises(CommandFailed, match="ENOSYS") as failure:
        client.ask(requests.xcr0(0))
    assert failure.value.code == kvmi.Error.ENOSYS


def test_page_access_is_laid_out_as_the_dialect_has_it(server: FakeServer, client: Client) -> None:
    server.handlers[Command.VM_SET_PAGE_ACCESS] = lambda body: b""
    client.protect([0x1000, 0x3000], Access.R | Access.X)
    body = server.wait_for(Command.VM_SET_PAGE_ACCESS)
    message = server.dialect.messages[Command.VM_SET_PAGE_ACCESS]
    assert message.request is not None
    assert message.request.from_buffer_copy(body).count == 2
    entry = kvmi.PageAccessEntry.from_buffer_copy(body, 8 + 16)
    assert (entry.gpa, entry.access) == (0x3000, 5)


def test_cr_control_is_laid_out_as_the_dialect_has_it(server: FakeServer, client: Client) -> None:
    server.handlers[Command.VCPU_CONTROL_CR] = lambda body: b""
    client.watch_cr(3)
    body = server.wait_for(Command.VCPU_CONTROL_CR)[VCPU:]
    assert body[:5] == (b"\x01\0\0\0\x03" if server.dialect is kvmi.LIBKVMI else b"\x03\x01\0\0\0")


def test_an_event_is_typed_and_answered(server: FakeServer, client: Client) -> None:
    arch = kvmi.EventArch(mode=8)
    arch.sregs.cr3 = 0x7000
    server.send_event(Event.CR, 9, 1, bytes(kvmi.EventCr(cr=3, old_value=0x7000, new_value=0x8000)), arch)
    event = client.next_event(60)
    assert isinstance(event, CrEvent)
    assert (event.vcpu, event.number, event.old, event.new, event.cr3) == (1, 3, 0x7000, 0x8000, 0x7000)
    event.continue_(event.old)
    body = server.wait_for(None)
    assert body[:VCPU] == bytes(kvmi.VcpuHeader(vcpu=1))
    assert kvmi.EventReply.from_buffer_copy(body, VCPU).action == Action.CONTINUE
    assert body[-8:] == (0x7000).to_bytes(8, "little")
    with pytest.raises(RuntimeError, match="once"):
        event.continue_()


def test_events_during_a_command_are_kept(server: FakeServer, client: Client) -> None:
    def answer(body: bytes) -> bytes:
        server.send_event(Event.PF, 5, 0, bytes(kvmi.EventPf(gva=kvmi.INVALID_GPA, gpa=0x2000, access=Access.W)))
        return bytes(kvmi.GetXcrReply(value=7))

    server.handlers[Command.VCPU_GET_XCR] = answer
    assert client.ask(requests.xcr0(0)) == 7
    event = client.next_event(0)
    assert isinstance(event, PageEvent)
    assert (event.gva, event.gpa, event.access) == (None, 0x2000, Access.W)


def test_pause_and_resume(server: FakeServer, client: Client) -> None:
    sequence = iter(range(100, 200))

    def pause(body: bytes) -> bytes:
        server.send_event(Event.PAUSE_VCPU, next(sequence))
        return b""

    server.handlers[Command.VCPU_PAUSE] = pause
    with client.paused():
        assert not any(command is None for command, _, _ in server.received)
    assert server.wait_for(None)
    assert server.wait_for(None)


def test_a_pause_event_that_comes_late_is_answered(server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softkvm.vmi.client._RESUME_PATIENCE", 0.01)
    server.handlers[Command.VCPU_PAUSE] = lambda body: b""
    with client.paused():
        pass
    server.send_event(Event.PAUSE_VCPU, 7)
    server.send_event(Event.HYPERCALL, 8)
    event = client.next_event(60)
    assert isinstance(event, VcpuEvent)
    assert not isinstance(event, PauseEvent)
    assert server.wait_for(None)


def test_memory_one_page_at_a_time(server: FakeServer, client: Client) -> None:
    def read(body: bytes) -> bytes | int:
        request = kvmi.Physical.from_buffer_copy(body)
        return kvmi.Error.ENOENT if request.gpa == 0x3000 or request.gpa >= 0x8000 else bytes([request.gpa >> 12]) * request.size

    server.handlers[Command.VM_READ_PHYSICAL] = read
    server.handlers[Command.VM_GET_MAX_GFN] = lambda body: (8).to_bytes(8, "little")
    assert client.memory.read(0x1FFE, 4) == b"\1\1\2\2"
    for address in (0x3000, 0x8000, -4096):
        with pytest.raises(Unreadable):
            client.memory.read(address, 1)


def test_memory_many_pages_at_a_time(server: FakeServer, client: Client) -> None:
    def read(body: bytes) -> bytes:
        frames = memoryview(body[8:]).cast("Q")
        return bytes(kvmi.ReadPagesReply(present=(1 << len(frames)) - 1)) + b"".join(bytes([frame]) * 4096 for frame in frames)

    server.handlers[Command.VM_CHECK_COMMAND] = lambda body: b"" if body[:2] == b"\x02\x80" else kvmi.Error.ENOENT
    server.handlers[Command.VM_READ_PAGES] = read
    server.handlers[Command.VM_GET_MAX_GFN] = lambda body: (64).to_bytes(8, "little")
    assert client.memory.read(0x1000, 20 * 4096) == b"".join(bytes([frame]) * 4096 for frame in range(1, 21))


@pytest.mark.parametrize("sealed", [True, False])
def test_memory_is_mapped_where_descriptors_come_that_nobody_can_cut_off(server: FakeServer, client: Client, sealed: bool) -> None:
    ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.write(ram, b"abcd" * 2048)
    if sealed:
        fcntl.fcntl(ram, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)

    def share(body: bytes) -> None:
        head = kvmi.GetMemoryMapReply(count=1, fds=1)
        data = bytes(kvmi.ErrorCode()) + bytes(head) + bytes(kvmi.MemoryRange(gpa=0x1000, size=8192, offset=0, fd=0))
        _, sequence, _ = server.received[-1]
        header = kvmi.Header(id=Command.VM_GET_MEMORY_MAP, size=len(data), seq=sequence)
        socket.send_fds(server.server_end, [bytes(header) + data], [ram])

    server.handlers[Command.VM_CHECK_COMMAND] = lambda body: b""
    server.handlers[Command.VM_GET_MEMORY_MAP] = share
    if sealed:
        assert client.memory.read(0x1000, 4) == b"abcd"
        os.pwrite(ram, b"live", 0)
        assert client.memory.read(0x1000, 4) == b"live"
    else:
        with pytest.raises(CommandFailed, match="VM_READ_PAGES"):
            client.memory.read(0x1000, 4)
    os.close(ram)


def test_extensions_carry_their_arguments(server: FakeServer, client: Client) -> None:
    server.handlers[Command.VM_SET_BREAKPOINTS] = server.handlers[Command.VM_SET_EVENT_FILTER] = lambda body: b""
    client.breakpoints([0x1234])
    assert server.wait_for(Command.VM_SET_BREAKPOINTS)[8:] == bytes(kvmi.BreakpointEntry(gpa=0x1234, enable=1))
    client.filter(Event.PF, FilterField.RIP, [(1, 2)], outside=True)
    head = kvmi.SetEventFilter.from_buffer_copy(server.wait_for(Command.VM_SET_EVENT_FILTER))
    assert (head.event_id, head.field, head.except_, head.count) == (server.dialect.events[Event.PF], FilterField.RIP, 1, 1)


@pytest.mark.parametrize(
    "message",
    [
        bytes(kvmi.Header(id=5, size=3, seq=1)) + b"abc",
        bytes(kvmi.Header(id=0, size=8, seq=1)) + b"\xff" * 8,
        bytes(kvmi.Header(id=1, size=8, seq=1)) + b"\xff" * 8,
    ],
    ids=["short reply", "event without a body", "unknown event"],
)
def test_what_is_not_the_protocol_ends_the_session(server: FakeServer, client: Client, message: bytes) -> None:
    server.server_end.sendall(message)
    server.server_end.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed):
        client.next_event(60)


def test_a_silent_server_is_not_waited_for_for_ever(server: FakeServer) -> None:
    server.handlers[Command.VM_GET_INFO] = lambda body: None
    with Client(server.client_end, server.dialect, timeout=0.01) as client, pytest.raises(NoAnswer, match="VM_GET_INFO"):
        client.ask(requests.vcpu_count())


def test_listening_and_the_handshake(tmp_path: Path) -> None:
    path = tmp_path / "kvmi.sock"
    hello = kvmi.HandshakeToTool(struct_size=ctypes.sizeof(kvmi.HandshakeToTool) + 8, start_time=5, name=b"guest")
    answers = []

    def connect() -> None:
        while not path.exists():
            pass
        with socket.socket(socket.AF_UNIX) as vmm:
            while vmm.connect_ex(str(path)):
                pass
            vmm.sendall(bytes(hello) + b"new tail")
            answers.append(vmm.recv(100))

    vmm = threading.Thread(target=connect)
    vmm.start()
    with Client.listen(path, key=b"secret", timeout=60) as client:
        assert client.guest is not None
        assert (client.guest.name, client.guest.start_time) == ("guest", 5)
    vmm.join()
    assert answers[0][4:] == hashlib.sha1(b"secret").digest()
    assert not path.exists()


def test_nobody_connects(tmp_path: Path) -> None:
    with pytest.raises(ChannelClosed, match="no VM"):
        Client.listen(tmp_path / "kvmi.sock", timeout=0)


@pytest.mark.parametrize("hello", [b"", b"\x10\0\0\0", b"\xff\xff\xff\xff", b"\x60\0\0\0short"])
def test_a_bad_handshake_is_refused(hello: bytes) -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(hello)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelClosed):
        shake_hands(ours)
    theirs.close()
