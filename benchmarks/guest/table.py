"""The table for people at a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from benchmarks.guest.results import MEMORY_ALLOWANCE, NATIVE, SOFTKVM, TCG, Result, duration, three_digits

COLUMNS = ("case", NATIVE, TCG, SOFTKVM, "ratio", "least…most", "goal", "MiB")
RATIO, MEMORY = COLUMNS.index("ratio"), COLUMNS.index("MiB")
_RARE = 1e-4
"""Events that come less often for an operation are left out."""


def cells(result: Result) -> tuple[str, ...]:
    """One line."""
    ratio = result.ratio()
    return (
        result.name,
        *(duration(result.median(who)) for who in (NATIVE, TCG, SOFTKVM)),
        three_digits(ratio.median),
        f"{three_digits(ratio.low)}…{three_digits(ratio.high)}",
        f"{result.goal:g}",
        f"{result.extra_memory():+.0f}",
    )


def table(results: Sequence[Result], rounds: int) -> Table:
    """A line for each result: green where the goal is met, red where softkvm is the slower one."""
    drawn = Table(
        title=f"One operation, medians of {rounds}; ratio: TCG's time to softkvm's; MiB: memory beyond TCG's", title_justify="left"
    )
    for name in COLUMNS:
        drawn.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    group = None
    for result in results:
        if group not in (None, result.group):
            drawn.add_section()
        group = result.group
        values = list(cells(result))
        style = "green" if result.is_met() else "red" if result.ratio().median < 1 else "yellow"
        values[RATIO] = f"[{style}]{values[RATIO]}[/]"
        if result.extra_memory() > MEMORY_ALLOWANCE:
            values[MEMORY] = f"[red]{values[MEMORY]}[/]"
        drawn.add_row(*values)
    return drawn


def events(results: Sequence[Result]) -> Table:
    """What softkvm counted for one operation of each case, most first."""
    drawn = Table(title="softkvm's counters, for one operation", title_justify="left", show_header=False)
    for result in results:
        counted = sorted(((value, name) for name, value in result.events.items() if value >= _RARE), reverse=True)
        drawn.add_row(result.name, ", ".join(f"{name} {value:.3g}" for value, name in counted))
    return drawn
