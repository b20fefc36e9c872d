"""What performance monitoring costs: a guest program without it, with counters, with last branch records on, and under `perf record -b`.

`python -m benchmarks.perf` runs one program in the default guest, each way in turn in one boot, and compares the CPU time that this host
needs for it between two marks of the program, so that a busy host slows all of them; best of all rounds. The first line, with everything
off, is the yardstick. What the PMU costs the engine while it is off, `benchmarks/mips.rs` tells of two builds, and what it costs without
Linux and perf around it `benchmarks.watch`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import report

_PROGRAM = """
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


class Way(NamedTuple):
    """How the program is run, and how much dearer than without performance monitoring that may be."""

    name: str
    command: str
    goal: float | None


_WORK = "/root/work"
_WAYS = (
    Way("nothing on", _WORK, None),
    Way("counters: perf stat", f"perf stat -e instructions:u,branches:u {_WORK}", None),
    Way("LBR on: perf record -b, one sample", f"perf record -b -c 2000000000 -o /tmp/p {_WORK}", 1.3),
    Way("perf record -b -c 1000003", f"perf record -b -c 1000003 -o /tmp/p {_WORK}", None),
    Way("perf record -b, default rate", f"perf record -b -o /tmp/p {_WORK}", 1.1),
)
_MARK = "benchmark"
_LIMIT = 1800


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process so far (proc(5), fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(program: Path, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each round by way; RuntimeError if the guest did not run all of them."""
    once = "; ".join(f"{way.command} 3>&1 >/dev/null 2>&1" for way in _WAYS)
    script = f"{_WORK}; n=0; while [ $n -lt {rounds} ]; do {once}; n=$((n + 1)); done"
    arguments = ["run", "--timeout", str(_LIMIT), "--with", "linux-perf", "--with", str(program), "--", "sh", "-c", script]
    taken: dict[str, list[float]] = {way.name: [] for way in _WAYS}
    with subprocess.Popen([sys.executable, "-m", "softkvm.cli", *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        marks = [_cpu_seconds(process.pid) for line in process.stdout if line.strip() == _MARK]
    for n, (begin, end) in enumerate(zip(marks[::2], marks[1::2], strict=False)):
        taken[_WAYS[n % len(_WAYS)].name].append(end - begin)
    if len(marks) != 2 * rounds * len(_WAYS):
        raise RuntimeError(f"the guest made {len(marks)} marks and ended with status {process.returncode}")
    return taken


@click.command()
@click.option("-n", "--rounds", default=3, show_default=True, help="Runs of each way.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the samples to this file.")
def main(rounds: int, path: Path | None) -> None:
    """Compare a guest program that is watched with one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "work.c", Path(folder) / "work"
        source.write_text(_PROGRAM)
        subprocess.run(["gcc", "-O1", "-o", program, source], check=True)
        taken = measure(program, rounds)
    least = {way.name: min(taken[way.name]) for way in _WAYS}
    plain = least[_WAYS[0].name]
    rows = [(way.name, f"{least[way.name]:.2f} s", f"{least[way.name] / plain:.2f}", f"{way.goal:g}" if way.goal else "") for way in _WAYS]
    columns = ("way", "CPU time", "times nothing on", "goal")
    report.publish(f"Performance monitoring, best of {rounds}", columns, rows, report.machine_facts(), taken, path)


if __name__ == "__main__":
    main()
