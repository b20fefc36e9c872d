"""The commands about VMs that run already: `softkvm list`, `pause`, `resume`, through the control sockets of `vmm/monitor`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
import msgspec

from softkvm.cli import output, status
from softkvm.cli.errors import CliError
from softkvm.vmm import ConfigError
from softkvm.vmm.layout import MIB
from softkvm.vmm.monitor import TIMEOUT, Connection, Monitor, MonitorError, commands, running

_PATIENCE = 10.0
"""Seconds that a VM of a listing has for its answer."""
_SAVING_PATIENCE = 600.0
"""Seconds for a snapshot: a large memory, a slow disk."""
_COLUMNS = ("name", "pid", "state", "CPU", "CPUs", "memory", "uptime")
_SILENT = "no answer"


@contextmanager
def connected(name: str | None, patience: float = TIMEOUT) -> Iterator[Connection]:
    """A connection to the VM `name`, or to the only one that runs; CliError, one sentence, for whatever goes wrong in the block.

    The VM has `patience` seconds for each answer.
    """
    try:
        with Monitor.connect(name, patience) as connection:
            yield connection
    except (ConfigError, MonitorError) as error:
        raise CliError(str(error)) from error


def give(command: str, name: str | None) -> int:
    """Give a VM a command without arguments that answers nothing."""
    with connected(name) as vm:
        vm.execute(command)
    return status.SUCCESS


def snapshot(name: str, file: str, as_json: bool) -> int:
    """Have the VM `name` write a snapshot to `file`, a path of ours."""
    arguments = commands.SaveArguments(path=os.path.abspath(file))
    with connected(name, _SAVING_PATIENCE) as vm:
        answer = vm.execute("save", arguments)
    if as_json:
        click.echo(msgspec.json.encode(answer))
    return status.SUCCESS


def find() -> list[commands.Answer]:
    """What every running VM says of itself; one that does not answer is in the list all the same."""
    try:
        names = running()
    except ConfigError as error:
        raise CliError(str(error)) from error
    return [answer for name in names if (answer := _ask(name)) is not None]


def _ask(name: str) -> commands.Answer | None:
    try:
        connection = Monitor.connect(name, _PATIENCE)
    except MonitorError:  # it has ended meanwhile
        return None
    with connection:
        try:
            return msgspec.convert(connection.execute("query-status"), commands.Answer)
        except (MonitorError, msgspec.ValidationError):
            return commands.Answer(name, connection.pid, _SILENT, "", 0, 0, 0)


def show(found: Sequence[commands.Answer], as_json: bool) -> int:
    """Print the listing on standard output."""
    if as_json:
        click.echo(msgspec.json.encode(found))
    elif found:
        output.table("Running VMs", _COLUMNS, [_row(vm) for vm in found], on_stdout=True)
    else:
        output.say("no VM is running")
    return status.SUCCESS


def _row(vm: commands.Answer) -> tuple[str, ...]:
    if vm.state == _SILENT:
        return (vm.name, str(vm.pid), vm.state, "", "", "", "")
    return (vm.name, str(vm.pid), vm.state, vm.cpu, str(vm.cpus), f"{vm.memory // MIB} MiB", _duration(vm.uptime))


def _duration(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
