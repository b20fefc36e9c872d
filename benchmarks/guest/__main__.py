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

from benchmarks.guest import cases, machines, page, run, table
from benchmarks.guest.cases import Case
from benchmarks.guest.results import ChecksumError, Report
from benchmarks.report import machine_facts, program_version
from softkvm.cli.errors import CliError

_WIDTH = 120
"""Columns of a table that goes to a file."""
_File = click.Path(dir_okay=False, path_type=Path)


def _load() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())


def _measure(chosen: list[Case], rounds: int, tier: str | None, console: Console) -> Report:
    machines.require_qemu()
    facts = machine_facts() | {"qemu": program_version(machines.QEMU), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts |= {"tier": tier or "auto", "load before": _load()}
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for result in run.measure(chosen, rounds, tier, Path(folder)):
                measured[result.name] = result
                console.print(f"{result.name}: {result.ratio().median:.2f}", style="dim", highlight=False)
        except (CliError, ChecksumError) as error:
            raise click.ClickException(str(error)) from error
    return Report(facts | {"load after": _load()}, rounds, [measured[case.name] for case in chosen])


@click.command()
@click.argument("names", nargs=-1, metavar="[CASE]...")
@click.option("--tier", type=click.Choice(["interpreter", "translator", "auto"]), help="How softkvm runs guest code.")
@click.option("-n", "--repeat", "rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds: one run under each.")
@click.option(
    "--from", "earlier", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Show what --json wrote; run nothing."
)
@click.option("--events", is_flag=True, help="Show what softkvm counted for an operation, too.")
@click.option("--json", "samples", type=_File, help="Write the samples to this file.")
@click.option("--plot", "figure", type=_File, help="Draw the ratios to this file: *.svg or *.png.")
@click.option("--page", "text", type=_File, help="Write a page with links to the files of --json and --plot beside it.")
def main(
    names: tuple[str, ...],
    tier: str | None,
    rounds: int,
    earlier: Path | None,
    events: bool,
    samples: Path | None,
    figure: Path | None,
    text: Path | None,
) -> None:
    """Run guest programs under softkvm and under QEMU's TCG by turns.

    CASE is the name of a case or of a group of cases; without one all run.
    """
    if text is not None and (samples is None or figure is None):
        raise click.UsageError("--page wants --json and --plot")
    try:
        chosen = cases.select(names)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    report = _measure(chosen, rounds, tier, console) if earlier is None else msgspec.json.decode(earlier.read_bytes(), type=Report)
    console.print(table.table(report.results, report.rounds))
    if events:
        console.print(table.events(report.results))
    console.print(", ".join(f"{name} {value}" for name, value in report.facts.items()), style="dim", highlight=False)
    if samples is not None:
        samples.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if figure is not None:
        from benchmarks.guest import plot  # matplotlib takes a second

        plot.draw(report, figure)
    if text is not None and samples is not None and figure is not None:
        text.write_text(page.page(report, figure.name, samples.name))


if __name__ == "__main__":
    main()
