"""System calls from outside, call by call against Debian's strace inside the guest: one run of a pipeline, seen by both."""

from __future__ import annotations

import itertools
import re
import signal
from collections import defaultdict
from collections.abc import Iterator

import pytest

from softkvm.vmi.client import Client
from softkvm.vmi.linux import tasks
from softkvm.vmi.tools import syscalls
from softkvm.vmi.tools.alarms import Alarms, Executed
from softkvm.vmi.tools.arguments import Argument
from softkvm.vmi.tools.syscalls import Syscall, SyscallTracer
from softkvm.vmi.tools.watch import Breakpoint, Watchpoint
from tests.guests import packages
from tests.guests.vmi.live import LiveGuest, live_guest

pytestmark = [pytest.mark.guest, pytest.mark.slow]

PIPELINE = "echo hello | tr a-z A-Z; cat /etc/passwd /nosuch 2>/dev/null | wc -l; mkdir /tmp/d; cp /init /tmp/d; ls /tmp/d | sort"
LOADER = "ld-linux-x86-64.so.2"
LIBRARIES = ("libc.so.6", "libunwind.so.8", "libunwind-x86_64.so.8", "libunwind-ptrace.so.0", "liblzma.so.5")
LINE = re.compile(r"^(\w+)\((.*)\) += +(\?|-?\w+)(?: (E\w+))?")
IN_ONE_ARGUMENT = re.compile(r'"(?:[^"\\]|\\.)*"(?:\.\.\.)?|\[[^\]]*\]|\{[^}]*\}|[^,\s][^,]*')
NAMED_ARGUMENTS = frozenset({"clone", "clone3", "rt_sigreturn", "execve", "prctl"})
"""Calls whose arguments strace shows in an order or a form of its own; the program and the words of execve are looked at apart."""


@pytest.fixture
def live(booted: LiveGuest) -> Iterator[LiveGuest]:
    """A session of the test's own with the guest, as every tool has one."""
    booted.target.client.close()
    with Client(booted.machine.introspect()) as client:
        yield LiveGuest(booted.machine, client)


@pytest.fixture(scope="module")
def booted() -> Iterator[LiveGuest]:
    """A guest with Debian's strace and the libraries that it needs."""
    root = packages.unpacked("strace", "libc6", "libunwind8", "liblzma5")
    found = {"/bin/strace": (root / "usr/bin/strace").read_bytes()}
    found[f"/lib64/{LOADER}"] = (root / "lib/x86_64-linux-gnu" / LOADER).read_bytes()
    for name in LIBRARIES:
        (path,) = (
            folder / name for folder in (root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu") if (folder / name).exists()
        )
        found[f"/lib/x86_64-linux-gnu/{name}"] = path.read_bytes()
    with live_guest(found, cpus=2) as made:
        yield made


def strace_lines(live: LiveGuest) -> dict[int, list[tuple[str, str, str]]]:
    """Call, arguments and result for each process of strace's last run."""
    text = live.shell('cd /tmp; for f in t.*; do echo "== ${f#t.}"; cat $f; done')
    found: dict[int, list[tuple[str, str, str]]] = {}
    for part in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        pid, _, lines = part.partition("\n")
        matches = [LINE.match(line) for line in lines.splitlines() if not line.startswith(("+++", "---"))]
        assert all(matches), lines
        found[int(pid)] = [(match[1], match[2], match[4] or match[3]) for match in matches if match]
    return found


def agrees(theirs: str, ours: Argument) -> bool:
    """Whether an argument as strace shows it is the one that we saw."""
    theirs = re.sub(r" */\*.*?\*/", "", theirs).strip()
    if theirs.startswith('"'):
        return ours.shown.startswith('"') and text_of(theirs) == text_of(ours.shown)
    if theirs in signal.Signals.__members__:
        return ours.value == signal.Signals[theirs]
    if theirs.startswith(("[", "{")):
        return True  # what a pointer leads to, where strace shows it all the same
    value = 0 if theirs == "NULL" else int(theirs, 8 if re.fullmatch("0[0-7]+", theirs) else 0)
    return (value - ours.value) % (1 << 32) == 0


def text_of(shown: str) -> str:
    """The first 32 characters of a quoted text."""
    return shown.removesuffix("...").removeprefix('"').removesuffix('"').encode().decode("unicode_escape")[:32]


def compare(theirs: tuple[str, str, str], ours: Syscall) -> str:
    """What is not the same; empty if all is."""
    name, arguments, result = theirs
    if name != ours.name:
        return f"{name} is not {ours}"
    if name not in NAMED_ARGUMENTS:
        pairs = zip(IN_ONE_ARGUMENT.findall(arguments), ours.arguments, strict=False)
        if not all(agrees(one, other) for one, other in pairs):
            return f"{name}({arguments}) has other arguments than {ours}"
    if ours.result is not None and result != "?":
        shown = ours.shown_result.split()[-1]
        if shown != result and not (result[0] in "-0123456789" and int(shown, 0) == int(result, 0)):
            return f"{name}({arguments}) = {result} has another result than {ours}"
    return ""


@pytest.mark.parametrize("end", ["syscall_exit_to_user_mode", "not a function of its own"])
def test_a_pipeline_is_what_strace_says(live: LiveGuest, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a kernel that has not got the function where system calls end."""
    monkeypatch.setattr(syscalls, "_EXIT", end)
    tracer = live.look(SyscallTracer)
    with live.watched(tracer) as records:
        live.shell(f"rm -rf /tmp/t.* /tmp/d; strace -ff -X raw -e verbose=none -o /tmp/t sh -c '{PIPELINE}' > /dev/null 2>&1")
    ours: defaultdict[int, list[Syscall]] = defaultdict(list)
    for record in records:
        ours[record.pid].append(record)
    theirs = strace_lines(live)
    assert len(theirs) >= 6
    compared = 0
    for pid, calls in theirs.items():
        mine = ours[pid]
        if calls[0][0] == "execve":  # strace's own child, before it becomes the shell
            mine = mine[next(at for at, call in enumerate(mine) if call.name == "execve") :]
        differences = [text for call, record in zip(calls, mine, strict=False) if (text := compare(call, record))]
        assert differences == []
        assert len(calls) == len(mine)
        compared += len(calls)
    assert compared > 200


def test_only_one_process(live: LiveGuest) -> None:
    pid = int(live.shell("sh -c 'while :; do read -t 1 x; done' & echo $!").split()[-1])
    tracer = live.look(lambda target: SyscallTracer(target, [pid]))
    with live.watched(tracer) as records:
        live.shell("ls / > /dev/null; sleep 2")
    assert {record.pid for record in records} == {pid}
    live.shell(f"kill {pid}")


def test_tools_one_after_the_other_in_one_session(live: LiveGuest) -> None:
    live.shell("while :; do cat /proc/uptime; done > /dev/null & echo $! > /tmp/busy")
    for _ in range(3):
        with live.watched(live.look(SyscallTracer)) as calls:
            live.shell("ls / > /dev/null")
        assert len(calls) > 50
        found = live.still(lambda target: tasks.processes(target.kernel, target.cr3s()))
        assert not any(process.hidden_from for process in found)
        with live.watched(live.look(Alarms)) as alarms:
            live.shell("/bin/busybox true")
        assert ("/bin/busybox", "true") in [alarm.arguments for alarm in alarms if isinstance(alarm, Executed)]
    live.shell("kill $(cat /tmp/busy)")


def test_a_tool_that_takes_no_more_leaves_the_guest_running(live: LiveGuest) -> None:
    live.shell("while :; do cat /proc/uptime; done > /dev/null & echo $! > /tmp/busy")
    first = live.look(lambda target: list(itertools.islice(SyscallTracer(target).records(), 20)))
    assert len(first) == 20
    assert live.look(lambda target: len(tasks.consistent(target.kernel))) > 40
    assert live.shell("kill $(cat /tmp/busy); echo alive").split()[-1] == "alive"


def test_alarms(live: LiveGuest) -> None:
    alarms = live.look(Alarms)
    with live.watched(alarms) as records:
        live.shell("/bin/busybox env -i /bin/busybox echo 'two words' > /dev/null")
    programs = [record.arguments for record in records if isinstance(record, Executed)]
    assert ("/bin/busybox", "echo", "two words") in programs


def test_a_breakpoint_has_the_functions_arguments(live: LiveGuest) -> None:
    point = live.look(lambda target: Breakpoint(target, "ksys_sync"))
    with live.watched(point) as records:
        live.shell("sync")
    assert [(record.process, record.code) for record in records] == [("sync", "ksys_sync")]
    point = live.look(lambda target: Breakpoint(target, "vfs_mkdir"))
    with live.watched(point) as records:
        live.shell("mkdir /tmp/new")
    assert records[0].process == "mkdir"
    assert list(records[0].arguments) == ["mnt_userns", "dir", "dentry", "mode"]


def test_a_watchpoint_knows_who_writes(live: LiveGuest) -> None:
    point = live.look(lambda target: Watchpoint(target, target.kernel.symbols["panic_timeout"], 4))
    with live.watched(point) as records:
        live.shell("echo 5 > /proc/sys/kernel/panic")
    assert [(record.access, record.value) for record in records] == [("write", "00000000")]
    assert records[0].process == "sh"
