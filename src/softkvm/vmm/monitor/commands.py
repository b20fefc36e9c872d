"""What every running machine offers on its monitor; whoever else has something to offer registers it beside these.

Names and meaning are those of QEMU's QMP (`qapi/{run-state,machine}.json`) where it has the command.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Protocol

import msgspec

from softkvm import kvm
from softkvm.vmm.introspection import AUTO, check_dialect, recognise
from softkvm.vmm.introspection_peer import HANDSHAKE_TIMEOUT
from softkvm.vmm.monitor.server import Monitor
from softkvm.vmm.monitor.wire import CommandError, Descriptors, NoArguments
from softkvm.vmm.stats import Stats
from softkvm.vmm.status import Status


class Hook(Protocol):
    """The part of `vmm.introspection.Introspection` that the commands use."""

    def hook(self, peer: socket.socket, dialect: str) -> None:
        """Give the VM to the tool behind a socket."""


class Machine(Protocol):
    """The part of `vmm.Machine` that the commands use."""

    @property
    def introspection(self) -> Hook:
        """Who takes a tool's socket."""

    def status(self) -> Status:
        """What it is and does now."""

    def pause(self) -> None:
        """Park all vCPUs."""

    def resume(self) -> None:
        """Take back `pause()`."""

    def save(self, path: str | Path) -> int:
        """Write a snapshot."""

    def counters(self) -> Stats:
        """What it has counted so far."""

    def tsc_status(self) -> kvm.TscStatus:
        """Its clocks."""


class Answer(msgspec.Struct, frozen=True):
    """The answer to query-status."""

    name: str
    pid: int
    state: str
    """A value of `RunState`."""
    cpu: str
    cpus: int
    memory: int
    """Bytes of RAM."""
    uptime: float
    """Seconds since the machine could be reached."""


class SaveArguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of the command save."""

    path: str
    """An absolute path: the VMM's working directory is nobody else's business."""


class IntrospectArguments(msgspec.Struct, forbid_unknown_fields=True):
    """Of the command introspect."""

    dialect: str = "v9"
    """A dialect of KVMI, or `auto` for what the tool's first message shows."""


class Saved(msgspec.Struct, frozen=True):
    """The answer to save."""

    path: str
    size: int
    """Bytes."""


def offer(monitor: Monitor, machine: Machine) -> None:
    """Register query-status, query-stats, query-tsc, save, introspect, stop and cont."""
    since = time.monotonic()

    @monitor.command("query-status")
    def query_status(arguments: NoArguments, descriptors: Descriptors) -> Answer:
        status = machine.status()
        uptime = round(time.monotonic() - since, 3)
        return Answer(monitor.name, os.getpid(), status.state.value, status.cpu, status.cpus, status.memory, uptime)

    @monitor.command("query-stats")
    def query_stats(arguments: NoArguments, descriptors: Descriptors) -> Stats:
        return machine.counters()

    @monitor.command("query-tsc")
    def query_tsc(arguments: NoArguments, descriptors: Descriptors) -> kvm.TscStatus:
        return machine.tsc_status()

    @monitor.command("save", SaveArguments)
    def save(arguments: SaveArguments, descriptors: Descriptors) -> Saved:
        if not os.path.isabs(arguments.path) or "\0" in arguments.path:
            raise CommandError("the path of a snapshot must be absolute")
        return Saved(arguments.path, machine.save(arguments.path))

    @monitor.command("introspect", IntrospectArguments)
    def introspect(arguments: IntrospectArguments, descriptors: Descriptors) -> None:
        """Hook the tool behind a stream socket, which is sent along."""
        with socket.socket(fileno=descriptors.take()) as peer:
            dialect = check_dialect(arguments.dialect)
            peer.settimeout(HANDSHAKE_TIMEOUT)
            machine.introspection.hook(peer, recognise(peer) if dialect == AUTO else dialect)

    @monitor.command("stop")
    def stop(arguments: NoArguments, descriptors: Descriptors) -> None:
        machine.pause()

    @monitor.command("cont")
    def cont(arguments: NoArguments, descriptors: Descriptors) -> None:
        machine.resume()
