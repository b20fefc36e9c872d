"""The VMM's part of introspection: tools that listen, handshake, tools of the process, snapshots, and ends of runs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from softkvm.uapi import kvmi
from softkvm.uapi.kvmi import Command, Event
from softkvm.vmi.client import Client
from softkvm.vmm import ConfigError, Machine, StopReason
from softkvm.vmm.introspection_peer import Peer, PeerOptions
from softkvm.vmm.monitor import Monitor, commands
from tests.vmm.boot import images

HALT = bytes.fromhex("fa f4 ebfd")  # cli; again: hlt; jmp again
EXIT = bytes.fromhex("b000e6f4")
NAME, ID = "the-vm", UUID(int=0x1234)
TIMEOUT = 60
VMADDR_CID_LOCAL, VSOCK_PORT = 1, 0x6B76_0000 + os.getpid() % 0x1_0000

Boot = Callable[..., Machine]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """Make machines with the given program as their kernel."""
    machines: list[Machine] = []

    def make(code: bytes, **options: Any) -> Machine:
        path = tmp_path / "program"
        path.write_bytes(images.program(code))
        machines.append(Machine(path, memory="32M", **options))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()


class Listener:
    """A tool that listens on a UNIX socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        self.socket.listen()
        self.socket.settimeout(TIMEOUT)

    def accept(self, answer: bytes) -> tuple[socket.socket, kvmi.HandshakeToTool]:
        """A VM has connected: what it says of itself, answered with `answer`."""
        peer, _ = self.socket.accept()
        peer.settimeout(TIMEOUT)
        hello = peer.recv(4096)
        if answer:
            peer.sendall(answer)
        return peer, kvmi.HandshakeToTool.from_buffer_copy(hello)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(tmp_path / "tool")
    yield made
    made.socket.close()


def answer(key: str | None = None, extra: bytes = b"") -> bytes:
    digest = bytes(20) if key is None else hashlib.sha1(key.encode()).digest()
    return struct.pack("<I", 24 + len(extra)) + digest + extra


@contextlib.contextmanager
def peer_of(machine: Machine, path: Path | str, settings: str = "") -> Iterator[Peer]:
    """`--introspection PATH,reconnect=0,...`"""
    options = PeerOptions.parse(f"{path},reconnect=0{settings}")
    peer = Peer(machine.introspection, options, NAME, ID, machine.max_gpa)
    peer.start()
    try:
        yield peer
    finally:
        peer.close()


def ask(own: socket.socket, number: int, body: bytes = b"") -> bytes:
    own.sendall(struct.pack("<HHI", number, len(body), 1) + body)
    return own.recv(4096)[8:]


def is_closed(own: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while own.recv(4096):
            pass
    return True


@pytest.mark.parametrize(("dialect", "version"), [("auto", 1), ("auto", 2), ("v9", 1), ("libkvmi", 2), ("v12", 2)])
def test_tool_that_listens_gets_the_vm(boot: Boot, listener: Listener, tmp_path: Path, dialect: str, version: int) -> None:
    machine = boot(HALT)
    with peer_of(machine, tmp_path / "tool", f",dialect={dialect}"):
        peer, hello = listener.accept(answer(extra=b"what a later version adds"))
        assert (bytes(hello.name), bytes(hello.uuid)) == (NAME.encode(), ID.bytes)
        assert hello.struct_size == (104 if dialect == "v12" else 96)
        assert ask(peer, version)[:12] == struct.pack("<iII", 0, 0, 1)
        peer.close()


class VsockInPlace(socket.socket):
    """vsock for a kernel that has no loopback for it: the same calls over an abstract UNIX socket."""

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(socket.AF_UNIX if family == socket.AF_VSOCK else family, kind, proto, fileno)

    def bind(self, address: Any) -> None:
        super().bind(self.local(address))

    def connect(self, address: Any) -> None:
        super().connect(self.local(address))

    @staticmethod
    def local(address: Any) -> Any:
        return f"\0softkvm-test-{os.getpid()}-{address[1]}" if isinstance(address, tuple) else address


def has_vsock_loopback() -> bool:
    """Whether this kernel has the module vsock_loopback."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as server:
        server.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        server.listen()
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
            client.settimeout(0.2)
            client.connect((VMADDR_CID_LOCAL, server.getsockname()[1]))
            return True
    return False


def test_tool_that_listens_on_vsock(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_vsock_loopback():
        monkeypatch.setattr(socket, "socket", VsockInPlace)
    machine = boot(HALT)
    with ThreadPoolExecutor(1) as pool, peer_of(machine, f"vsock:{VMADDR_CID_LOCAL}:{VSOCK_PORT}"):
        client = pool.submit(Client.listen, f"vsock:{VSOCK_PORT}", timeout=TIMEOUT).result(TIMEOUT)
        with client:
            assert client.guest is not None
            assert (client.guest.name, client.guest.uuid) == (NAME, ID)
            assert client.vcpus == 1


@pytest.mark.parametrize("address", ["vsock:", "vsock:1", "vsock:x:1", "vsock:1:-1", "vsock:1:4294967296", "vsock:4294967296:1"])
def test_what_is_no_vsock_address(address: str) -> None:
    with pytest.raises(ConfigError, match="write vsock:CID:PORT"):
        PeerOptions.parse(address)


def test_tool_that_comes_back(boot: Boot, listener: Listener, tmp_path: Path) -> None:
    machine = boot(HALT)
    with peer_of(machine, tmp_path / "tool"):
        for _ in range(3):
            peer, _ = listener.accept(answer())
            assert ask(peer, 1)[:4] == bytes(4)
            peer.close()


@pytest.mark.parametrize(
    "reply",
    [answer("another key"), answer(), struct.pack("<I", 23) + bytes(20), struct.pack("<I", 1 << 31) + bytes(20), b"\0"],
    ids=["another key", "no key", "too short", "too long", "nothing"],
)
def test_tool_that_cannot_shake_hands_gets_nothing(boot: Boot, listener: Listener, tmp_path: Path, reply: bytes) -> None:
    machine = boot(HALT)
    with peer_of(machine, tmp_path / "tool", ",key=secret"):
        peer, _ = listener.accept(reply)
        peer.shutdown(socket.SHUT_WR)
        assert is_closed(peer)
        peer.close()
        peer, _ = listener.accept(answer("secret"))
        assert ask(peer, 1)[:4] == bytes(4)
        peer.close()


def test_tool_that_is_not_there_costs_the_machine_nothing(boot: Boot, tmp_path: Path) -> None:
    machine = boot(EXIT)
    with peer_of(machine, tmp_path / "nobody"):
        assert machine.run(timeout=60).reason is StopReason.EXIT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "path,dialect=v8",
        "path,nonsense",
        "path,key",
        "vsock:1",
        "vsock:a:b",
        "path,reply-timeout=-1",
        "path,reconnect=soon",
        "p,size=3",
    ],
)
def test_every_wrong_option_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError):
        PeerOptions.parse(text)


def test_options() -> None:
    options = PeerOptions.parse("vsock:2:0x4d2,dialect=libkvmi,key=secret,reply-timeout=1.5,reconnect=2")
    assert options == PeerOptions("vsock:2:0x4d2", "libkvmi", "secret", 1.5, 2.0)
    assert options.resolve() == (socket.AF_VSOCK, (2, 1234))


def test_tools_of_this_process(boot: Boot) -> None:
    machine = boot(HALT)
    with machine.introspect() as own:
        assert ask(own, 4)[8:12] == struct.pack("<I", 1)
        with pytest.raises(FileExistsError):
            machine.introspect()
    with machine.introspect() as again:
        assert ask(again, 4)[:4] == bytes(4)
    machine.introspection.end()
    channel = machine.introspect_direct(lambda event: None)
    assert channel.request(Command.VM_GET_INFO)[:4] == struct.pack("<I", 1)
    channel.detach()


def test_tool_sent_to_the_monitor(boot: Boot) -> None:
    machine = boot(HALT)
    with Monitor("introspected", lambda error: None) as monitor:
        commands.offer(monitor, machine)
        mine, theirs = socket.socketpair()
        with Monitor.connect("introspected") as connection, mine, theirs:
            connection.execute("introspect", {}, [theirs.fileno()])
            theirs.close()
            assert ask(mine, 1)[:4] == bytes(4)


def pause(own: socket.socket) -> None:
    assert ask(own, Command.VCPU_PAUSE, bytes(16))[:4] == bytes(4)


@pytest.mark.parametrize("direct", [False, True])
def test_a_run_ends_although_a_tool_keeps_a_vcpu(boot: Boot, direct: bool) -> None:
    machine = boot(bytes.fromhex("ebfe"))
    told = threading.Event()
    stops: list[object] = []
    runner = threading.Thread(target=lambda: stops.append(machine.run().reason))
    if direct:
        channel = machine.introspect_direct(lambda event: told.set())
        channel.request(Command.VCPU_PAUSE, bytes(8), 0)
        runner.start()
        assert told.wait(TIMEOUT)
    else:
        own = machine.introspect()
        pause(own)
        runner.start()
        assert own.recv(4096)[12] == Event.PAUSE_VCPU
    machine.stop()
    runner.join(TIMEOUT)
    assert stops == [StopReason.INTERRUPTED]
    if not direct:
        assert is_closed(own)
        own.close()


@pytest.mark.parametrize("wants_to_know", [True, False])
def test_snapshot_without_the_tool(boot: Boot, tmp_path: Path, wants_to_know: bool) -> None:
    machine = boot(HALT)
    own = machine.introspect()
    if wants_to_know:
        assert ask(own, Command.VM_CONTROL_EVENTS, struct.pack("<HBBI", Event.UNHOOK, 1, 0, 0))[:4] == bytes(4)
    saver = threading.Thread(target=machine.save, args=(tmp_path / "snapshot",))
    saver.start()
    if wants_to_know:
        assert own.recv(4096)[12] == Event.UNHOOK
        assert ask(own, Command.VM_GET_MAX_GFN)[:4] == bytes(4), "it can still clean up"
    else:
        assert is_closed(own)
    own.close()
    saver.join(TIMEOUT)
    assert (tmp_path / "snapshot").exists()
    with machine.introspect() as again:
        assert ask(again, 1)[:4] == bytes(4)


def test_reset_ends_introspection(boot: Boot) -> None:
    machine = boot(bytes.fromhex("b006 66baf90c ee ebfe"))  # the reset control register
    own = machine.introspect()
    assert machine.run(timeout=60).reason is StopReason.RESET
    assert is_closed(own)
    own.close()
