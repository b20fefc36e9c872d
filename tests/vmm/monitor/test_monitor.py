"""The monitor's server and client over real sockets: what is answered, and what a hostile peer can do."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from softkvm import kvm
from softkvm.vmm import ConfigError, RunState, Status
from softkvm.vmm.monitor import CommandError, Connection, Descriptors, Monitor, MonitorError, NoArguments, commands, names, running
from softkvm.vmm.monitor.server import MOST_CONNECTIONS
from softkvm.vmm.monitor.wire import MOST_DESCRIPTORS, REQUEST_LIMIT
from softkvm.vmm.stats import Stats

NAME = "test.vm-1"


class Sum(msgspec.Struct, forbid_unknown_fields=True):
    """Arguments of the command `add`."""

    left: int
    right: int = 1


class FakeIntrospection:
    """Takes sockets."""

    def __init__(self) -> None:
        self.hooked: list[tuple[int, str]] = []

    def hook(self, peer: socket.socket, dialect: str = "v9") -> None:
        self.hooked.append((peer.fileno(), dialect))


class Machine:
    """Has what the standard commands want."""

    def __init__(self) -> None:
        self.state = RunState.RUNNING
        self.introspection = FakeIntrospection()

    def status(self) -> Status:
        return Status(self.state, "epyc,-pcid", 4, 64 << 20)

    def pause(self) -> None:
        self.state = RunState.PAUSED

    def resume(self) -> None:
        self.state = RunState.RUNNING

    def save(self, path: str | Path) -> int:
        return Path(path).write_bytes(b"snapshot")

    def counters(self) -> Stats:
        return Stats(0.5, 7, {"blocks_run": 3}, {"HLT": 2}, {}, {})

    def tsc_status(self) -> kvm.TscStatus:
        raise CommandError("a machine without a clock")


@pytest.fixture
def bugs() -> list[Exception]:
    """What the monitor reported as bugs."""
    return []


@pytest.fixture
def monitor(bugs: list[Exception]) -> Iterator[Monitor]:
    """A monitor with the standard commands and a few more."""
    made = Monitor(NAME, bugs.append)
    commands.offer(made, Machine())

    @made.command("add", Sum)
    def add(arguments: Sum, descriptors: Descriptors) -> int:
        return arguments.left + arguments.right

    @made.command("size")
    def size(arguments: NoArguments, descriptors: Descriptors) -> int:
        with open(descriptors.take(), "rb") as file:
            return len(file.read())

    @made.command("refuse")
    def refuse(arguments: NoArguments, descriptors: Descriptors) -> None:
        raise CommandError("not today")

    @made.command("open")
    def open_(arguments: NoArguments, descriptors: Descriptors) -> None:
        Path("/nowhere/at/all").read_bytes()

    @made.command("break")
    def break_(arguments: NoArguments, descriptors: Descriptors) -> None:
        raise ZeroDivisionError("our own mistake")

    with made:
        yield made


@pytest.fixture
def vm(monitor: Monitor) -> Iterator[Connection]:
    with Monitor.connect(NAME) as connection:
        yield connection


def raw() -> socket.socket:
    """A peer without manners."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(30)
    peer.connect(str(names.path_of(NAME)))
    return peer


def lines(peer: socket.socket) -> list[bytes]:
    """Everything that comes until the other side hangs up."""
    with peer.makefile("rb") as file:
        return file.read().splitlines()


def test_commands_answer(vm: Connection) -> None:
    answer = vm.execute("query-status")
    assert answer.pop("uptime") >= 0
    assert answer == {"name": NAME, "pid": os.getpid(), "state": "running", "cpu": "epyc,-pcid", "cpus": 4, "memory": 64 << 20}
    assert vm.execute("stop") == {}
    assert vm.execute("query-status")["state"] == "paused"
    assert vm.execute("cont", {}) == {}
    assert vm.execute("query-status")["state"] == "running"
    assert vm.execute("query-stats")["instructions"] == 7
    assert vm.execute("add", {"left": 4}) == 5
    assert vm.execute("add", Sum(4, 3)) == 7
    assert vm.pid == os.getpid()


def test_save_wants_an_absolute_path(vm: Connection, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    assert vm.execute("save", commands.SaveArguments(path)) == {"path": path, "size": 8}
    assert Path(path).read_bytes() == b"snapshot"
    for bad in ("file", "", f"{path}\0"):
        with pytest.raises(MonitorError, match="must be absolute"):
            vm.execute("save", {"path": bad})


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("refuse", {}, "refused refuse: not today"),
        ("open", {}, "/nowhere/at/all: No such file or directory"),
        ("nothing", {}, "there is no command 'nothing'; there are add, break, cont, introspect, open, query-"),
        ("stop", {"now": True}, "not a command: Object contains unknown field `now`"),
        ("add", {}, "missing required field `left`"),
        ("add", {"left": "4"}, "Expected `int`, got `str`"),
        ("size", {}, "needs a file descriptor"),
    ],
)
def test_refusals_are_sentences_and_the_connection_goes_on(
    vm: Connection, command: str, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(MonitorError, match=r"^the VM test\.vm-1 refused ") as refusal:
        vm.execute(command, arguments)
    assert sentence in str(refusal.value)
    assert vm.execute("add", {"left": 1}) == 2


def test_bug_of_a_handler_is_reported_and_answered(vm: Connection, bugs: list[Exception]) -> None:
    with pytest.raises(MonitorError, match="this is a bug in softkvm"):
        vm.execute("break")
    assert [type(bug) for bug in bugs] == [ZeroDivisionError]
    assert vm.execute("query-status")["name"] == NAME


def test_descriptors_travel_with_a_command(vm: Connection, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    with file.open("rb") as opened:
        assert vm.execute("size", descriptors=[opened.fileno()]) == 5


def test_descriptors_that_nobody_takes_are_bounded_and_closed(monitor: Monitor) -> None:
    reader, writer = os.pipe()
    with raw() as peer:
        for _ in range(MOST_DESCRIPTORS // 4 + 1):
            socket.send_fds(peer, [b'{"execute": "query-status"}\n'], [writer] * 4)
        os.close(writer)
        answers = lines(peer)
    assert b"file descriptors wait" in answers[-1]
    assert os.read(reader, 1) == b"", "the server holds no end of the pipe any more"
    os.close(reader)


def test_peers_that_stop_in_the_middle_or_send_rubbish(monitor: Monitor, vm: Connection) -> None:
    with raw() as silent, raw() as partial, raw() as endless:
        partial.send(b'{"execute": "sto')
        endless.sendall(b"[" * REQUEST_LIMIT)
        assert b"at most 65536 bytes" in lines(endless)[0]
        assert vm.execute("query-status")["state"] == "running"
        partial.send(b'p"}\n\n  \n{"execute": "query-status"}\nnonsense\n')
        partial.shutdown(socket.SHUT_WR)
        first, second, third = map(json.loads, lines(partial))
        assert (first, second["return"]["state"]) == ({"return": {}}, "paused")
        assert third["error"]["class"] == "GenericError"
        silent.shutdown(socket.SHUT_RDWR)
    assert vm.execute("cont") == {}


def test_deep_nesting_and_bad_text_are_refused(monitor: Monitor) -> None:
    with raw() as peer:
        peer.sendall(
            b'{"execute": "add", "arguments": '
            + b"[" * 5000
            + b'}\n{"execute": "\xff"}\n{"execute": "add", "arguments": {"left": 1e999}}\n'
        )
        peer.shutdown(socket.SHUT_WR)
        assert [json.loads(line)["error"]["class"] for line in lines(peer)] == ["GenericError"] * 3


def test_one_connection_too_many_is_closed_and_room_comes_back(monitor: Monitor) -> None:
    peers = [raw() for _ in range(MOST_CONNECTIONS)]
    for peer in peers:  # an answer shows that the server has it
        peer.sendall(b"{}\n")
        assert peer.recv(1) == b"{"
    with raw() as refused:
        assert refused.recv(1) == b""
    for peer in peers:
        peer.shutdown(socket.SHUT_WR)
        lines(peer)
        peer.close()
    with Monitor.connect(NAME) as connection:
        assert connection.execute("query-status")["name"] == NAME


REQUESTS = st.sampled_from(["query-status", "add", "size", "refuse", "stop", ""]).flatmap(
    lambda name: st.dictionaries(st.sampled_from(["execute", "arguments", "id", "left"]), st.just(name) | st.integers() | st.none())
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)
BYTES = st.one_of(st.binary(), JSON.map(lambda value: json.dumps(value).encode()), REQUESTS.map(lambda value: json.dumps(value).encode()))


@given(st.lists(st.tuples(BYTES, st.booleans()), max_size=8))
def test_no_bytes_harm_the_server(monitor: Monitor, bugs: list[Exception], pieces: list[tuple[bytes, bool]]) -> None:
    with raw() as peer:
        for data, is_line in pieces:
            peer.sendall(data + b"\n" * is_line)
        peer.shutdown(socket.SHUT_WR)
        for line in lines(peer):
            answer = json.loads(line)
            assert answer.keys() in ({"return"}, {"error"})
            assert answer.get("error", {"class": "GenericError"})["class"] in ("GenericError", "CommandNotFound")
    assert bugs == []


def test_a_slow_command_keeps_nobody_waiting(monitor: Monitor, vm: Connection) -> None:
    entered, leave = threading.Event(), threading.Event()

    @monitor.command("slow")
    def slow(arguments: NoArguments, descriptors: Descriptors) -> None:
        entered.set()
        assert leave.wait(60)

    with raw() as other:
        other.sendall(b'{"execute": "slow"}\n')
        assert entered.wait(60)
        assert vm.execute("add", {"left": 1}) == 2
        leave.set()
        assert other.recv(100) == b'{"return":{}}\n'


def test_close_ends_connections_and_gives_the_name_back(bugs: list[Exception]) -> None:
    with Monitor(NAME, bugs.append):
        connection = Monitor.connect()
        assert connection.name == NAME
        with pytest.raises(ConfigError, match=r"a VM named test\.vm-1 is running already"):
            Monitor(NAME, bugs.append)
    with pytest.raises(MonitorError, match=r"has ended|failed"):
        connection.execute("query-status")
    connection.close()
    assert not names.path_of(NAME).exists()
    never_started = Monitor(NAME, bugs.append)
    never_started.close()
    never_started.close()


def test_which_vm_is_asked_for_by_name(bugs: list[Exception]) -> None:
    with pytest.raises(MonitorError, match=r"^no VM is running$"):
        Monitor.connect()
    with Monitor("one", bugs.append), Monitor("two", bugs.append):
        assert running() == ["one", "two"]
        with pytest.raises(MonitorError, match=r"^which VM\? there are one, two$"):
            Monitor.connect()
        with pytest.raises(MonitorError, match=r"^no VM named three is running; there are one, two$"):
            Monitor.connect("three")


def test_what_a_killed_vmm_left_behind_is_removed(bugs: list[Exception]) -> None:
    stale = names.listen("stale")
    stale.close()
    assert names.path_of("stale").exists()
    assert running() == []
    assert not names.path_of("stale").exists()
    names.listen("stale").close()
    with Monitor("stale", bugs.append):
        assert running() == ["stale"]


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "a" * 65, "ä", "a\0", "a\n"])
def test_bad_names_are_one_sentence(name: str) -> None:
    for use in (Monitor.connect, lambda name: Monitor(name, print)):
        with pytest.raises(ConfigError, match="is not a name for a VM"):
            use(name)


def test_directory_must_be_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "softkvm").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="is not a directory of yours alone"):
        running()
    (tmp_path / "softkvm").rmdir()
    (tmp_path / "softkvm").symlink_to("/tmp")
    with pytest.raises(ConfigError, match="is not a directory of yours alone"):
        running()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot be used: No such file"):
        running()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "softkvm").unlink()
    monkeypatch.setattr(names, "_LONGEST_PATH", 10)
    with pytest.raises(ConfigError, match="too long for the path of a socket"):
        names.path_of("x")
