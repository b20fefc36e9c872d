"""`python -m benchmarks.guest [CASE...]`: measure, show, and write down."""

from __future__ import annotations

import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from rich.console import Console

from benchmarks.guest import cases, machines, run, table
from benchmarks.guest.results import Report
from benchmarks.report import machine_facts, program_version

_WIDTH = 120
"""Columns of a table that goes to a file."""


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


@click.command()
@click.argument("names", nargs=-1, metavar="[CASE]...")
@click.option("--tier", type=click.Choice(["interpreter", "translator", "auto"]), help="How softkvm runs guest code.")
@click.option("-n", "--repeat", "rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds: one run under each.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw the ratios to this file: *.svg or *.png.")
def main(names: tuple[str, ...], tier: str | None, rounds: int, path: Path | None, picture: Path | None) -> None:
    """Run guest programs under softkvm and under QEMU's TCG by turns.

    CASE is the name of a case or of a group of cases; without one all run.
    """
    try:
        chosen = cases.select(names)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    machines.require_qemu()
    facts = machine_facts() | {"qemu": program_version(machines.QEMU), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts |= {"load before": _load()}
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        measured = {}
        for result in run.measure(chosen, rounds, tier, Path(folder)):
            measured[result.name] = result
            console.print(f"{result.name}: {result.ratio().median:.2f}", style="dim", highlight=False)
    report = Report(facts | {"load after": _load()}, rounds, [measured[case.name] for case in chosen])
    console.print(table.table(report.results, rounds))
    console.print(", ".join(f"{name} {value}" for name, value in report.facts.items()), style="dim", highlight=False)
    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if picture is not None:
        from benchmarks.guest import plot

        plot.draw(report, picture)


if __name__ == "__main__":
    main()
