"""What softkvm itself says to a person; all of it on stderr, because stdout belongs to the guest.

rich is imported where a table or a spinner is drawn: it costs more than the rest of the command line together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

    from softkvm.cli.options import StatsFormat


def say(line: str) -> None:
    """One line on stderr, under softkvm's name."""
    sys.stderr.write(f"softkvm: {line}\n")
    sys.stderr.flush()


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what slow work is at; it shows nothing where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with _console().status("") as status:
        yield status.update


def print_json(data: bytes) -> None:
    """A command's result for programs, on standard output."""
    sys.stdout.write(data.decode() + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, on_stdout: bool = False) -> None:
    """Print a table; `on_stdout` for a command whose result it is."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    drawn = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        drawn.add_row(*map(escape, row))
    _console(on_stdout).print(drawn)


def plain(text: str) -> str:
    """Text of a guest's without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


_GROUPS = {
    "engine": "the silicon",
    "exits": "VM exits",
    "user_exits": "of them to the VMM",
    "vcpu": "KVM",
    "repetition": "the same in every run",
}
"""Headings for the groups of counters in `vmm.Stats`."""


def print_stats(stats: msgspec.Struct, style: StatsFormat) -> None:
    """Counters of a run: a table for a person, or one JSON object."""
    values = msgspec.to_builtins(stats)
    if style == "json":
        sys.stderr.write(msgspec.json.encode(values).decode() + "\n")
        return
    from rich import box
    from rich.table import Table

    drawn = Table("counter", title="Counters", title_justify="left", box=box.SIMPLE_HEAD)
    drawn.add_column("value", justify="right")
    for name, value in values.items():
        if value is not None and not isinstance(value, dict):
            drawn.add_row(name, _number(value))
    for name, group in values.items():
        if isinstance(group, dict) and group:
            drawn.add_section()
            drawn.add_row(_GROUPS.get(name, name), _number(sum(group.values())) if name.endswith("exits") else "", style="bold")
            for counter, value in group.items():
                drawn.add_row(f"  {counter}", _number(value))
    _console().print(drawn)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _console(on_stdout: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=not on_stdout, highlight=False, soft_wrap=False)
