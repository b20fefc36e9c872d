"""The commands `softkvm perf` and `softkvm trace`: their options, and which part of this package does the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import click

from softkvm.cli import completion
from softkvm.cli.options import RunOptions


@click.group(short_help="Profile a guest from outside.")
def perf() -> None:
    """Profile a guest from outside, by exact counts of what its software CPU executes. The guest does not know.

    Inside the guest Debian's own perf works as well: softkvm run --with linux-perf -- perf stat ls
    """


_GUEST_OPTIONS = [
    click.option("-k", "--kernel", default="cloud", metavar="FILE|cloud|generic", help="bzImage, or a flavour of Debian's kernel."),
    click.option("-p", "--append", default="", metavar="TEXT", help="Kernel parameters, added to softkvm's own.", show_default=False),
    click.option("-m", "--memory", default="512M", metavar="SIZE", help="Guest memory, with K, M or G."),
    click.option("--cpus", type=int, default=1, metavar="N", help="CPUs of the guest, 1 to 64."),
    click.option("--cpu", default="cascadelake", metavar="MODEL[,-FEATURE...]", help="CPU model.", shell_complete=completion.cpus),
    click.option("--with", "extras", multiple=True, metavar="PACKAGE|./FILE", help="As for `softkvm run`."),
    click.option("--timeout", type=float, metavar="SECONDS", help="Stop after this wall time, with exit status 124."),
    click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]"),
]


def _guest_options(function: Callable[..., int]) -> Callable[..., int]:
    """The options of a run that is profiled; its `options` argument gets them."""

    @wraps(function)
    def call(**given: Any) -> int:
        names = ("kernel", "append", "memory", "cpus", "cpu", "extras", "timeout", "command")
        options = RunOptions(**{name: given.pop(name) for name in names})
        return function(options=options, **given)

    for option in reversed(_GUEST_OPTIONS):
        call = option(call)
    return call


_EVENTS = ("instructions", "cycles", "branches", "branch-misses")
_EVENT = click.option("-e", "--event", default="instructions", metavar="EVENT[:u|:k]", help=f"One of {', '.join(_EVENTS)}.")
_PERIOD = click.option(
    "-c", "--count", "period", type=click.IntRange(min=1000), default=100003, metavar="PERIOD", help="Sample every so many events."
)


@perf.command(short_help="Write samples to a perf.data file.")
@_EVENT
@_PERIOD
@click.option("-b", "--branches", is_flag=True, help="With each sample the last 32 branches.")
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), default="perf.data", metavar="FILE", help="Where samples go.")
@_guest_options
def record(options: RunOptions, event: str, period: int, branches: bool, path: Path) -> int:
    """Run CMD in a guest, or boot one, and sample it; Debian's perf report and perf script read the file.

    Beside FILE lie FILE.kallsyms, the kernel's symbols, and FILE.symfs, the programs that were running; the last line of the output says
    how to give them to perf.
    """
    from softkvm.cli.perf import record as recorder

    return recorder.record(options, event, period, branches, path)


@perf.command(short_help="Count events.")
@click.option("-e", "--event", "events", multiple=True, metavar="EVENT[:u|:k]", default=_EVENTS, help="What to count; several times.")
@click.option("--json", is_flag=True, help="Print one JSON object in place of the guest's output.")
@_guest_options
def stat(options: RunOptions, events: tuple[str, ...], json: bool) -> int:
    """Run CMD in a guest, or boot one, and count instructions, cycles, branches and branch-misses: exactly, every one of them."""
    from softkvm.cli.perf import stat as counter

    return counter.stat(replace(options, json=json), events, json)


@perf.command(short_help="Draw a flame graph.")
@_EVENT
@_PERIOD
@click.option("-o", "--output", "path", type=click.Path(path_type=Path), default="flame.svg", metavar="FILE", help="The picture.")
@click.option("--folded", type=click.Path(path_type=Path), metavar="FILE", help="The stacks as text, one a line.")
@_guest_options
def flame(options: RunOptions, event: str, period: int, path: Path, folded: Path | None) -> int:
    """Run CMD in a guest, or boot one, and draw where it spends its instructions: programs and kernel with their callers, in one SVG.

    Callers need no frame pointers: the kernel's come from its own unwind tables, those of programs from the CPU's records of open calls.
    """
    from softkvm.cli.perf import record as recorder

    return recorder.draw(options, event, period, path, folded)


@click.group(short_help="Log what a guest does.")
def trace() -> None:
    """Log what a guest does, from outside. (`softkvm run --trace` records the events of KVM.)"""


@trace.command(short_help="Count every branch.")
@click.option("--ring", type=click.Choice(["all", "kernel", "user"]), default="all", help="By where a branch comes from.")
@click.option("--process", metavar="NAME", help="Only branches of processes with this name.")
@click.option("--most", type=click.IntRange(min=1), default=30, metavar="N", help="Lines to print.")
@click.option("--json", is_flag=True, help="Print a JSON list of all in place of the guest's output.")
@_guest_options
def branches(options: RunOptions, ring: str, process: str | None, most: int, json: bool) -> int:
    """Run CMD in a guest, or boot one, and count every branch that it takes, by the functions that it leads from and to.

    Nothing is sampled: this is the truth that perf record -b can be held against.
    """
    from softkvm.cli.perf import branches as log

    return log.show(replace(options, json=json), ring, process, most, json)
