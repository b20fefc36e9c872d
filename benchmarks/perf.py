"""What performance monitoring costs: guest programs without it, with counters, with last branch records on, and under `perf record -b`.

`python -m benchmarks.perf` runs two programs in the default guest, each way in turn in one boot, and compares the CPU time that this host
needs for them between two marks of the guest, so that a busy host slows all of them; best of all rounds. One program does little but
branch, which is the worst case; the other is gzip, an ordinary one. The goal of `perf record -b` is over LBR on, as branch records are on
while it records: what is above that are the samples. What the PMU costs the engine while it is off, `benchmarks/mips.rs` tells of two
builds, and what it costs without Linux and perf around it `benchmarks.watch`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import report

_BRANCHES = """
#include <stdio.h>
#include <stdlib.h>
volatile unsigned sink;
__attribute__((noinline)) static void work(unsigned v) { if (v & 1) sink += 3; if (v & 2) sink ^= v; }
int main(void)
{
	dprintf(3, "benchmark\\n");
	for (long n = 0; n < 10000000; n++)
		work(random());
	dprintf(3, "benchmark\\n");
	return 0;
}
"""
_GZIP = """#!/bin/sh
echo benchmark >&3
gzip -c /usr/bin/perf
echo benchmark >&3
"""


class Way(NamedTuple):
    """How a program is run, and how much dearer that may be than with everything off, or than with branch records on."""

    name: str
    prefix: str
    goal: float | None = None
    over_lbr: bool = False


_LBR = "LBR on"
_WAYS = (
    Way("nothing on", ""),
    Way("counters: perf stat", "perf stat -e instructions:u,branches:u"),
    Way(_LBR, "perf record -b -c 2000000000 -o /tmp/p", 1.3),  # one sample
    Way("perf record -b -c 1000003", "perf record -b -c 1000003 -o /tmp/p", over_lbr=True),
    Way("perf record -b, default rate", "perf record -b -o /tmp/p", 1.1, over_lbr=True),
)
_PROGRAMS = ("branches", "gzip")  # as /root/NAME in the guest; each writes the mark to descriptor 3 when its work begins and when it ends
_MARK = "benchmark"
_LIMIT = 1800

Samples = dict[str, dict[str, list[float]]]
"""CPU seconds of each round by program and way."""


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, by its clock (clock_getcpuclockid(3))."""
    return time.clock_gettime(~pid << 3 | 2)


def _script(rounds: int) -> str:
    """What the guest runs: each program once to warm up, then `rounds` times each way."""
    warm = "; ".join(f"/root/{program} 3>/dev/null >/dev/null 2>&1" for program in _PROGRAMS)
    once = "; ".join(f"{way.prefix} /root/{program} 3>&1 >/dev/null 2>&1" for program in _PROGRAMS for way in _WAYS)
    return f"{warm}; n=0; while [ $n -lt {rounds} ]; do {once}; n=$((n + 1)); done"


def measure(folder: Path, rounds: int) -> Samples:
    """Runs the programs of `folder` in a guest; RuntimeError if it did not run everything."""
    programs = [argument for program in _PROGRAMS for argument in ("--with", str(folder / program))]
    arguments = ["run", "--timeout", str(_LIMIT), "--with", "linux-perf", *programs, "--", "sh", "-c", _script(rounds)]
    with subprocess.Popen([sys.executable, "-m", "softkvm.cli", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        marks = [_cpu_seconds(process.pid) for line in process.stdout if line.strip() == _MARK]
    if len(marks) != 2 * rounds * len(_PROGRAMS) * len(_WAYS):
        raise RuntimeError(f"the guest made {len(marks)} marks and ended with status {process.returncode}")
    taken: Samples = {program: {way.name: [] for way in _WAYS} for program in _PROGRAMS}
    spans = iter(zip(marks[::2], marks[1::2], strict=True))
    for _ in range(rounds):
        for name in _PROGRAMS:
            for way, (begin, end) in zip(_WAYS, spans, strict=False):
                taken[name][way.name].append(end - begin)
    return taken


@click.command()
@click.option("-n", "--rounds", default=3, show_default=True, help="Runs of each way.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, path: Path | None) -> None:
    """Compare guest programs that are watched with the same ones that are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "branches.c").write_text(_BRANCHES)
        subprocess.run(["gcc", "-O1", "-o", folder / "branches", folder / "branches.c"], check=True)
        (folder / "gzip").write_text(_GZIP)
        (folder / "gzip").chmod(0o755)
        taken = measure(folder, rounds)
    rows = [row for program in _PROGRAMS for row in _rows(program, taken[program])]
    columns = ("program", "way", "CPU time", "over off", "over LBR", "goal")
    report.publish(f"Performance monitoring, best of {rounds}", columns, rows, report.machine_facts(), taken, path)


def _rows(program: str, taken: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """The table's rows of a program."""
    least = {way: min(samples) for way, samples in taken.items()}
    plain, lbr = least["nothing on"], least[_LBR]
    rows: list[tuple[str, ...]] = []
    for way in _WAYS:
        own = least[way.name]
        over_lbr = f"{own / lbr:.2f}" if way.over_lbr else ""
        goal = f"{way.goal:g}" if way.goal else ""
        rows.append((program, way.name, f"{own:.2f} s", f"{own / plain:.2f}", over_lbr, goal))
    return rows


if __name__ == "__main__":
    main()
