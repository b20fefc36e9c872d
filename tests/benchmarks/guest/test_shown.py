"""The table, the figure and the page of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks.guest import page, table
from benchmarks.guest.__main__ import main
from benchmarks.guest.cases import Case
from benchmarks.guest.results import NATIVE, SOFTKVM, TCG, Report, Sample, summarise


@pytest.fixture
def report() -> Report:
    fast = {
        TCG: [Sample(40, 40, "1", 200, {})],
        SOFTKVM: [Sample(10, 10, "1", 280, {"instructions": 31.5, "exit HLT": 0.5, "tlb_fills": 1e-9})],
        NATIVE: [Sample(2, 2, "1", 1, {})],
    }
    slow = {TCG: [Sample(3000, 1, "1", 200, {})], SOFTKVM: [Sample(6000, 1, "1", 150, {})]}
    cases = (Case("fast", "one", 2.0, "call"), Case("slow", "other", 1.0, "byte", is_busy=False))
    return Report({"qemu": "7.2"}, 1, [summarise(case, samples) for case, samples in zip(cases, (fast, slow), strict=True)])


def test_table(report: Report) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table.table(report.results, report.rounds))
    lines = [line.replace("│", "").split() for line in capture.get().splitlines()]
    assert ["fast", "2.00", "ns", "40.0", "ns", "10.0", "ns", "4.00", "4.00…4.00", "2", "+80"] in lines
    assert ["slow", "3.00", "µs", "6.00", "µs", "0.50", "0.50…0.50", "1", "-50"] in lines


def test_events(report: Report) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table.events(report.results))
    assert "instructions 31.5, exit HLT 0.5 " in capture.get()


def test_page(report: Report) -> None:
    text = page.page(report, "p.svg", "p.json")
    assert "**1 of 2 cases reach their goal; in 1 softkvm is slower than TCG.**" in text
    assert "](p.svg)" in text
    assert "| one | 2 | 4.00 | 4.00 | 1 of 1 |" in text
    assert "| fast | call | 2.00 ns | 40.0 ns | 10.0 ns | **4.00** | 4.00…4.00 | 2 | 200 | 280 |" in text
    assert "| slow ⏱ | byte |  | 3.00 µs | 6.00 µs | 0.50 | 0.50…0.50 | 1 | 200 | 150 |" in text


def test_an_earlier_run_is_shown_again(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import msgspec

    (tmp_path / "earlier.json").write_bytes(msgspec.json.encode(report))
    files = {name: tmp_path / f"p.{name}" for name in ("json", "svg", "md")}
    options = [
        "--from",
        str(tmp_path / "earlier.json"),
        "--json",
        str(files["json"]),
        "--plot",
        str(files["svg"]),
        "--page",
        str(files["md"]),
    ]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert msgspec.json.decode(files["json"].read_bytes(), type=Report) == report
    assert "<svg" in files["svg"].read_text()
    assert files["md"].read_text() == page.page(report, "p.svg", "p.json")


def test_a_page_needs_its_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--page", str(tmp_path / "p.md")])
    assert result.exit_code == 2
    assert "--page wants --json and --plot" in result.output
