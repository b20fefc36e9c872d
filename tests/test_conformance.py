"""The page about kvm-unit-tests, from results as the suite prints them."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from docs import conformance

OUTPUT = """\
\x1b[32mPASS\x1b[0m access (1 tests)
PASS vmexit_cpuid\x20
\x1b[31mFAIL\x1b[0m setjmp (2 tests, 1 unexpected failures)
\x1b[33mSKIP\x1b[0m svm_npt (0 tests)
\x1b[33mSKIP\x1b[0m taskswitch (i386 only)
some other line
"""


def test_the_page_counts_and_explains() -> None:
    page = conformance.page(conformance.results(OUTPUT), "abc123", datetime.date(2026, 1, 2))
    assert "kvm-unit-tests abc123" in page
    assert "2026-01-02: **2 of 5 configurations pass**" in page
    assert "`access`, `vmexit_cpuid`" in page
    assert "| `setjmp` | fail | 2 tests, 1 unexpected failures |" in page
    assert "| `svm_npt` | skip | nested SVM is not implemented |" in page
    assert "| `taskswitch` | skip | a 32-bit program" in page
    assert "## Tiers" not in page


def test_the_page_tells_what_a_tier_does_not_pass() -> None:
    found = conformance.results(OUTPUT)
    page = conformance.page(found, "abc123", datetime.date(2026, 1, 2), {"interpreter": found[:2], "translator": found[:3]})
    assert "- interpreter: 2 of 2 pass\n" in page
    assert "- translator: 2 of 3 pass; not `setjmp` (2 tests, 1 unexpected failures)\n" in page


def _suite(directory: Path, script: str) -> Path:
    directory.mkdir()
    (directory / "run_tests.sh").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "run_tests.sh").chmod(0o755)
    return directory


def test_a_program_of_32_bits_is_judged_in_its_own_build(tmp_path: Path) -> None:
    wide = _suite(tmp_path / "wide", 'echo "PASS access"; echo "SKIP cmpxchg8b (i386 only)"; echo "SKIP taskswitch (i386 only)"')
    narrow = _suite(tmp_path / "narrow", 'test "$*" = "cmpxchg8b taskswitch" && echo "PASS cmpxchg8b" && echo "FAIL taskswitch"')
    assert [result[:2] for result in conformance.run(wide, narrow)] == [
        ("PASS", "access"),
        ("PASS", "cmpxchg8b"),
        ("FAIL", "taskswitch"),
    ]
    assert [result[1] for result in conformance.run(wide, None, ["access"])] == ["access"]


def test_the_suite_sees_the_host_of_softkvm(tmp_path: Path) -> None:
    path, text = next(item for item in conformance.host_files().items() if item[0].startswith("/sys/module"))
    host = f'[ -c /dev/kvm ] && [ "$(cat {path})" = {text} ] && echo words 2> /dev/null | tee /dev/stderr | grep -q words'
    script = f'{host} && echo "PASS $ACCEL"; echo "PASS $(pwd)"'
    suite = _suite(tmp_path / "suite", script)
    assert conformance.run(suite, None, None, "translator") == [("PASS", "kvm,tier=translator", ""), ("PASS", str(suite), "")]
    with pytest.raises(OSError, match="judged nothing"):
        conformance.run(_suite(tmp_path / "silent", "true"), None)
