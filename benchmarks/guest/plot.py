"""One figure: a bar for each case from 1, where softkvm is as fast as TCG, to how fast it is, with the goal marked."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from benchmarks.guest.results import Report

_MET, _FASTER, _SLOWER = "#2a7f4f", "#d9a441", "#b3392f"


def draw(report: Report, path: Path) -> None:
    """Write the figure as the kind of file that the name of `path` says: SVG, PNG or PDF."""
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "softkvm", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    results = report.results
    ratios = [result.ratio() for result in results]
    colours = [
        _MET if result.is_met() else _FASTER if ratio.median >= 1 else _SLOWER for result, ratio in zip(results, ratios, strict=True)
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.24 * len(results) + 1), layout="constrained")
    places = range(len(results))
    spread = [[ratio.median - ratio.low for ratio in ratios], [ratio.high - ratio.median for ratio in ratios]]
    lengths = [ratio.median - 1 for ratio in ratios]
    axes.barh(places, lengths, left=1, color=colours, xerr=spread, error_kw={"elinewidth": 0.8, "ecolor": "#333333"})
    axes.scatter([result.goal for result in results], places, marker="|", s=90, color="black", label="goal", zorder=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, [result.name for result in results])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as QEMU's TCG")
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    pyplot.close(figure)
