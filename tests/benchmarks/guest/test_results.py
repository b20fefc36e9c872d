"""Medians, ratios and numbers for people."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.guest.cases import Case
from benchmarks.guest.results import CPU, NATIVE, SOFTKVM, TCG, WALL, ChecksumError, Report, Sample, duration, summarise, three_digits


def taken(*times: float, checksum: str = "5", memory: float = 100) -> list[Sample]:
    """Samples whose CPU time is a tenth of their wall time."""
    return [Sample(time, time / 10, checksum, memory + number, {}) for number, time in enumerate(times)]


def test_a_ratio_is_of_one_round() -> None:
    result = summarise(Case("c", "g", 2.0, "call"), {TCG: taken(10, 40, 100), SOFTKVM: taken(5, 10, 100)})
    assert result.ratio() == (2.0, 1.0, 4.0)
    assert result.is_met()
    assert result.clock == CPU
    assert result.median(TCG) == 4


def test_cases_that_wait_are_compared_by_the_clock() -> None:
    samples = {TCG: taken(10), SOFTKVM: [Sample(20, 1, "5", 300, {"instructions": 3})], NATIVE: taken(1)}
    result = summarise(Case("c", "g", 1.0, "call", is_busy=False), samples)
    assert (result.clock, result.ratio().median, result.is_met()) == (WALL, 0.5, False)
    assert result.median(NATIVE) == 1
    assert result.extra_memory() == 200
    assert result.events == {"instructions": 3}


def test_the_greatest_memory_counts() -> None:
    result = summarise(Case("c", "g", 1.0, "call"), {TCG: taken(1, 1, 1), SOFTKVM: taken(1, 1, 1, memory=90)})
    assert result.memory == {TCG: 102, SOFTKVM: 92}


def test_different_checksums_are_no_result() -> None:
    with pytest.raises(ChecksumError, match=r"case computes different things: TCG 5, softkvm 6"):
        summarise(Case("case", "g", 1.0, "call"), {TCG: taken(1), SOFTKVM: taken(1, checksum="6")})


def test_a_report_is_read_back() -> None:
    result = summarise(Case("c", "g", 2.0, "call"), {TCG: taken(10), SOFTKVM: taken(5)})
    report = Report({"qemu": "7.2"}, 1, [result])
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0.0251, "0.025 ns"), (9.999, "10.0 ns"), (999.4, "999 ns"), (999.9, "1.00 µs"), (2.5e6, "2.50 ms"), (3.21e9, "3.21 s"), (None, "")],
)
def test_durations(nanoseconds: float | None, text: str) -> None:
    assert duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.05, "0.050"), (0.0999, "0.10"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100"), (1234, "1234")]
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text
