"""The commands of `softkvm vmi` that go on: each line is something that has happened, as text or as a JSON object."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click
import msgspec

from softkvm.cli import output, status
from softkvm.cli.vmi.attach import attached
from softkvm.cli.vmi.options import Where
from softkvm.uapi.kvmi import Access
from softkvm.vmi.linux import tasks
from softkvm.vmi.target import Target
from softkvm.vmi.tools.alarms import Alarm, Alarms, CredentialsChanged, Executed, ModuleLoaded
from softkvm.vmi.tools.dispatch import Dispatcher
from softkvm.vmi.tools.lock import Attempt, KernelLock
from softkvm.vmi.tools.syscalls import Syscall, SyscallTracer
from softkvm.vmi.tools.watch import Breakpoint, Hit, Watchpoint, resolve

R = TypeVar("R")
_ENDED_BY_VM = 1
"""Exit status of what was to go on until its own end: a guest that was locked is locked no more."""
_ACCESS = {"r": Access.R, "w": Access.W, "x": Access.X}


@contextmanager
def _until_interrupted(dispatcher: Dispatcher[Any]) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the records and not the process, so that the guest is let go in order."""

    def stop(number: int, frame: FrameType | None) -> None:
        dispatcher.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stream(
    where: Where,
    timeout: float | None,
    as_json: bool,
    ready: str,
    make: Callable[[Target], Dispatcher[R]],
    show: Callable[[R], str],
    *,
    booted: bool = True,
) -> int:
    with attached(where, booted=booted) as target:
        dispatcher = make(target)
        with _until_interrupted(dispatcher):
            dispatcher.arm()
            output.say(ready)
            for record in dispatcher.records(timeout):
                line = msgspec.json.encode(record).decode() if as_json else output.plain(show(record))
                click.echo(line)
    if dispatcher.lost:
        output.say("the VM has ended the session: it was shut down, reset or saved")
        return _ENDED_BY_VM
    return status.SUCCESS


def syscalls(where: Where, timeout: float | None, as_json: bool, pids: tuple[int, ...], follow: bool) -> int:
    """`syscalls`."""

    def show(call: Syscall) -> str:
        return f"{call.pid:>5} {call.process:<15} {call}"

    def make(target: Target) -> SyscallTracer:
        for pid in pids:
            tasks.find(target.kernel, pid)
        return SyscallTracer(target, pids, follow=follow)

    whom = f"of {', '.join(map(str, pids))}" if pids else "of all processes"
    return _stream(where, timeout, as_json, f"system calls {whom}", make, show)


def alarms(where: Where, timeout: float | None, as_json: bool) -> int:
    """`exec`."""
    return _stream(where, timeout, as_json, "programs, modules and credentials", Alarms, _show_alarm)


def _show_alarm(alarm: Alarm) -> str:
    match alarm:
        case Executed():
            return f"exec        {alarm.pid} (child of {alarm.ppid}, user {alarm.uid}): {alarm.path} {list(alarm.arguments)}"
        case ModuleLoaded():
            return f"module      {alarm.pid} ({alarm.process}) loads {alarm.module}, taints {alarm.taints:#x}"
        case CredentialsChanged():
            what = "GAINS RIGHTS" if alarm.gained else "changes credentials"
            change = f"user {alarm.uid} to {alarm.new_uid}, effective {alarm.euid} to {alarm.new_euid}"
            return f"credentials {alarm.pid} ({alarm.process}) {what}: {change}"


def watch(where: Where, timeout: float | None, as_json: bool, place: str, size: int, access: str) -> int:
    """`watch`."""

    def make(target: Target) -> Watchpoint:
        wanted = Access(0)
        for letter in access:
            wanted |= _ACCESS[letter]
        return Watchpoint(target, resolve(target, place)[0], size, wanted)

    return _stream(where, timeout, as_json, f"watching {size} bytes at {place}", make, _show_hit)


def break_at(where: Where, timeout: float | None, as_json: bool, place: str) -> int:
    """`break`."""
    return _stream(where, timeout, as_json, f"breakpoint at {place}", lambda target: Breakpoint(target, place), _show_hit)


def _show_hit(hit: Hit) -> str:
    head = f"vCPU {hit.vcpu} {hit.pid:>5} {hit.process:<15} {hit.code}"
    if hit.access:
        return f"{head} {hit.access} {hit.address:#x}, before {hit.value}"
    arguments = ", ".join(f"{name}={value:#x}" for name, value in hit.arguments.items())
    return f"{head}({arguments})"


def lock_kernel(where: Where, timeout: float | None, as_json: bool, verbose: bool) -> int:
    """`lock-kernel`."""

    def make(target: Target) -> KernelLock:
        lock = KernelLock(target, verbose=verbose)
        lock.engage_when_booted()
        return lock

    return _stream(where, timeout, as_json, "kernel locked, or about to be when it has booted", make, _show_attempt, booted=False)


def _show_attempt(attempt: Attempt) -> str:
    outcome = attempt.legal or ("STOPPED" if attempt.stopped else "NOT STOPPED")
    who = f"process {attempt.pid} ({attempt.process}) at {attempt.code} ({attempt.rip:#x})"
    return f"{outcome}: {who} writes {attempt.what} at {attempt.where}"
