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


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, on_stdout: bool = False) -> None:
    """Print a table; `on_stdout` for a command whose result it is."""
    from rich import box
    from rich.table import Table

    drawn = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in rows:
        drawn.add_row(*row)
    _console(on_stdout).print(drawn)


def print_stats(stats: msgspec.Struct, style: StatsFormat) -> None:
    """Counters of a run: a table for a person, or one JSON object."""
    values = msgspec.to_builtins(stats)
    if style == "json":
        sys.stderr.write(msgspec.json.encode(values).decode() + "\n")
        return
    table("Counters", ("counter", "value"), list(_flat(values)))


def _flat(values: dict[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else str(value)


def _console(on_stdout: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=not on_stdout, highlight=False, soft_wrap=False)
