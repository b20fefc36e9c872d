"""docs/performance.md: the figure, what is asked of softkvm and what of it is met, and every number."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.guest import table
from benchmarks.guest.results import MEMORY_ALLOWANCE, NATIVE, SOFTKVM, TCG, WALL, Report, Result, groups, three_digits

_HEAD = """# Performance

softkvm beside QEMU's TCG: the same kernel, initial RAM disk, command line, memory and number of CPUs in both, one operation of each case.
**{met} of {cases} cases reach their goal; in {slower} softkvm is slower than TCG.** Medians of {rounds} rounds; a ratio is TCG's time to
softkvm's of the same round, so higher is faster.

![How many times as fast as TCG softkvm is, for each case]({figure})

Repeat it with `make performance`, which measures and writes this page, [the figure]({figure}) and [the samples]({samples});
`python -m benchmarks.guest CASE...` measures single cases and groups of them.
"""

_GOALS = """
## Goals

| group | goal | least | most | reached by |
|---|---:|---:|---:|---|
"""

_CASES = """
## Cases

Times are those of one operation. They are CPU time of the host, all threads of the machine's process, which does not depend on what else
the host does; for cases with two CPUs, marked ⏱, they are the guest's own clock. "Native" is the same program on the host, by the clock.
Memory is the peak resident size of the process while the case ran; softkvm's is meant to stay below TCG's and {allowance:.0f} MiB.
"""

_FACTS = """
## Where

| | |
|---|---|
"""


def page(report: Report, figure: str, samples: str) -> str:
    """The page as Markdown, with links to the files `figure` and `samples` beside it."""
    results = report.results
    head = _HEAD.format(
        met=sum(result.is_met() for result in results),
        cases=len(results),
        slower=sum(result.ratio().median < 1 for result in results),
        rounds=report.rounds,
        figure=figure,
        samples=samples,
    )
    goals = "".join(_goal([result for result in results if result.group == group]) for group in groups(results))
    facts = "".join(f"| {name} | {value} |\n" for name, value in report.facts.items())
    return head + _GOALS + goals + _CASES.format(allowance=MEMORY_ALLOWANCE) + _cases(results) + _FACTS + facts


def _goal(results: Sequence[Result]) -> str:
    """One line for a group."""
    ratios = [result.ratio().median for result in results]
    asked = "…".join(f"{goal:g}" for goal in sorted({result.goal for result in results}))
    reached = f"{sum(result.is_met() for result in results)} of {len(results)}"
    return f"| {results[0].group} | {asked} | {three_digits(min(ratios))} | {three_digits(max(ratios))} | {reached} |\n"


def _cases(results: Sequence[Result]) -> str:
    lines = [
        f"| case | operation | {NATIVE} | {TCG} | {SOFTKVM} | ratio | least…most | goal | {TCG} MiB | {SOFTKVM} MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        name, *times, ratio, spread, goal, _ = table.cells(result)
        clock = " ⏱" if result.clock == WALL else ""
        ratio = f"**{ratio}**" if result.is_met() else ratio
        memory = (f"{result.memory[who]:.0f}" for who in (TCG, SOFTKVM))
        lines.append(f"| {' | '.join((name + clock, result.operation, *times, ratio, spread, goal, *memory))} |")
    return "\n" + "\n".join(lines) + "\n"
